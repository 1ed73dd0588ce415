"""The handler for a load test: every run of it that is committed leaves a row, so that a count can tell the truth.

Guarantees: table `load_effects` is only ever appended to and has no unique constraint, on purpose: an effect
that happened twice must be able to show itself, and nothing but the pipeline keeps it from happening. It has no
index either; nobody looks an event up in it but `firstclaim load`, once, at the end.

Serve with `FIRSTCLAIM_HANDLERS=firstclaim.handlers.load_probe`, never beside handlers of yours that you rely on: it
takes every type that no other handler names.
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
    """Leave one row, in the transaction that carries the completion mark."""
    await context.fetch(RECORD, event.id, context.attempt)
    return ACTION
