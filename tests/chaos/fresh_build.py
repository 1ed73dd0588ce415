"""A build whose handler asks for the object as it is now; its action says what that was. In FIRSTCLAIM_HANDLERS alone.

The services follow its event and count its effects, as they do of all handlers under test.
"""

from typing import Final

from firstclaim import Context, Event, on
from tests.acceptance import handlers

FRESH: Final = "invoice.payment_failed"


@on(FRESH, fresh=True)
async def act(event: Event, context: Context) -> str:
    """Writes an effect, and says the status of the invoice."""
    await handlers.act(event, context)
    return f"is_{event.data['object']['status']}"
