"""The first page: how much there is, what waits for whom, and how the parts are.

Guarantees: it shows what can be known. Where Postgres is away, or a count takes too long, it says so in that place and
shows the rest; the parts are asked as `/readyz` asks them.
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
from firstclaim.web.health import Finding, Health, HealthCheck

T = TypeVar("T")

_HOURS: Final = 24
_NEWEST: Final = 6


@dataclass(frozen=True, slots=True)
class _Known:
    """What the ledger told; None: it took too long."""

    backlog: Backlog | None
    counts: dict[Status, int] | None
    all_counted: bool
    chart: Chart | None
    unsuccessful: list[EventRow] | None


@dataclass(frozen=True, slots=True)
class _Standing:
    """A part and how it is."""

    name: str
    health: Health
    detail: str | None


class Overview:
    """`process` is who answers, as the ledger knows it (`host:pid`)."""

    def __init__(self, asking: AdminLedger, parts: Sequence[HealthCheck], process: str) -> None:
        self._asking = asking
        self._parts = parts
        self._process = process

    async def show(self, visit: AdminRequest) -> Response:
        """All of it, as it is now."""
        found, known = await asyncio.gather(asyncio.gather(*(part.run() for part in self._parts)), self._ask())
        return visit.page(
            "overview.html",
            parts=[self._standing(part, finding) for part, (finding, _) in zip(self._parts, found, strict=True)],
            known=known,
            hours=_HOURS,
            deliveries=metrics.totals("firstclaim_deliveries"),
            duplicates=metrics.totals("firstclaim_duplicates"),
            process=self._process,
        )

    async def _ask(self) -> _Known | None:
        """None: Postgres is away."""
        try:
            async with self._asking.ledger() as ledger:
                return await _all_of(ledger)
        except LedgerUnavailable:
            return None

    @staticmethod
    def _standing(part: HealthCheck, finding: Finding) -> _Standing:
        return _Standing(part.name, finding.health, finding.detail)


async def _all_of(ledger: LedgerSearch) -> _Known:
    backlog = await _in_time(ledger.backlog)
    counts = await _in_time(lambda: ledger.count(Selection()))
    all_counted = counts is not None
    if counts is None:  # over all rows; those that matter most an index can count
        counts = await _in_time(ledger.count_open)
    arrivals = await _in_time(lambda: ledger.hourly_counts(_HOURS))
    newest = await _in_time(lambda: ledger.page(Search(Selection(statuses=UNSUCCESSFUL)), None, _NEWEST))
    return _Known(
        backlog=backlog,
        counts=counts,
        all_counted=all_counted,
        chart=None if arrivals is None else draw(arrivals),
        unsuccessful=None if newest is None else newest.events,
    )


async def _in_time(ask: Callable[[], Awaitable[T]]) -> T | None:
    try:
        return await ask()
    except StatementTimeout:
        return None
