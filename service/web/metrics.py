"""GET /metrics: what was counted here, and how the ledger and the parts stand, in Prometheus' text format.

Guarantees: the parts are asked as `/readyz` asks them; the ledger is asked on a connection of its own, at most once in
`_BACKLOG_SECONDS` (its counts over all rows once in `_COUNTS_SECONDS`) however often the scrape comes, and given up on
after `_PATIENCE_SECONDS`. What could not be asked is left out, never told as it was: `firstclaim_up` says why.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Generic, TypeVar

import structlog
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.requests import Request
from starlette.responses import Response

from service import metrics
from service.errors import LedgerUnavailable
from service.inbox.inspection import Backlog, Inspection, Selection
from service.inbox.model import Status
from service.inbox.postgres import borrow, driver
from service.web.health import Health, Part

log = structlog.get_logger(__name__)

T = TypeVar("T")

_BACKLOG_SECONDS = 5.0
_COUNTS_SECONDS = 60.0  # counted row by row: a second over millions
_PATIENCE_SECONDS = 5.0  # half of a scrape's usual timeout


class _Kept(Generic[T]):
    """The answer to a question about the ledger, asked anew once it is older than `seconds`."""

    def __init__(self, engine: AsyncEngine, ask: Callable[[Inspection], Awaitable[T]], seconds: float) -> None:
        self._engine = engine
        self._ask = ask
        self._seconds = seconds
        self._asked_at = float("-inf")
        self._asking = asyncio.Lock()
        self._answer: T | None = None

    async def get(self) -> T | None:
        """None: the ledger cannot be asked."""
        async with self._asking:
            if time.monotonic() - self._asked_at > self._seconds:
                try:
                    async with borrow(self._engine, _PATIENCE_SECONDS) as connection:
                        self._answer = await self._ask(Inspection(driver(connection)))
                except LedgerUnavailable as error:
                    log.debug("ledger_not_counted", error=str(error))
                    self._answer = None
                self._asked_at = time.monotonic()
        return self._answer


class Metrics:
    """`/metrics`. `engine` is for these questions alone."""

    def __init__(self, parts: Sequence[Part], engine: AsyncEngine) -> None:
        self._parts = parts
        self._backlog = _Kept(engine, lambda inspection: inspection.backlog(), _BACKLOG_SECONDS)
        self._counts = _Kept(engine, lambda inspection: inspection.count(Selection()), _COUNTS_SECONDS)

    async def report(self, _request: Request) -> Response:
        """All of it, as it is now."""
        answers, backlog, counts = await asyncio.gather(
            asyncio.gather(*(part.ask() for part in self._parts)), self._backlog.get(), self._counts.get()
        )
        up = {part.name: finding.health for part, (finding, _) in zip(self._parts, answers, strict=True)}
        now = CollectorRegistry()
        now.register(_Now(up, backlog, counts))
        text = generate_latest(metrics.gathered()) + generate_latest(now)
        return Response(text, headers={"Cache-Control": "no-store", "Content-Type": CONTENT_TYPE_LATEST})


class _Now(Collector):
    """What is not counted but looked up."""

    def __init__(self, up: dict[str, Health], backlog: Backlog | None, counts: dict[Status, int] | None) -> None:
        self._up = up
        self._backlog = backlog
        self._counts = counts

    def collect(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("firstclaim_up", "Whether the part is well, as /readyz sees it.", labels=["part"])
        for part, health in self._up.items():
            up.add_metric([part], float(health is Health.OK))
        yield up
        if (backlog := self._backlog) is not None:
            for name, help_text, value in (
                ("firstclaim_due_events", "Events that are due and not yet taken up.", backlog.due),
                (
                    "firstclaim_oldest_due_seconds",
                    "How long the oldest of them has been due; 0: none is.",
                    backlog.oldest_due_seconds or 0,
                ),
                (
                    "firstclaim_past_their_lease",
                    "Claims past their lease that recovery has not yet given up on.",
                    backlog.past_their_lease,
                ),
            ):
                yield GaugeMetricFamily(name, help_text, value=value)
        if self._counts is not None:
            events = GaugeMetricFamily("firstclaim_events", "Events in the ledger.", labels=["status"])
            for status in Status:
                events.add_metric([status], self._counts.get(status, 0))
            yield events
