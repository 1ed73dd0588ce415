"""The handlers that only the newer of two builds has; see `tests.chaos.old_build`."""

from typing import Any, Final

from firstclaim import Context, Event, on
from tests.acceptance import handlers

ADDED: Final = "customer.created"


@on(ADDED)
async def act(event: Event, context: Context) -> Any:
    """Writes an effect, and follows its event as all handlers under test do."""
    return await handlers.act(event, context)
