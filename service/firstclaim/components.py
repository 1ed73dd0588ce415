"""The composition root: the only place where pools, clients and loops are built, run and closed.

Guarantees: `assemble` opens nothing. Everything is closed in reverse order, within the time that is left of the
shutdown, after the work in flight has finished or been released.
"""

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial

from firstclaim.admin.ledger import QUEUE_SECONDS
from firstclaim.backoff import Backoff
from firstclaim.errors import ConfigurationError
from firstclaim.inbox.backlog import Backlog
from firstclaim.inbox.batch_dispatch import BatchDispatcher
from firstclaim.inbox.batch_ledger import BatchLedger
from firstclaim.inbox.claims import Claims
from firstclaim.inbox.dispatch import Dispatcher
from firstclaim.inbox.dispatch_limits import DispatchLimits
from firstclaim.inbox.duplicates import Duplicates
from firstclaim.inbox.lanes import Batches
from firstclaim.inbox.ledger import Ledger
from firstclaim.inbox.limits import Limits
from firstclaim.inbox.lock import Lock
from firstclaim.inbox.pauses import Pauses
from firstclaim.inbox.pipeline import Pipeline
from firstclaim.inbox.rate import Rate
from firstclaim.inbox.recovery import Recovery
from firstclaim.inbox.redis_cluster import lock_servers
from firstclaim.inbox.routes import Routes
from firstclaim.inbox.slots import Slots
from firstclaim.inbox.transaction_watch import TransactionWatch
from firstclaim.inbox.unawaited import detected
from firstclaim.inbox.work import Work
from firstclaim.notify.notifier import Notifier
from firstclaim.observability.recent import RecentRequests
from firstclaim.operations.search import PINS
from firstclaim.operations.stripe_objects import StripeObjects, faults
from firstclaim.postgres.epoch import Epoch
from firstclaim.postgres.handler_connections import HandlerConnections
from firstclaim.postgres.places import Places
from firstclaim.postgres.pool import Pool
from firstclaim.postgres.probe import Probe
from firstclaim.registry import Registry
from firstclaim.settings import ADMIN_CONNECTIONS, METRICS_CONNECTIONS, Settings
from firstclaim.shutdown import Shutdown
from firstclaim.web.metrics import PINS as METRICS_PINS

_STATEMENT_SHARE = 0.9  # of the timeout for Postgres
CLOSE_SECONDS = 2.0  # of the shutdown's time, reserved for releasing unfinished work and closing connections


@dataclass(frozen=True, slots=True)
class Components:
    """The long-lived objects of one process."""

    probe: Probe
    ingest: Pool
    handler_connections: HandlerConnections
    metrics_pool: Pool
    admin: Pool
    lock: Lock
    slots: Slots
    routes: Routes
    pauses: Pauses
    pipeline: Pipeline
    recovery: Recovery
    transaction_watch: TransactionWatch
    recent: RecentRequests | None  # for the admin page
    notifier: Notifier
    duplicates: Duplicates
    stripe_objects: StripeObjects | None  # for handlers with fresh=True

    @contextlib.asynccontextmanager
    async def running(self, shutdown: Shutdown) -> AsyncIterator[asyncio.Task[None]]:
        """Run recovery while the block runs. Then finish or release the work in flight, and close everything.

        Yields the task of recovery. Transactions are watched, and forgotten awaits detected, until the last handler has
        ended.
        """
        await self.pipeline.start()
        watching = asyncio.create_task(self.transaction_watch.run(), name="transaction_watch")
        recovering = asyncio.create_task(self.recovery.run(), name="recovery")
        sampling = asyncio.create_task(self._sample(), name="recent_requests")
        notifying = asyncio.create_task(self.notifier.run(), name="notifier")
        counting = asyncio.create_task(self.duplicates.run(), name="duplicates")
        try:
            with detected():
                try:
                    yield recovering
                finally:
                    recovering.cancel()
                    notifying.cancel()
                    await asyncio.wait({recovering, notifying})
                    await self.pipeline.drain(shutdown.remaining_seconds - CLOSE_SECONDS)
        finally:
            for task in (watching, sampling, counting):
                task.cancel()
            await asyncio.wait({watching, sampling, counting})
            if self.stripe_objects is not None:
                await self.stripe_objects.close()
            await self.lock.close()
            await self.handler_connections.close()
            await self.ingest.close()
            await self.metrics_pool.close()
            await self.admin.close()
            await self.probe.close()

    async def _sample(self) -> None:
        if self.recent is not None:
            await self.recent.run()


def assemble(settings: Settings, registry: Registry) -> Components:
    """Build everything from settings that name both stores. Opens nothing. Raises `ConfigurationError`."""
    if settings.database_url is None or settings.redis_url is None:
        raise ConfigurationError(["DATABASE_URL and REDIS_URL must both be set for the application itself"])
    if not settings.stripe_webhook_secrets:
        raise ConfigurationError(["STRIPE_WEBHOOK_SECRETS is missing: no delivery could be verified"])
    dsn = settings.database_url.get_secret_value()
    timeout = settings.postgres_timeout_seconds
    backoff = Backoff(settings.backoff_first_seconds, settings.backoff_most_seconds)
    epoch = Epoch(fresh_seconds=5 * settings.recovery_interval_seconds + 2 * timeout)
    probe = Probe(dsn, timeout_seconds=timeout)
    places = partial(Places, dsn, probe, timeout_seconds=timeout, schema=settings.schema_name)
    # The server ends a statement that waits (for a table's lock, say) before its client gives up the connection: else
    # each attempt would leave a backend behind. A handler's statements have a timeout of their own (see `HOLD`).
    ends = {"statement_timeout": f"{round(timeout * _STATEMENT_SHARE * 1000)}ms"}
    locks = {"lock_timeout": f"{round(timeout * 1000)}ms"}
    ingest = Pool(
        places(
            size=settings.ingest_connections,
            queue_seconds=settings.answer_budget_seconds,
            epoch=epoch,
            pins=ends | locks,
        )
    )
    handler_connections = HandlerConnections(places(size=settings.handler_slots, epoch=epoch, pins=ends))
    redis = lock_servers(
        settings.redis_url.get_secret_value(),
        timeout_seconds=settings.redis_timeout_seconds,
        breaker_seconds=settings.redis_breaker_seconds,
    )
    lock = Lock(
        redis,
        prefix=settings.redis_prefix,
        lock_ttl_seconds=settings.lock_ttl_seconds,
        marker_ttl_seconds=settings.marker_ttl_seconds,
    )
    ledger = Ledger(
        ingest,
        backoff,
        timeout_seconds=timeout,
        lease_seconds=settings.lease_seconds,
        give_up_seconds=settings.give_up_seconds,
        idle_in_transaction_seconds=settings.idle_in_transaction_seconds,
        max_abandoned=settings.abandoned_most,
        process=process_name(),
    )
    claims = Claims(lock, ledger, epoch, lock_ttl_seconds=settings.lock_ttl_seconds)
    slots = Slots(settings.handler_slots)
    watch = TransactionWatch(
        ingest,
        timeout_seconds=timeout,
        lease_seconds=settings.lease_seconds,
        first_backoff_seconds=settings.backoff_first_seconds,
    )
    times = DispatchLimits(
        deadline_seconds=settings.handler_deadline_seconds,
        lease_seconds=settings.lease_seconds,
        postgres_timeout_seconds=timeout,
        fetch_seconds=settings.fresh_timeout_seconds,
        idle_in_transaction_seconds=settings.idle_in_transaction_seconds,
    )
    objects = stripe_objects(settings, registry)
    fetch = None if objects is None else objects.fetch
    routes = Routes(registry, settings.livemode)
    dispatcher = Dispatcher(handler_connections, ledger, claims, slots, watch, backoff, times, registry.tasks, fetch)
    pauses = Pauses()
    backlog = partial(Backlog, ledger, pauses=pauses, interval_seconds=settings.recovery_interval_seconds)
    wanted = backlog(routes.wants)
    work, duplicates = Work(), Duplicates(ledger)
    batches = Batches(slots, work)
    for handler in registry:
        if handler.batch:
            own = backlog(partial(routes.wants_for, handler))
            batches.add(BatchDispatcher(handler, dispatcher, BatchLedger(ledger)), own)
    limits = Limits(dispatcher, slots, work, settings.schema_name)
    for handler in registry:
        own_backlog = partial(backlog, partial(routes.wants_limited, handler.options))
        limits.add(handler, own_backlog, partial(Rate, redis, settings.redis_prefix))
    limited = any(handler.options.limited for handler in registry)
    pipeline = Pipeline(
        claims,
        ledger,
        dispatcher,
        slots,
        routes,
        wanted,
        backlog(routes.wants_single) if limited or any(handler.batch for handler in registry) else wanted,
        backlog(routes.wants_unlimited) if limited else wanted,
        batches,
        limits,
        work,
        duplicates,
        pauses,
        budget_seconds=settings.answer_budget_seconds,
    )
    recovery = Recovery(
        pipeline,
        ledger,
        slots,
        epoch,
        interval_seconds=settings.recovery_interval_seconds,
        lease_seconds=settings.lease_seconds,
        batch=settings.handler_slots,
    )
    # The metrics and the admin page read with an epoch of their own: a read that times out must not cast doubt on the
    # markers of deliveries.
    reading = partial(places, epoch=Epoch(fresh_seconds=0), commits=False)
    metrics_pool = Pool(
        reading(size=METRICS_CONNECTIONS, queue_seconds=settings.answer_budget_seconds, pins=METRICS_PINS)
    )
    admin = Pool(reading(size=ADMIN_CONNECTIONS, queue_seconds=QUEUE_SECONDS, pins=PINS))
    recent = None if settings.admin_password is None else RecentRequests()
    return Components(
        probe,
        ingest,
        handler_connections,
        metrics_pool,
        admin,
        lock,
        slots,
        routes,
        pauses,
        pipeline,
        recovery,
        watch,
        recent,
        Notifier(ledger, settings.notify_url),
        duplicates,
        objects,
    )


def stripe_objects(settings: Settings, registry: Registry) -> StripeObjects | None:
    """What fetches objects for handlers with `fresh=True`; None without one. Raises `ConfigurationError`."""
    if faulty := faults(settings, registry):
        raise ConfigurationError(faulty)
    if not any(handler.fresh for handler in registry):
        return None
    timeout = settings.fresh_timeout_seconds
    return StripeObjects(settings.stripe_api_base, settings.api_keys, timeout_seconds=timeout)


def process_name() -> str:
    """This process, as rows and pages name it: `host:pid`."""
    return f"{socket.gethostname()}:{os.getpid()}"
