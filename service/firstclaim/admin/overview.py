"""The first page: what is wrong, when the last event came, how the handlers fare, and the health of the components.

Guarantees: it shows what is available. If Postgres is unreachable or a count takes too long, the page says so in that
place and shows the rest. What comes from the ledger holds for all workers and replicas; what a replica knows alone is
shown with its name. The health checks are those of `/readyz`. What was slow to read is kept for `_CACHE_FACTOR` times
as long as it took, so that pages which refresh themselves cost the database little, however many are open.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from starlette.responses import Response

from firstclaim.admin.chart import Chart, draw
from firstclaim.admin.findings import Component, Known, find
from firstclaim.admin.ledger import AdminLedger
from firstclaim.admin.ranges import NAMED, Range, as_text
from firstclaim.admin.request import AdminRequest
from firstclaim.errors import LedgerUnavailable, StatementTimeout
from firstclaim.inbox.pauses import Pauses
from firstclaim.inbox.routes import Routes
from firstclaim.observability import metrics
from firstclaim.observability.recent import RecentRequests
from firstclaim.operations.failure_groups import FailureGroup, Ungrouped
from firstclaim.operations.queries import Backlog, EventRow, Gaps
from firstclaim.operations.search import UNSUCCESSFUL, LedgerSearch, Search
from firstclaim.operations.selection import Selection
from firstclaim.operations.traffic import HandlerTraffic, Traffic
from firstclaim.status import Status
from firstclaim.web.health import HealthCheck

T = TypeVar("T")

_NEWEST: Final = 6
_GROUPS_MOST: Final = 10
_BUDGET_SECONDS: Final = 8.0  # for all statements: what has not been read by then is left out
_CACHE_FACTOR: Final = 20
_QUICK_SECONDS: Final = 0.25  # what takes less is read anew each time
_CACHED_MOST: Final = 8  # ranges


@dataclass(slots=True)
class _LedgerState:
    """What was read from the ledger. None: the query took too long, or there was no time left for it."""

    backlog: Backlog | None = None
    gaps: Gaps | None = None
    traffic: Traffic | None = None
    groups: list[FailureGroup] | None = None
    ungrouped: Ungrouped | None = None
    unsuccessful: list[EventRow] | None = None
    open_counts: dict[Status, int] | None = None
    counts: dict[Status, int] | None = None
    chart: Chart | None = None

    @property
    def unread(self) -> list[str]:
        """What the findings rest on and was not read, in words."""
        parts = {"handlers": self.traffic, "backlog": self.backlog, "time of the last event": self.gaps}
        return [name for name, part in parts.items() if part is None]

    def count(self, status: Status) -> int | None:
        """The number of events in that status. Completed and ignored ones take a count of all rows."""
        for counts in (self.counts, self.open_counts):
            if counts is not None and (counts is self.counts or status not in (Status.COMPLETED, Status.IGNORED)):
                return counts.get(status, 0)
        return None


class Overview:
    """The overview page. `process` is this process as the ledger names it (`host:pid`)."""

    def __init__(
        self,
        ledger: AdminLedger,
        checks: Sequence[HealthCheck],
        process: str,
        routes: Routes,
        pauses: Pauses,
        recent: RecentRequests,
    ) -> None:
        self._ledger = ledger
        self._checks = checks
        self._process = process
        self._routes = routes
        self._pauses = pauses
        self._recent = recent
        self._cache: dict[Range, tuple[float, _LedgerState]] = {}
        self._reading: dict[Range, asyncio.Task[_LedgerState | None]] = {}

    async def show(self, request: AdminRequest) -> Response:
        """The current state of the ledger, the components and this replica."""
        chosen = Range.of(*(request.query_value(name) for name in ("range", "since", "until")))
        results, state = await asyncio.gather(
            asyncio.gather(*(check.run() for check in self._checks)), self._read(chosen)
        )
        components = [
            Component(check.name, finding.health, finding.detail)
            for check, (finding, _) in zip(self._checks, results, strict=True)
        ]
        paused = sorted(self._pauses.patterns)
        known = Known(components, self._recent.read(), self._host, paused=paused)
        if state is not None:
            known = Known(
                components,
                known.requests,
                known.host,
                state.gaps,
                state.backlog,
                state.traffic.handlers if state.traffic else None,
                chosen.words,
                chosen.filters,
                state.count(Status.DEAD) or 0,
                paused,
                state.unread,
            )
        return request.render(
            "overview.html",
            findings=find(known, ledger_read=state is not None),
            components=components,
            ledger=state,
            requests=known.requests,
            rows=self._rows(state.traffic if state else None),
            names={handler.pattern: handler.name for handler in self._routes.registry},
            chosen=chosen,
            ranges=NAMED,
            as_text=as_text,
            deliveries=metrics.totals("firstclaim_deliveries"),
            duplicates=metrics.totals("firstclaim_duplicates"),
            host=self._host,
            process=self._process,
        )

    @property
    def _host(self) -> str:
        return self._process.rpartition(":")[0]

    def _rows(self, traffic: Traffic | None) -> list[HandlerTraffic]:
        """A row for each handler of this build, also those without events, the one that fails most first."""
        if traffic is None:
            return []
        found = {each.handler: each for each in traffic.handlers}
        rows = [found.pop(handler.pattern, HandlerTraffic(handler.pattern)) for handler in self._routes.registry]
        rows += found.values()
        return sorted(rows, key=lambda each: (each.handler is None, -each.unsuccessful, -each.events))

    def _handler_of(self, event_type: str, livemode: bool) -> str | None:
        handler = self._routes.handler_of(event_type, livemode)
        return None if handler is None else handler.pattern

    async def _read(self, chosen: Range) -> _LedgerState | None:
        """None if the ledger cannot be read. Pages that are loaded at the same time share one result."""
        expires_at, state = self._cache.get(chosen, (0.0, None))
        if state is not None and time.monotonic() < expires_at:
            return state
        if (reading := self._reading.get(chosen)) is None:
            reading = self._reading[chosen] = asyncio.create_task(self._read_and_keep(chosen))
            reading.add_done_callback(lambda _: self._reading.pop(chosen))
        return await asyncio.shield(reading)  # a browser that hangs up does not end it for the others

    async def _read_and_keep(self, chosen: Range) -> _LedgerState | None:
        began = time.monotonic()
        try:
            async with self._ledger.connect() as ledger:
                state = await self._read_ledger(ledger, chosen)
        except LedgerUnavailable:
            return None
        if (took := time.monotonic() - began) > _QUICK_SECONDS:
            kept = list(self._cache.items())[-_CACHED_MOST:]
            self._cache = {**dict(kept), chosen: (began + _CACHE_FACTOR * took, state)}
        return state

    async def _read_ledger(self, ledger: LedgerSearch, chosen: Range) -> _LedgerState:
        """In the order of what is missed most."""
        budget = _Budget()
        within = await budget.of(lambda: ledger.last(chosen.seconds)) if chosen.own is None else chosen.own
        state = _LedgerState()
        state.open_counts = await budget.of(ledger.count_open)
        state.backlog = await budget.of(ledger.backlog)
        state.gaps = await budget.of(ledger.gaps)
        state.groups = await budget.of(
            lambda: ledger.failure_groups(_GROUPS_MOST, newer_than_seconds=chosen.seconds_until_now)
        )
        state.ungrouped = await budget.of(ledger.ungrouped)
        newest = await budget.of(lambda: ledger.page(Search(Selection(statuses=UNSUCCESSFUL)), None, _NEWEST))
        state.unsuccessful = None if newest is None else newest.events
        if within is not None:
            state.traffic = await budget.of(lambda: ledger.traffic(within, self._handler_of, self._pauses.cover))
            counts = await budget.of(lambda: ledger.counts(within))
            state.chart = None if counts is None else draw(counts)
        state.counts = await budget.of(lambda: ledger.count(Selection()))
        return state


class _Budget:
    """The time for all statements of a page."""

    def __init__(self) -> None:
        self._ends_at = time.monotonic() + _BUDGET_SECONDS

    async def of(self, query: Callable[[], Awaitable[T]]) -> T | None:
        """The result; None if the statement took too long, or if no time is left."""
        if time.monotonic() > self._ends_at:
            return None
        try:
            return await query()
        except StatementTimeout:
            return None
