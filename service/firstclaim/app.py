"""The composition root: the only place where engines, clients and loops are built, started and closed.

Guarantees: nothing is opened at import or when the application is created. Everything is opened in the application's
lifespan, and closed in reverse order when the lifespan ends, within the time that is left of the shutdown.
"""

import asyncio
import contextlib
import gc
import os
import socket
import threading
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from functools import partial

from starlette.applications import Starlette
from starlette.routing import Route
from starlette.types import Lifespan

from firstclaim.admin.events import Events
from firstclaim.admin.ledger import QUEUE_SECONDS, AdminLedger
from firstclaim.admin.limits import LoginLimit
from firstclaim.admin.login import Login
from firstclaim.admin.overview import Overview
from firstclaim.admin.page import AdminPage
from firstclaim.admin.replay import Replay
from firstclaim.admin.session import Signer
from firstclaim.backoff import Backoff
from firstclaim.errors import ConfigurationError
from firstclaim.inbox.backlog import Backlog
from firstclaim.inbox.batch_attempt import BatchAttempt
from firstclaim.inbox.batch_dispatch import BatchDispatcher
from firstclaim.inbox.batch_ledger import BatchLedger
from firstclaim.inbox.claims import Claims
from firstclaim.inbox.dispatch import Dispatcher, DispatchLimits
from firstclaim.inbox.lanes import Batches
from firstclaim.inbox.ledger import Ledger
from firstclaim.inbox.lock import Lock, connect
from firstclaim.inbox.loop_watch import LoopWatch
from firstclaim.inbox.pipeline import Pipeline
from firstclaim.inbox.recovery import Recovery
from firstclaim.inbox.routes import Routes
from firstclaim.inbox.slots import Slots
from firstclaim.inbox.transaction_watch import TransactionWatch
from firstclaim.inbox.unawaited import detected
from firstclaim.observability import metrics, tracing
from firstclaim.observability.logging import configure
from firstclaim.operations.search import PINS
from firstclaim.passwords import Password
from firstclaim.postgres.epoch import Epoch
from firstclaim.postgres.handler_connections import HandlerConnections
from firstclaim.postgres.places import Places
from firstclaim.postgres.pool import Pool
from firstclaim.postgres.probe import Probe
from firstclaim.registry import Registry
from firstclaim.settings import ADMIN_CONNECTIONS, METRICS_CONNECTIONS, Settings
from firstclaim.shutdown import Shutdown, stop_with_supervisor
from firstclaim.web.application import Application
from firstclaim.web.health import HealthCheck, Liveness, Readiness
from firstclaim.web.metrics import PINS as METRICS_PINS
from firstclaim.web.metrics import MetricsEndpoint
from firstclaim.web.readiness_checks import readiness_checks
from firstclaim.web.webhook import Webhook

_STATEMENT_SHARE = 0.9  # of the timeout for Postgres
_CLOSE_SECONDS = 2.0  # of the shutdown's time, reserved for releasing unfinished work and closing connections


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
    pipeline: Pipeline
    recovery: Recovery
    transaction_watch: TransactionWatch

    @contextlib.asynccontextmanager
    async def running(self, shutdown: Shutdown) -> AsyncIterator[asyncio.Task[None]]:
        """Run recovery while the block runs. Then finish or release the work in flight, and close everything.

        Yields the task of recovery. Transactions are watched, and forgotten awaits detected, until the last handler has
        ended.
        """
        watching = asyncio.create_task(self.transaction_watch.run(), name="transaction_watch")
        recovering = asyncio.create_task(self.recovery.run(), name="recovery")
        try:
            with detected():
                try:
                    yield recovering
                finally:
                    recovering.cancel()
                    await asyncio.wait({recovering})
                    await self.pipeline.drain(shutdown.remaining_seconds - _CLOSE_SECONDS)
        finally:
            watching.cancel()
            await asyncio.wait({watching})
            await self.lock.close()
            await self.handler_connections.close()
            await self.ingest.close()
            await self.metrics_pool.close()
            await self.admin.close()
            await self.probe.close()


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
    lock = Lock(
        connect(settings.redis_url.get_secret_value(), timeout_seconds=settings.redis_timeout_seconds),
        prefix=settings.redis_prefix,
        lock_ttl_seconds=settings.lock_ttl_seconds,
        marker_ttl_seconds=settings.marker_ttl_seconds,
        breaker_seconds=settings.redis_breaker_seconds,
    )
    ledger = Ledger(
        ingest,
        backoff,
        timeout_seconds=timeout,
        lease_seconds=settings.lease_seconds,
        give_up_seconds=settings.give_up_seconds,
        idle_in_transaction_seconds=settings.idle_in_transaction_seconds,
        max_abandoned=settings.abandoned_most,
        process=_process(),
    )
    claims = Claims(lock, ledger, epoch, lock_ttl_seconds=settings.lock_ttl_seconds)
    slots = Slots(settings.handler_slots)
    watch = TransactionWatch(
        ingest,
        timeout_seconds=timeout,
        lease_seconds=settings.lease_seconds,
        first_backoff_seconds=settings.backoff_first_seconds,
    )
    limits = DispatchLimits(
        deadline_seconds=settings.handler_deadline_seconds,
        lease_seconds=settings.lease_seconds,
        postgres_timeout_seconds=timeout,
    )
    routes = Routes(registry, settings.livemode)
    dispatcher = Dispatcher(handler_connections, ledger, claims, slots, watch, backoff, limits)
    backlog = partial(
        Backlog,
        ledger,
        interval_seconds=settings.recovery_interval_seconds,
        leave_out_seconds=settings.lock_ttl_seconds,
    )
    batch_ledger = BatchLedger(
        ledger,
        lease_seconds=settings.lease_seconds,
        idle_in_transaction_seconds=settings.idle_in_transaction_seconds,
    )
    wanted = backlog(routes.wants)
    batches = Batches(slots)
    for handler in registry:
        if handler.batch:
            attempt = partial(
                BatchAttempt,
                handler_connections,
                ledger,
                watch,
                handler=handler,
                deadline_seconds=settings.handler_deadline_seconds,
                postgres_timeout_seconds=timeout,
                batch_ledger=batch_ledger,
            )
            batches.add(
                BatchDispatcher(
                    handler, dispatcher, batch_ledger, claims, slots, backoff, settings.lease_seconds, attempt
                ),
                backlog(partial(routes.wants_for, handler)),
            )
    pipeline = Pipeline(
        claims,
        ledger,
        dispatcher,
        slots,
        routes,
        wanted,
        backlog(routes.wants_single) if any(handler.batch for handler in registry) else wanted,
        batches,
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
    return Components(probe, ingest, handler_connections, metrics_pool, admin, lock, slots, pipeline, recovery, watch)


def admin_page(settings: Settings, components: Components, checks: Sequence[HealthCheck]) -> AdminPage | None:
    """The page at /admin, or None if it is switched off."""
    if settings.admin_password is None:
        return None
    password = Password.read(settings.admin_password.get_secret_value())
    signer, ledger = Signer(password.session_key), AdminLedger(components.admin)
    return AdminPage(
        signer,
        Login(password, signer, LoginLimit()),
        Overview(ledger, checks, _process()),
        Events(ledger),
        Replay(ledger, settings.give_up_seconds),
        settings.admin_proxies,
    )


def _process() -> str:
    return f"{socket.gethostname()}:{os.getpid()}"


@contextlib.asynccontextmanager
async def exporting_spans() -> AsyncIterator[None]:
    """Export spans while the block runs.

    At the end, sending the last spans may take half of `_CLOSE_SECONDS`, because the collector may be unreachable.
    """
    end = tracing.start()
    try:
        yield
    finally:
        ending = threading.Thread(target=end, daemon=True)
        ending.start()
        await asyncio.to_thread(ending.join, _CLOSE_SECONDS / 2)


def release_unstarted(settings: Settings, registry: Registry, pipeline: Pipeline) -> None:
    """After a crash: release the claims whose attempt had not begun, on an event loop and connections of its own.

    Without a charge, and in the time of a shutdown's end. Attempts that had begun are left alone: recovery finds them
    when their lease is over, and counts them as abandoned. One of them may have ended the process.
    """

    async def release() -> None:
        async with asyncio.timeout(_CLOSE_SECONDS):
            await assemble(settings, registry).pipeline.release_unstarted(claims)

    if claims := pipeline.unstarted:
        with contextlib.suppress(Exception):  # then recovery releases them
            asyncio.run(release())


def application(
    settings: Settings, components: Components, shutdown: Shutdown, lifespan: Lifespan[Starlette] | None = None
) -> Application:
    """All paths of the service, on these components. `lifespan` runs them, or the caller does."""
    webhook = Webhook(
        components.pipeline,
        [secret.get_secret_value() for secret in settings.stripe_webhook_secrets],
        settings.signature_tolerance_seconds,
        settings.body_most_bytes,
    )
    checks = readiness_checks(shutdown, components.lock, components.ingest, components.recovery, components.slots)
    readiness = Readiness(checks)
    site = admin_page(settings, components, checks)
    routes = [
        Route("/livez", Liveness(components.slots).report),
        Route("/readyz", readiness.report),
        Route(
            "/metrics",
            MetricsEndpoint(checks, components.metrics_pool, settings.workers * settings.handler_slots).report,
        ),
        *(site.routes if site else ()),
    ]
    return Application(webhook, routes, lifespan, webhook_path=settings.webhook_path, root_path=settings.root_path)


def create_app(settings: Settings, shutdown: Shutdown) -> Starlette:
    """The application for `settings`, which must name both stores. Raises `ConfigurationError`."""
    configure(settings.log_format, settings.log_level)
    registry = Registry.load(settings.handlers)
    components = assemble(settings, registry)
    for handler in registry:
        metrics.create_series(handler.pattern, batch=handler.batch)

    @contextlib.asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        shutdown.install()
        shutdown.started(partial(release_unstarted, settings, registry, components.pipeline))
        with stop_with_supervisor(), LoopWatch(lambda: components.transaction_watch.calls).running():
            async with exporting_spans(), components.running(shutdown):
                # Objects that exist now live as long as the process: exclude them from every later collection.
                gc.collect()
                gc.freeze()
                yield

    return application(settings, components, shutdown, lifespan)
