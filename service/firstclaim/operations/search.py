"""Looking through the ledger page by page, however large it is.

Guarantees: nothing here changes anything, or waits for anybody. A page goes on where the last one ended, by
(received_at, event_id), so that what comes in meanwhile moves nothing. What no index can find is looked for among so
many of the newest events only, and told so, with where to go on; and on a connection of `PINS` Postgres ends every
statement after `STATEMENT_SECONDS`, on one core.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import asyncpg

from firstclaim.errors import StatementTimeout
from firstclaim.inbox.statements import Statement, statement
from firstclaim.operations.commands import Commands
from firstclaim.operations.queries import COLUMNS, SELECTED, EventRow, Selection, listed
from firstclaim.status import Status

STATEMENT_SECONDS: Final = 3  # who looks waits no longer; a delivery shares the server with it
PINS: Final[Mapping[str, str]] = {
    "statement_timeout": f"{STATEMENT_SECONDS}s",
    "max_parallel_workers_per_gather": "0",  # a heavy search has one core, and the deliveries the others
    "jit": "off",
    # A plan for these very values: one for all values would not dare to use the index of what is failed or dead.
    "plan_cache_mode": "force_custom_plan",
}
_FROZEN_SECONDS: Final = 1
OBJECTS_MOST: Final = 500_000  # events looked at for an object's id: some tenths of a second
PAYLOADS_MOST: Final = 20_000  # payloads looked into for a customer's id: about as long, for they are packed
UNSUCCESSFUL: Final = (Status.FAILED, Status.DEAD)

_NEWEST_FIRST = "ORDER BY e.received_at DESC, e.event_id DESC"
_FROM_HERE = f"""
  FROM stripe_events e
 WHERE {SELECTED}
   AND (CAST(:at AS timestamptz) IS NULL OR (e.received_at, e.event_id) < (CAST(:at AS timestamptz), :id))
 {_NEWEST_FIRST}
"""
# Beside a `Selection`, the object, or a string in the payload. That is looked for as bytes: of nine hostile but signed
# bodies `jsonb` refused seven. As a scalar subquery it is asked for one event at a time; of an EXISTS the planner would
# make a hash of all payloads there are.
_FOUND = """
       e.object_id = CAST(:object_id AS text)
    OR CAST(:in_payload AS bytea) IS NOT NULL
   AND position(CAST(:in_payload AS bytea) IN
                (SELECT p.body FROM stripe_event_payloads p WHERE p.event_id = e.event_id)) > 0
"""


def _selected(columns: str) -> Statement:
    """The newest that a selection has."""
    return statement(f"SELECT {columns} {_FROM_HERE} LIMIT :most")


def _looked_for(columns: str) -> Statement:
    """Of the newest that a selection has, those with the object or the string."""
    return statement(f"""
SELECT {columns} FROM (SELECT * {_FROM_HERE} LIMIT :looked) e WHERE {_FOUND} {_NEWEST_FIRST} LIMIT :most
""")


_PAGE, _PAGE_LOOKED_FOR = _selected(COLUMNS), _looked_for(COLUMNS)
_IDS, _IDS_LOOKED_FOR = _selected("event_id"), _looked_for("event_id")
_LOOKED_UNTIL = statement(f"SELECT received_at, event_id {_FROM_HERE} OFFSET :looked - 1 LIMIT 1")
_ARRIVALS = statement("""
SELECT date_trunc('hour', received_at, 'UTC') AS began_at, status, count(*) AS events
  FROM stripe_events
 WHERE received_at >= :since
 GROUP BY 1, 2
""")
_NOW = statement("SELECT clock_timestamp() AS now")


@dataclass(frozen=True, slots=True)
class Place:
    """Behind an event in the list."""

    received_at: datetime
    event_id: str


@dataclass(frozen=True, slots=True)
class Search:
    """What is looked for. `customer`: also in the payloads, as a string that is exactly this."""

    selection: Selection = field(default_factory=Selection)
    object_id: str | None = None
    customer: bool = False

    @property
    def most_looked_at(self) -> int | None:
        """Of so many of the newest that the selection has; None: an index finds it, or none is needed."""
        if self.object_id is None:
            return None
        return PAYLOADS_MOST if self.customer else OBJECTS_MOST

    def values(self, place: Place | None) -> dict[str, Any]:
        """The parameters of a statement that looks for it from `place` on."""
        return {
            **self.selection.values(),
            "at": None if place is None else place.received_at,
            "id": "" if place is None else place.event_id,
            "object_id": self.object_id,
            "in_payload": f'"{self.object_id}"'.encode() if self.customer else None,
            "looked": self.most_looked_at,
        }


@dataclass(frozen=True, slots=True)
class SearchPage:
    """A page of events, the newest first.

    `more`: where to go on; `looked_until`: how far was looked, where that was not to the end of the ledger.
    """

    events: list[EventRow]
    more: Place | None
    looked_until: datetime | None


@dataclass(frozen=True, slots=True)
class HourlyCounts:
    """Events by the hour in which they came in and by what they are now; hours without any are there too."""

    hours: list[tuple[datetime, dict[Status, int]]]


class LedgerSearch(Commands):
    """What the page asks, on one connection with `PINS`; what takes longer than these allow is a `StatementTimeout`."""

    async def page(self, search: Search, place: Place | None, most: int) -> SearchPage:
        """The newest `most` that were found behind `place`; None: behind the beginning."""
        values = search.values(place)
        query = _PAGE if search.object_id is None else _PAGE_LOOKED_FOR
        rows = await self._fetch(query, **values, most=most + 1)
        events = [listed(row) for row in rows[:most]]
        if len(rows) > most:
            return SearchPage(events, Place(events[-1].received_at, events[-1].event_id), None)
        if search.most_looked_at is not None and (last := await self._fetch(_LOOKED_UNTIL, **values)):
            return SearchPage(events, Place(**last[0]), last[0]["received_at"])
        return SearchPage(events, None, None)

    async def replayable(self, search: Search, most: int) -> list[str]:
        """The ids of those that were found and are failed or dead, the newest `most`."""
        asked = search.selection.statuses
        statuses = [each for each in UNSUCCESSFUL if asked is None or each in asked]
        narrowed = replace(search, selection=replace(search.selection, statuses=statuses))
        query = _IDS if search.object_id is None else _IDS_LOOKED_FOR
        return [row["event_id"] for row in await self._fetch(query, **narrowed.values(None), most=most)]

    async def hourly_counts(self, hours: int) -> HourlyCounts:
        """Those of the last `hours`, the running one included, by the database's clock; whole hours of UTC."""
        [clock] = await self._fetch(_NOW)
        running = clock["now"].astimezone(UTC).replace(minute=0, second=0, microsecond=0)
        counted: dict[datetime, dict[Status, int]] = {
            running - timedelta(hours=back): {} for back in reversed(range(hours))
        }
        # The instant as a value: of one that is yet to be computed the planner thinks that a third of all is later.
        for row in await self._fetch(_ARRIVALS, since=min(counted)):
            counted.setdefault(row["began_at"], {})[Status(row["status"])] = row["events"]
        return HourlyCounts(sorted(counted.items()))

    async def _fetch(self, query: Statement, **values: object) -> list[Any]:
        try:
            async with asyncio.timeout(STATEMENT_SECONDS + _FROZEN_SECONDS):  # a frozen server ends nothing
                return await super()._fetch(query, **values)
        except asyncpg.QueryCanceledError as error:
            raise StatementTimeout(f"ended after {STATEMENT_SECONDS} s") from error
