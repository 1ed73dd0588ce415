"""The handler of the others in `tests.load.keyed`: one row, and as short a wait as the keyed handler has."""

import asyncio
import os

from firstclaim import Context, Event, on
from tests.chaos.keyed_handlers import SECONDS
from tests.load.sleeper import RECORD


@on("invoice.payment_failed")
async def record(event: Event, context: Context) -> str:
    """Insert an effect, and wait for `SECONDS`."""
    await context.fetch(RECORD, event.id, context.attempt, os.getpid())
    await asyncio.sleep(SECONDS)
    return "recorded"
