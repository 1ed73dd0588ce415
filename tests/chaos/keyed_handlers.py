"""A handler with a key: an effect, and a wait. Test-only, in FIRSTCLAIM_HANDLERS."""

import asyncio
import os
from typing import Final

from firstclaim import Context, Event, on
from tests.chaos.trace import outside

KEYED: Final = "customer.subscription.deleted"
SECONDS: Final = 0.02

EFFECT = "INSERT INTO effects (event_id, attempt, pid, xid) VALUES ($1, $2, $3, pg_current_xact_id()::text)"


@on(KEYED, key="metadata.customer")
async def keep(event: Event, context: Context) -> str:
    """One event of a customer at a time."""
    await context.fetch(EFFECT, event.id, context.attempt, os.getpid())
    outside(event.id, context.attempt, context.idempotency_key)
    await asyncio.sleep(SECONDS)
    return "kept"
