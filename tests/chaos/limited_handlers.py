"""A handler with slots of its own: an effect, and a wait. Test-only, in FIRSTCLAIM_HANDLERS."""

import asyncio
import os
from typing import Final

from firstclaim import Context, Event, on
from tests.chaos.keyed_handlers import EFFECT, SECONDS
from tests.chaos.trace import outside

LIMITED: Final = "customer.created"
SLOTS: Final = 2


@on(LIMITED, slots=SLOTS)
async def book(event: Event, context: Context) -> str:
    """Two events at a time in each process."""
    await context.fetch(EFFECT, event.id, context.attempt, os.getpid())
    outside(event.id, context.attempt, context.idempotency_key)
    await asyncio.sleep(SECONDS)
    return "booked"
