"""What became of a load test's events, read from the ledger and from the effects that the probe left.

Guarantees: each event that was sent has exactly one `Fate`; an event counts as lost only if somebody was
promised something (a 2xx, or the ledger's own completion mark) and it is not there; ledger and effects are
read in one statement, so as of one moment. Nothing here writes.
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
from firstclaim.postgres.connection import UNAVAILABLE, describe
from firstclaim.status import UNFINISHED, Status

_CONNECT_SECONDS = 10.0
_POLL_SECONDS = 0.5

# An event of the run that is still to be dispatched, or being dispatched.
_UNFINISHED = f"""
SELECT count(*) FROM stripe_events
 WHERE event_id >= $1 AND event_id < $2 AND status IN ({", ".join(f"'{each}'" for each in UNFINISHED)})
"""

_FOUND = """
SELECT coalesce(e.event_id, f.event_id) AS event_id, e.status, e.action, coalesce(f.effects, 0) AS effects
  FROM (SELECT event_id, status, action FROM stripe_events WHERE event_id >= $1 AND event_id < $2) e
  FULL JOIN (SELECT event_id, count(*) AS effects FROM load_effects
              WHERE event_id >= $1 AND event_id < $2 GROUP BY event_id) f USING (event_id)
"""


@dataclass(frozen=True, slots=True)
class EventRecord:
    """An event as the database has it; `status` None: no row in the ledger."""

    event_id: str
    status: Status | None
    action: str | None
    effects: int


class Fate(StrEnum):
    """What became of an event that was sent."""

    ONCE = "effects once"
    LOST = "lost"
    DOUBLED = "doubled"
    UNMARKED = "effect without a completion mark"
    UNSETTLED = "not settled yet"
    DEAD = "dead, kept for an operator"
    ELSEWHERE = "not handled by the probe"
    REFUSED = "never accepted: Stripe would send it again"


# What must not be. `UNSETTLED` is no loss, but nobody can say yet that it is none.
BROKEN = (Fate.LOST, Fate.DOUBLED, Fate.UNMARKED, Fate.UNSETTLED)


def fate_of(noted: Observed, found: EventRecord | None) -> Fate:
    """What became of one event, from what its deliveries were told and what the database has."""
    status, effects = (found.status, found.effects) if found else (None, 0)
    if effects > 1 or Observed.PROCESSED_AGAIN in noted:
        return Fate.DOUBLED
    if effects == 1:
        return Fate.ONCE if status is Status.COMPLETED else Fate.UNMARKED
    if status is None:
        return Fate.LOST if Observed.ACKNOWLEDGED in noted else Fate.REFUSED
    if status in UNFINISHED:
        return Fate.UNSETTLED
    if status is Status.DEAD:
        return Fate.DEAD
    # Settled, and no effect: its probe's effect is gone, or it was never the probe's.
    return Fate.LOST if found and found.action == ACTION else Fate.ELSEWHERE


def judge(plan: Plan, journal: bytes, found: Iterable[EventRecord]) -> dict[Fate, list[str]]:
    """The ids of the events of each fate."""
    by_id = {each.event_id: each for each in found}
    fates: dict[Fate, list[str]] = {fate: [] for fate in Fate}
    for number, noted in entries(journal):
        event_id = plan.event_id(number)
        fates[fate_of(noted, by_id.get(event_id))].append(event_id)
    return fates


# -- the database -------------------------------------------------------------------------------------


async def check(dsn: str) -> None:
    """Before the load: that there will be a verdict. Raises `LedgerUnavailable` or `StoreUnsuitable`."""
    async with _connected(dsn) as connection:
        missing = "to_regclass('stripe_events') IS NULL OR to_regclass('load_effects') IS NULL"
        if await connection.fetchval(f"SELECT {missing}"):
            raise StoreUnsuitable(
                "the database of the verdict lacks the ledger or the table load_effects: is it the service's own "
                "(--database-url), and is it up to date (`firstclaim migrate`)?"
            )


async def read(dsn: str, plan: Plan, settle_seconds: float, waiting: Callable[[int], None]) -> list[EventRecord]:
    """What the database has of the run's events, once they are settled or `settle_seconds` have passed.

    `waiting` is told, at every look, how many are not settled. Raises `LedgerUnavailable`.
    """
    these = plan.id_head, plan.id_head + ":"  # the character after the last digit
    loop = asyncio.get_running_loop()
    deadline = loop.time() + settle_seconds
    async with _connected(dsn) as connection:
        while (unfinished := await connection.fetchval(_UNFINISHED, *these)) and loop.time() < deadline:
            waiting(unfinished)
            await asyncio.sleep(_POLL_SECONDS)
        return [
            EventRecord(row["event_id"], row["status"] and Status(row["status"]), row["action"], row["effects"])
            for row in await connection.fetch(_FOUND, *these)
        ]


@asynccontextmanager
async def _connected(dsn: str) -> AsyncIterator[asyncpg.Connection]:
    try:
        connection = await asyncpg.connect(dsn, timeout=_CONNECT_SECONDS)
        try:
            yield connection
        finally:
            connection.terminate()
    except UNAVAILABLE as error:
        raise LedgerUnavailable(describe(error)) from error
