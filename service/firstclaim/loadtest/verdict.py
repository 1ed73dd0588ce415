"""The verdict of a load test: the outcome of each event, from the ledger and from the effects of the probe.

Guarantees: each event that was sent has exactly one `Fate`. An event counts as lost only if it was accepted (a
2xx) or completed (the ledger's completion mark), and its row or its effect is missing. Ledger and effects are read in
one statement, so in one snapshot. Nothing here writes.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum

import asyncpg

from firstclaim.errors import LedgerUnavailable, StoreUnsuitable
from firstclaim.handlers.load_probe import ACTION
from firstclaim.loadtest.plan import Observed, Plan, entries
from firstclaim.postgres.advice import explain
from firstclaim.postgres.connect import connect
from firstclaim.postgres.connection import UNAVAILABLE
from firstclaim.postgres.statement import in_schema
from firstclaim.status import UNFINISHED, Status

_CONNECT_SECONDS = 10.0
_POLL_SECONDS = 0.5

# The events of the run that wait for dispatch, or are being handled.
_UNFINISHED = f"""
SELECT count(*) FROM firstclaim.stripe_events
 WHERE event_id >= $1 AND event_id < $2 AND status IN ({", ".join(f"'{each}'" for each in UNFINISHED)})
"""

_FOUND = """
SELECT coalesce(e.event_id, f.event_id) AS event_id, e.status, e.action, coalesce(f.effects, 0) AS effects
  FROM (SELECT event_id, status, action FROM firstclaim.stripe_events WHERE event_id >= $1 AND event_id < $2) e
  FULL JOIN (SELECT event_id, count(*) AS effects FROM load_effects
              WHERE event_id >= $1 AND event_id < $2 GROUP BY event_id) f USING (event_id)
"""


@dataclass(frozen=True, slots=True)
class EventRecord:
    """An event in the database. `status` None: the ledger has no row."""

    event_id: str
    status: Status | None
    action: str | None
    effects: int


class Fate(StrEnum):
    """The outcome of an event that was sent."""

    ONCE = "effects once"
    LOST = "lost"
    DOUBLED = "doubled"
    UNMARKED = "effect without a completion mark"
    UNSETTLED = "not settled yet"
    DEAD = "dead, kept for an operator"
    ELSEWHERE = "not handled by the probe"
    REFUSED = "never accepted: Stripe would send it again"


# The fates that break the guarantee. `UNSETTLED` is not known to be a loss, but not known to be none either.
BROKEN = (Fate.LOST, Fate.DOUBLED, Fate.UNMARKED, Fate.UNSETTLED)


def fate_of(observed: Observed, record: EventRecord | None) -> Fate:
    """The fate of one event, from the answers to its deliveries and its record in the database."""
    status, effects = (record.status, record.effects) if record else (None, 0)
    if effects > 1 or Observed.PROCESSED_AGAIN in observed:
        return Fate.DOUBLED
    if effects == 1:
        return Fate.ONCE if status is Status.COMPLETED else Fate.UNMARKED
    if status is None:
        return Fate.LOST if Observed.ACKNOWLEDGED in observed else Fate.REFUSED
    if status in UNFINISHED:
        return Fate.UNSETTLED
    if status is Status.DEAD:
        return Fate.DEAD
    # Settled without an effect: the probe's effect is missing, or another handler handled the event.
    return Fate.LOST if record and record.action == ACTION else Fate.ELSEWHERE


def judge(plan: Plan, journal: bytes, records: Iterable[EventRecord]) -> dict[Fate, list[str]]:
    """The ids of the events, by fate."""
    by_id = {each.event_id: each for each in records}
    fates: dict[Fate, list[str]] = {fate: [] for fate in Fate}
    for number, observed in entries(journal):
        event_id = plan.event_id(number)
        fates[fate_of(observed, by_id.get(event_id))].append(event_id)
    return fates


# -- the database -------------------------------------------------------------------------------------


async def check(dsn: str, schema: str) -> None:
    """Check before the load that a verdict will be possible. Raises `LedgerUnavailable` or `StoreUnsuitable`."""
    async with _connect(dsn) as connection:
        missing = "SELECT to_regclass($1) IS NULL OR to_regclass('load_effects') IS NULL"
        if await connection.fetchval(missing, in_schema("firstclaim.stripe_events", schema)):
            raise StoreUnsuitable(
                "the database for the verdict lacks the ledger or the table load_effects: is it the service's own "
                "(--database-url, FIRSTCLAIM_SCHEMA), and was it migrated for the probe "
                "(`FIRSTCLAIM_HANDLERS=firstclaim.handlers.load_probe firstclaim migrate`)?"
            )


async def read(
    dsn: str, schema: str, plan: Plan, settle_seconds: float, waiting: Callable[[int], None]
) -> list[EventRecord]:
    """The records of the run's events, once all are settled or `settle_seconds` have passed.

    Calls `waiting` after every query with the number of unsettled events. Raises `LedgerUnavailable`.
    """
    id_range = plan.id_head, plan.id_head + ":"  # the character after "9"
    loop = asyncio.get_running_loop()
    deadline = loop.time() + settle_seconds
    count, found = in_schema(_UNFINISHED, schema), in_schema(_FOUND, schema)
    async with _connect(dsn) as connection:
        while (unfinished := await connection.fetchval(count, *id_range)) and loop.time() < deadline:
            waiting(unfinished)
            await asyncio.sleep(_POLL_SECONDS)
        return [
            EventRecord(row["event_id"], row["status"] and Status(row["status"]), row["action"], row["effects"])
            for row in await connection.fetch(found, *id_range)
        ]


@asynccontextmanager
async def _connect(dsn: str) -> AsyncIterator[asyncpg.Connection]:
    try:
        connection = await connect(dsn, _CONNECT_SECONDS, asyncpg.Connection)
        try:
            yield connection
        finally:
            connection.terminate()
    except UNAVAILABLE as error:
        raise LedgerUnavailable(explain(error)) from error
