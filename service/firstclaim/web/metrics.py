"""GET /metrics: counters, health checks and the state of the ledger, in Prometheus' text format.

Guarantees: the health checks are those of `/readyz`. The ledger is read on connections of its own. The results are
cached, so the load does not depend on how often Prometheus scrapes: open events for `_OPEN_SECONDS`, settled events
(counted row by row) for `_SETTLED_SECONDS`, and each result for at least `_CACHE_FACTOR` times as long as its query
took. A query times out after `_TIMEOUT_SECONDS`. If the ledger cannot be read, its series are left out instead of
reported with old values, and `firstclaim_up` is 0 for the failed check.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Final, Generic, TypeVar

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
from firstclaim.postgres.pool import Pool
from firstclaim.status import Status
from firstclaim.web.health import Health, HealthCheck

log = structlog.get_logger(__name__)

T = TypeVar("T")

_SETTLED = (Status.COMPLETED, Status.IGNORED)
_OPEN = tuple(each for each in Status if each not in _SETTLED)

_OPEN_SECONDS = 5.0
_SETTLED_SECONDS = 60.0
_CACHE_FACTOR = 20  # a result is cached for at least this many times the duration of its query
_TIMEOUT_SECONDS = 5.0  # half of the usual timeout of a scrape
PINS: Final[Mapping[str, str]] = {"statement_timeout": "4500ms"}  # the server ends a count before we give it up


class _CachedQuery(Generic[T]):
    """The result of a query on the ledger, cached for `seconds`, or for longer if the query was slow."""

    def __init__(self, pool: Pool, query: Callable[[Queries], Awaitable[T]], seconds: float) -> None:
        self._pool = pool
        self._query = query
        self._seconds = seconds
        self._expires_at = float("-inf")
        self._lock = asyncio.Lock()
        self._result: T | None = None

    async def get(self) -> T | None:
        """The result, or None if the ledger cannot be read."""
        async with self._lock:
            if (began := time.monotonic()) > self._expires_at:
                try:
                    async with self._pool.acquire(_TIMEOUT_SECONDS) as connection:
                        self._result = await self._query(Queries(connection))
                except LedgerUnavailable as error:
                    log.debug("ledger_not_counted", error=str(error))
                    self._result = None
                now = time.monotonic()
                self._expires_at = now + max(self._seconds, _CACHE_FACTOR * (now - began))
        return self._result


async def _read_open(queries: Queries) -> tuple[Backlog, dict[Status, int]]:
    return await queries.backlog(), await queries.count_open()


async def _read_settled(queries: Queries) -> dict[Status, int]:
    return await queries.count(Selection(statuses=_SETTLED))


class MetricsEndpoint:
    """`/metrics`. `pool` is used for these queries only. `slots`: those of all workers."""

    def __init__(self, checks: Sequence[HealthCheck], pool: Pool, slots: int) -> None:
        self._checks = checks
        self._slots = slots
        self._open = _CachedQuery(pool, _read_open, _OPEN_SECONDS)
        self._settled = _CachedQuery(pool, _read_settled, _SETTLED_SECONDS)

    async def report(self, _request: Request) -> Response:
        """All metrics."""
        results, opened, settled = await asyncio.gather(
            asyncio.gather(*(check.run() for check in self._checks)), self._open.get(), self._settled.get()
        )
        up = {check.name: finding.health for check, (finding, _) in zip(self._checks, results, strict=True)}
        backlog, open_counts = (None, None) if opened is None else opened
        by_status = {
            status: counts.get(status, 0)
            for statuses, counts in ((_OPEN, open_counts), (_SETTLED, settled))
            if counts is not None
            for status in statuses
        }
        gauges = CollectorRegistry()
        gauges.register(_Gauges(self._slots, up, backlog, by_status))
        text = generate_latest(metrics.collected()) + generate_latest(gauges)
        return Response(text, headers={"Cache-Control": "no-store", "Content-Type": CONTENT_TYPE_LATEST})


class _Gauges(Collector):
    """The values that are read at the time of the scrape."""

    def __init__(self, slots: int, up: dict[str, Health], backlog: Backlog | None, counts: dict[Status, int]) -> None:
        self._slots = slots
        self._up = up
        self._backlog = backlog
        self._counts = counts

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(
            "firstclaim_handler_slots", "Handlers that can run at once, in all workers.", value=self._slots
        )
        up = GaugeMetricFamily("firstclaim_up", "1 if the health check of /readyz passes, else 0.", labels=["part"])
        for check, health in self._up.items():
            up.add_metric([check], float(health is Health.OK))
        yield up
        if (backlog := self._backlog) is not None:
            for name, help_text, value in (
                ("firstclaim_due_events", "Events that are due and not yet taken over.", backlog.due),
                (
                    "firstclaim_oldest_due_seconds",
                    "How long the oldest due event has been due; 0 if none is due.",
                    backlog.oldest_due_seconds or 0,
                ),
                (
                    "firstclaim_past_their_lease",
                    "Claims past their lease that recovery has not yet marked as abandoned.",
                    backlog.past_their_lease,
                ),
            ):
                yield GaugeMetricFamily(name, help_text, value=value)
        if self._counts:
            events = GaugeMetricFamily("firstclaim_events", "Events in the ledger.", labels=["status"])
            for status, number in self._counts.items():
                events.add_metric([status], number)
            yield events
