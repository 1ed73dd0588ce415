"""GET /metrics: counters, health checks and the state of the ledger, in Prometheus' text format.

Guarantees: the health checks are those of `/readyz`. The ledger is read on connections of its own. The results are
cached, so the load does not depend on how often Prometheus scrapes: open events for `_OPEN_SECONDS`, settled events
(counted row by row) for `_SETTLED_SECONDS`, and each result for at least `_CACHE_FACTOR` times as long as its query
took. A query times out after `_TIMEOUT_SECONDS`. If the ledger cannot be read, its series are left out instead of
reported with old values, and `firstclaim_up` is 0 for the failed check.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final, Generic, TypeVar

import structlog
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.requests import Request
from starlette.responses import Response

from firstclaim.errors import LedgerUnavailable
from firstclaim.inbox.pauses import Pauses
from firstclaim.inbox.routes import Routes
from firstclaim.observability import metrics
from firstclaim.operations.queries import Queries
from firstclaim.operations.selection import Selection
from firstclaim.postgres.pool import Pool
from firstclaim.status import Status
from firstclaim.web.gauges import Gauges, LedgerReading, Unfinished
from firstclaim.web.health import HealthCheck

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


async def _read_unfinished(queries: Queries) -> tuple[Unfinished, dict[Status, int]]:
    return Unfinished(await queries.backlog(), await queries.oldest_due()), await queries.count_open()


async def _read_settled(queries: Queries) -> dict[Status, int]:
    return await queries.count(Selection(statuses=_SETTLED))


class MetricsEndpoint:
    """`/metrics`. `pool` is used for these queries only. `slots`: those of all workers."""

    def __init__(self, checks: Sequence[HealthCheck], pool: Pool, slots: int, routes: Routes, pauses: Pauses) -> None:
        self._checks = checks
        self._slots = slots
        self._routes = routes
        self._pauses = pauses
        self._open = _CachedQuery(pool, _read_unfinished, _OPEN_SECONDS)
        self._settled = _CachedQuery(pool, _read_settled, _SETTLED_SECONDS)
        self._gaps = _CachedQuery(pool, Queries.gaps, _OPEN_SECONDS)

    async def report(self, _request: Request) -> Response:
        """All metrics."""
        gauges = CollectorRegistry()
        gauges.register(await self.read())
        text = generate_latest(metrics.collected()) + generate_latest(gauges)
        return Response(text, headers={"Cache-Control": "no-store", "Content-Type": CONTENT_TYPE_LATEST})

    async def read(self) -> Gauges:
        """The current values of all metrics that are not counters."""
        results, opened, settled, gaps = await asyncio.gather(
            asyncio.gather(*(check.run() for check in self._checks)),
            self._open.get(),
            self._settled.get(),
            self._gaps.get(),
        )
        up = {check.name: finding.health for check, (finding, _) in zip(self._checks, results, strict=True)}
        unfinished, open_counts = (None, None) if opened is None else opened
        by_status = {
            status: counts.get(status, 0)
            for statuses, counts in ((_OPEN, open_counts), (_SETTLED, settled))
            if counts is not None
            for status in statuses
        }
        return Gauges(self._slots, up, self._routes, self._pauses, LedgerReading(unfinished, by_status, gaps))
