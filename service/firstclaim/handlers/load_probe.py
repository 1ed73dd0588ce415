"""The handler for a load test: each committed run inserts a row, so that effects can be counted.

Guarantees: table `load_effects` is only appended to. It has no unique constraint, on purpose: an effect that happened
twice must be visible, and nothing but the pipeline may prevent it. It has no index either, because only `firstclaim
load` reads it, once, at the end.

Serve with `FIRSTCLAIM_HANDLERS=firstclaim.handlers.load_probe`, never beside your own handlers in production: it
handles every type that no other handler names.
"""

from sqlalchemy import Column, DateTime, Integer, MetaData, Table, Text

from firstclaim import Context, Event, on

ACTION = "load_effect_recorded"

metadata = MetaData()

load_effects = Table(
    "load_effects",
    metadata,
    Column("event_id", Text(collation="C"), nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("xid", Text, nullable=False),
    Column("recorded_at", DateTime(timezone=True), nullable=False),
)

RECORD = """
INSERT INTO load_effects (event_id, attempt, xid, recorded_at)
VALUES ($1, $2, pg_current_xact_id()::text, clock_timestamp())
"""


@on("*")
async def record_effect(event: Event, context: Context) -> str:
    """Insert one row, in the transaction that also writes the completion mark."""
    await context.fetch(RECORD, event.id, context.attempt)
    return ACTION
