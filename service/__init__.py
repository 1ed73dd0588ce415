"""firstclaim: receives Stripe webhooks and dispatches each event once.

What a handler module needs, and nothing that opens anything:

    from service import Context, Event, on

    @on("invoice.payment_failed")
    async def remember(event: Event, context: Context) -> str: ...
"""

from service.errors import Permanent, Retry
from service.inbox.event import Event
from service.registry import Context, on

__all__ = ["Context", "Event", "Permanent", "Retry", "on"]
