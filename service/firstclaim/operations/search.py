"""Search in the ledger, page by page, for a ledger of any size.

Guarantees: nothing here changes a row or waits for a lock. A page starts after the last event of the previous page, by
(received_at, event_id), so that new events do not shift it. A search that no index supports reads a limited number of
the newest events; its result says how far back it read, and where it can continue. On a connection with `PINS`,
Postgres uses one core for a statement, and ends it after `STATEMENT_SECONDS`.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Final

import asyncpg

from firstclaim.errors import StatementTimeout
from firstclaim.operations.audit import AuditQueries
from firstclaim.operations.commands import Commands
from firstclaim.operations.queries import COLUMNS, EventRow, event_row
from firstclaim.operations.selection import SELECTED, Selection
from firstclaim.operations.traffic import TrafficQueries
from firstclaim.postgres.statement import Statement, statement
from firstclaim.status import Status

STATEMENT_SECONDS: Final = 3  # a person waits no longer for a page, and deliveries share the server with it
PINS: Final[Mapping[str, str]] = {
    "statement_timeout": f"{STATEMENT_SECONDS}s",
    "max_parallel_workers_per_gather": "0",  # a heavy search has one core, and deliveries have the others
    "jit": "off",
    # A plan for the actual values: a generic plan does not use the index of failed and dead events.
    "plan_cache_mode": "force_custom_plan",
}
_FROZEN_SECONDS: Final = 1  # a frozen server ends no statement: this much later, we do
OBJECTS_MOST: Final = 500_000  # events read for an object's id: some tenths of a second
PAYLOADS_MOST: Final = 20_000  # payloads read for a customer's id: about as long, because they are compressed
UNSUCCESSFUL: Final = (Status.FAILED, Status.DEAD)

_NEWEST_FIRST = "ORDER BY e.received_at DESC, e.event_id DESC"
_FROM_CURSOR = f"""
  FROM firstclaim.stripe_events e
 WHERE {SELECTED}
   AND (CAST(:at AS timestamptz) IS NULL OR (e.received_at, e.event_id) < (CAST(:at AS timestamptz), :id))
 {_NEWEST_FIRST}
"""
# In addition to a `Selection`: the object's id, or a string in the payload. The string is compared as bytes, because
# `jsonb` refused seven of nine hostile but signed bodies. A scalar subquery reads the payload of one event at a time;
# for an EXISTS, the planner would build a hash of all payloads.
_MATCHES = """
       e.object_id = CAST(:object_id AS text)
    OR CAST(:in_payload AS bytea) IS NOT NULL
   AND position(CAST(:in_payload AS bytea) IN
                (SELECT p.body FROM firstclaim.stripe_event_payloads p WHERE p.event_id = e.event_id)) > 0
"""


def _newest(columns: str) -> Statement:
    """The newest events of a selection."""
    return statement(f"SELECT {columns} {_FROM_CURSOR} LIMIT :limit")


def _newest_matching(columns: str) -> Statement:
    """Those of the newest events of a selection that have the object or the string."""
    return statement(f"""
SELECT {columns} FROM (SELECT * {_FROM_CURSOR} LIMIT :scan_limit) e WHERE {_MATCHES} {_NEWEST_FIRST} LIMIT :limit
""")


_PAGE, _PAGE_MATCHING = _newest(COLUMNS), _newest_matching(COLUMNS)
_IDS, _IDS_MATCHING = _newest("event_id"), _newest_matching("event_id")
_LAST_SCANNED = statement(f"SELECT received_at, event_id {_FROM_CURSOR} OFFSET :scan_limit - 1 LIMIT 1")


@dataclass(frozen=True, slots=True)
class Cursor:
    """The position after an event in the list."""

    received_at: datetime
    event_id: str


@dataclass(frozen=True, slots=True)
class Search:
    """What to search for. `customer`: also search the payloads, for a string that equals `object_id`."""

    selection: Selection = field(default_factory=Selection)
    object_id: str | None = None
    customer: bool = False

    @property
    def scan_limit(self) -> int | None:
        """How many of the newest selected events are read; None if there is no object id to compare."""
        if self.object_id is None:
            return None
        return PAYLOADS_MOST if self.customer else OBJECTS_MOST

    def parameters(self, cursor: Cursor | None) -> dict[str, Any]:
        """The parameters of a statement that searches from `cursor` on."""
        return {
            **self.selection.parameters(),
            "at": None if cursor is None else cursor.received_at,
            "id": "" if cursor is None else cursor.event_id,
            "object_id": self.object_id,
            "in_payload": f'"{self.object_id}"'.encode() if self.customer else None,
            "scan_limit": self.scan_limit,
        }


@dataclass(frozen=True, slots=True)
class SearchPage:
    """A page of events, the newest first.

    `next_cursor`: where the next page starts, None if there is none. `scanned_until`: how far back the search read,
    None if it read to the end of the ledger, or if the page is full.
    """

    events: list[EventRow]
    next_cursor: Cursor | None
    scanned_until: datetime | None


class LedgerSearch(Commands, TrafficQueries, AuditQueries):
    """Queries of the admin page, on a connection with `PINS`. A query that takes too long is a `StatementTimeout`."""

    async def page(self, search: Search, cursor: Cursor | None, limit: int) -> SearchPage:
        """The newest events that match, at most `limit`, from `cursor` on; None: from the newest event on."""
        parameters = search.parameters(cursor)
        query = _PAGE if search.object_id is None else _PAGE_MATCHING
        rows = await self.fetch(query, **parameters, limit=limit + 1)
        events = [event_row(row) for row in rows[:limit]]
        if len(rows) > limit:
            return SearchPage(events, Cursor(events[-1].received_at, events[-1].event_id), None)
        if search.scan_limit is not None and (last := await self.fetch(_LAST_SCANNED, **parameters)):
            return SearchPage(events, Cursor(**last[0]), last[0]["received_at"])
        return SearchPage(events, None, None)

    async def replayable(self, search: Search, limit: int, among: Sequence[Status] = UNSUCCESSFUL) -> list[str]:
        """The ids of the events that match and are `among` these statuses, the newest first, at most `limit`."""
        wanted = search.selection.statuses
        statuses = [each for each in among if wanted is None or each in wanted]
        narrowed = replace(search, selection=replace(search.selection, statuses=statuses))
        query = _IDS if search.object_id is None else _IDS_MATCHING
        return [row["event_id"] for row in await self.fetch(query, **narrowed.parameters(None), limit=limit)]

    async def fetch(self, query: Statement, **values: object) -> list[Any]:
        """The rows of a statement. Raises `StatementTimeout`."""
        try:
            async with asyncio.timeout(STATEMENT_SECONDS + _FROZEN_SECONDS):
                return await super().fetch(query, **values)
        except asyncpg.QueryCanceledError as error:
            raise StatementTimeout(f"ended after {STATEMENT_SECONDS} s") from error
