"""The handlers that only the older of two builds has: each of the two handles a type that the other does not know.

In FIRSTCLAIM_HANDLERS beside the handlers that both have. `tests.chaos.new_build` is the other build.
"""

from typing import Any, Final

from firstclaim import Context, Event, on
from tests.acceptance import handlers

DROPPED: Final = "payment_intent.succeeded"


@on(DROPPED)
async def act(event: Event, context: Context) -> Any:
    """Writes an effect, and follows its event as all handlers under test do."""
    return await handlers.act(event, context)
