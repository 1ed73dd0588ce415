"""GET /metrics: what was counted here, and how the ledger and the parts stand, in Prometheus' text format.

Guarantees: the parts are asked as `/readyz` asks them; the ledger is asked on connections of its own, however often the
scrape comes: what is open once in `_OPEN_SECONDS`, what is settled (counted row by row) once in `_SETTLED_SECONDS`,
either for a twentieth of the time at most, and given up on after `_PATIENCE_SECONDS`. What could not be asked is left
out, never told as it was: `firstclaim_up` says why.
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
from starlette.requests import Request
from starlette.responses import Response

from firstclaim.errors import LedgerUnavailable
from firstclaim.observability import metrics
from firstclaim.operations.queries import Backlog, Queries, Selection
from firstclaim.postgres.connection import Pool
from firstclaim.status import Status
from firstclaim.web.health import Health, HealthCheck

log = structlog.get_logger(__name__)

T = TypeVar("T")

_SETTLED = (Status.COMPLETED, Status.IGNORED)
_OPEN = tuple(each for each in Status if each not in _SETTLED)

_OPEN_SECONDS = 5.0
_SETTLED_SECONDS = 60.0
_PAUSES = 20  # an answer is kept for so many times what it took
_PATIENCE_SECONDS = 5.0  # half of a scrape's usual timeout


class _Kept(Generic[T]):
    """The answer to a question about the ledger, asked anew after `seconds`, or later if it took long."""

    def __init__(self, pool: Pool, ask: Callable[[Queries], Awaitable[T]], seconds: float) -> None:
        self._pool = pool
        self._ask = ask
        self._seconds = seconds
        self._kept_until = float("-inf")
        self._asking = asyncio.Lock()
        self._answer: T | None = None

    async def get(self) -> T | None:
        """None: the ledger cannot be asked."""
        async with self._asking:
            if (began := time.monotonic()) > self._kept_until:
                try:
                    async with self._pool.borrow(_PATIENCE_SECONDS) as connection:
                        self._answer = await self._ask(Queries(connection))
                except LedgerUnavailable as error:
                    log.debug("ledger_not_counted", error=str(error))
                    self._answer = None
                now = time.monotonic()
                self._kept_until = now + max(self._seconds, _PAUSES * (now - began))
        return self._answer


async def _ask_open(inspection: Queries) -> tuple[Backlog, dict[Status, int]]:
    return await inspection.backlog(), await inspection.count_open()


class MetricsEndpoint:
    """`/metrics`. `pool` is for these questions alone."""

    def __init__(self, parts: Sequence[HealthCheck], pool: Pool) -> None:
        self._parts = parts
        self._open = _Kept(pool, _ask_open, _OPEN_SECONDS)
        self._settled = _Kept(pool, lambda inspection: inspection.count(Selection(statuses=_SETTLED)), _SETTLED_SECONDS)

    async def report(self, _request: Request) -> Response:
        """All of it, as it is now."""
        answers, opened, settled = await asyncio.gather(
            asyncio.gather(*(part.run() for part in self._parts)), self._open.get(), self._settled.get()
        )
        up = {part.name: finding.health for part, (finding, _) in zip(self._parts, answers, strict=True)}
        now = CollectorRegistry()
        backlog, counts = (None, None) if opened is None else opened
        told = {
            status: found.get(status, 0)
            for statuses, found in ((_OPEN, counts), (_SETTLED, settled))
            if found is not None
            for status in statuses
        }
        now.register(_Now(up, backlog, told))
        text = generate_latest(metrics.collected()) + generate_latest(now)
        return Response(text, headers={"Cache-Control": "no-store", "Content-Type": CONTENT_TYPE_LATEST})


class _Now(Collector):
    """What is not counted but looked up."""

    def __init__(self, up: dict[str, Health], backlog: Backlog | None, counts: dict[Status, int]) -> None:
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
        if self._counts:
            events = GaugeMetricFamily("firstclaim_events", "Events in the ledger.", labels=["status"])
            for status, number in self._counts.items():
                events.add_metric([status], number)
            yield events
