"""firstclaim: receives Stripe webhooks and dispatches each event once.

What a handler module needs, and nothing that opens anything:

    from firstclaim import Context, Event, on

    @on("invoice.payment_failed")
    async def remember(event: Event, context: Context) -> str: ...
"""

from firstclaim.errors import Permanent, Retry
from firstclaim.event import Event
from firstclaim.registry import Context, on

__all__ = ["Context", "Event", "Permanent", "Retry", "on"]
