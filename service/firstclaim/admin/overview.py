"""The first page: counts, due events, the newest failures, and the health of the components.

Guarantees: it shows what is available. If Postgres is unreachable or a count takes too long, the page says so in that
place and shows the rest. The health checks are those of `/readyz`.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from starlette.responses import Response

from firstclaim.admin.chart import Chart, draw
from firstclaim.admin.ledger import AdminLedger
from firstclaim.admin.request import AdminRequest
from firstclaim.errors import LedgerUnavailable, StatementTimeout
from firstclaim.observability import metrics
from firstclaim.operations.queries import Backlog, EventRow, Selection
from firstclaim.operations.search import UNSUCCESSFUL, LedgerSearch, Search
from firstclaim.status import Status
from firstclaim.web.health import Health, HealthCheck

T = TypeVar("T")

_HOURS: Final = 24
_NEWEST: Final = 6


@dataclass(frozen=True, slots=True)
class _LedgerState:
    """What was read from the ledger. None: the query took too long."""

    backlog: Backlog | None
    counts: dict[Status, int] | None
    all_counted: bool
    chart: Chart | None
    unsuccessful: list[EventRow] | None


@dataclass(frozen=True, slots=True)
class _Component:
    """A component and its health."""

    name: str
    health: Health
    detail: str | None


class Overview:
    """The overview page. `process` is this process as the ledger names it (`host:pid`)."""

    def __init__(self, ledger: AdminLedger, checks: Sequence[HealthCheck], process: str) -> None:
        self._ledger = ledger
        self._checks = checks
        self._process = process

    async def show(self, request: AdminRequest) -> Response:
        """The current state of the ledger, the components and this process."""
        results, state = await asyncio.gather(
            asyncio.gather(*(check.run() for check in self._checks)), self._read_ledger()
        )
        return request.render(
            "overview.html",
            components=[
                _Component(check.name, finding.health, finding.detail)
                for check, (finding, _) in zip(self._checks, results, strict=True)
            ],
            ledger=state,
            hours=_HOURS,
            deliveries=metrics.totals("firstclaim_deliveries"),
            duplicates=metrics.totals("firstclaim_duplicates"),
            process=self._process,
        )

    async def _read_ledger(self) -> _LedgerState | None:
        """None if the ledger cannot be read."""
        try:
            async with self._ledger.connect() as ledger:
                return await _read(ledger)
        except LedgerUnavailable:
            return None


async def _read(ledger: LedgerSearch) -> _LedgerState:
    backlog = await _in_time(ledger.backlog)
    counts = await _in_time(lambda: ledger.count(Selection()))
    all_counted = counts is not None
    if counts is None:  # that counts all rows; unfinished and dead events can be counted by an index
        counts = await _in_time(ledger.count_open)
    hourly_counts = await _in_time(lambda: ledger.hourly_counts(_HOURS))
    newest = await _in_time(lambda: ledger.page(Search(Selection(statuses=UNSUCCESSFUL)), None, _NEWEST))
    return _LedgerState(
        backlog=backlog,
        counts=counts,
        all_counted=all_counted,
        chart=None if hourly_counts is None else draw(hourly_counts),
        unsuccessful=None if newest is None else newest.events,
    )


async def _in_time(query: Callable[[], Awaitable[T]]) -> T | None:
    try:
        return await query()
    except StatementTimeout:
        return None
