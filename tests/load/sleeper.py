"""The handler of `tests.load.drain`: one row, and then a wait, as for an answer from outside."""

import asyncio
import os
from typing import Final

from firstclaim import Context, Event, on

SECONDS: Final = 0.1
RECORD: Final = """
INSERT INTO effects (event_id, attempt, pid, xid) VALUES ($1, $2, $3, pg_current_xact_id()::text)
"""


@on("*")
async def record_and_sleep(event: Event, context: Context) -> str:
    """Insert an effect, and wait for `SECONDS`."""
    await context.fetch(RECORD, event.id, context.attempt, os.getpid())
    await asyncio.sleep(SECONDS)
    return "slept"
