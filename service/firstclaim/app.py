"""The composition root: the only place where engines, clients and loops are built, started and closed.

Guarantees: nothing opens at import, nor when the app is created: everything does in its lifespan, and is
closed in reverse when that ends, within what the stop leaves of its time.
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
from starlette.routing import BaseRoute, Route
from starlette.types import Lifespan, Receive, Scope, Send

from firstclaim.admin.events import Events
from firstclaim.admin.ledger import QUEUE_SECONDS, AdminLedger
from firstclaim.admin.limits import LoginLimit
from firstclaim.admin.login import Login
from firstclaim.admin.overview import Overview
from firstclaim.admin.page import AdminPage
from firstclaim.admin.replay import Replay
from firstclaim.admin.session import Seal
from firstclaim.backoff import Backoff
from firstclaim.errors import ConfigurationError
from firstclaim.inbox.claims import Claims
from firstclaim.inbox.dispatch import Dispatcher, DispatchLimits
from firstclaim.inbox.ledger import Ledger
from firstclaim.inbox.lock import Lock, connect
from firstclaim.inbox.pipeline import Pipeline
from firstclaim.inbox.recovery import Recovery
from firstclaim.observability import metrics, tracing
from firstclaim.observability.logging import configure
from firstclaim.operations.search import PINS
from firstclaim.passwords import Password
from firstclaim.postgres.connection import Epoch, Pool
from firstclaim.postgres.handler_connections import HandlerConnections
from firstclaim.registry import Registry
from firstclaim.settings import ADMIN_CONNECTIONS, OBSERVING_CONNECTIONS, Settings
from firstclaim.shutdown import Stop, stop_with_supervisor
from firstclaim.web.health import HealthCheck, Readiness, livez
from firstclaim.web.metrics import MetricsEndpoint
from firstclaim.web.readiness_checks import readiness_checks
from firstclaim.web.webhook import WEBHOOK_PATH, Webhook, refuse_path

_CLOSE_SECONDS = 2.0  # of the shutdown, kept back for releasing what is left and closing


@dataclass(frozen=True, slots=True)
class Components:
    """What one process runs on."""

    ingest: Pool
    seats: HandlerConnections
    observing: Pool
    admin: Pool
    lock: Lock
    pipeline: Pipeline
    recovery: Recovery

    @contextlib.asynccontextmanager
    async def running(self, stop: Stop) -> AsyncIterator[None]:
        """Recovery runs while the block does; then work in flight ends or is released, and all is closed."""
        recovering = asyncio.create_task(self.recovery.run(), name="recovery")
        try:
            yield
        finally:
            recovering.cancel()
            await asyncio.wait({recovering})
            await self.pipeline.drain(stop.remaining_seconds - _CLOSE_SECONDS)
            await self.lock.close()
            await self.seats.close()
            await self.ingest.close()
            await self.observing.close()
            await self.admin.close()


def assemble(settings: Settings, registry: Registry) -> Components:
    """Build everything from settings that name both stores; opens nothing. Raises `ConfigurationError`."""
    if settings.database_url is None or settings.redis_url is None:
        raise ConfigurationError(["DATABASE_URL and REDIS_URL must both be set for the application itself"])
    if not settings.stripe_webhook_secrets:
        raise ConfigurationError(["STRIPE_WEBHOOK_SECRETS is missing: nothing could be verified"])
    dsn = settings.database_url.get_secret_value()
    patience = settings.postgres_timeout_seconds
    backoff = Backoff(settings.backoff_first_seconds, settings.backoff_most_seconds)
    epoch = Epoch(fresh_seconds=5 * settings.recovery_interval_seconds + 2 * patience)
    queue = settings.answer_budget_seconds
    pool = partial(Pool, dsn, timeout_seconds=patience, queue_seconds=queue)
    ingest = pool(size=settings.ingest_connections, epoch=epoch)
    seats = HandlerConnections(
        dsn, size=settings.handler_slots, timeout_seconds=patience, queue_seconds=queue, epoch=epoch
    )
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
        timeout_seconds=patience,
        lease_seconds=settings.lease_seconds,
        give_up_seconds=settings.give_up_seconds,
        idle_in_transaction_seconds=settings.idle_in_transaction_seconds,
        abandoned_most=settings.abandoned_most,
        process=_process(),
    )
    claims = Claims(lock, ledger, epoch, settings.lock_ttl_seconds)
    limits = DispatchLimits(
        slots=settings.handler_slots,
        deadline_seconds=settings.handler_deadline_seconds,
        lease_seconds=settings.lease_seconds,
        postgres_timeout_seconds=patience,
    )
    pipeline = Pipeline(
        claims,
        Dispatcher(seats, ledger, claims, backoff, limits),
        registry,
        livemode=settings.livemode,
        budget_seconds=settings.answer_budget_seconds,
    )
    recovery = Recovery(
        pipeline,
        ledger,
        epoch,
        interval_seconds=settings.recovery_interval_seconds,
        batch=settings.handler_slots,
    )
    # Who only looks has an epoch of its own: a look that is given up must put no marker of a delivery's in doubt.
    apart = Epoch(fresh_seconds=0)
    observing = pool(size=OBSERVING_CONNECTIONS, epoch=apart)
    admin = pool(size=ADMIN_CONNECTIONS, queue_seconds=QUEUE_SECONDS, epoch=apart, pins=PINS)
    return Components(ingest, seats, observing, admin, lock, pipeline, recovery)


def admin_page(settings: Settings, parts: Components, probes: Sequence[HealthCheck]) -> AdminPage | None:
    """The page at /admin; None: it is switched off."""
    if settings.admin_password is None:
        return None
    password = Password.read(settings.admin_password.get_secret_value())
    seal, asking = Seal(password.session_key), AdminLedger(parts.admin)
    return AdminPage(
        seal,
        Login(password, seal, LoginLimit()),
        Overview(asking, probes, _process()),
        Events(asking),
        Replay(asking, settings.give_up_seconds),
        settings.admin_proxies,
    )


def _process() -> str:
    return f"{socket.gethostname()}:{os.getpid()}"


@contextlib.asynccontextmanager
async def exporting_spans() -> AsyncIterator[None]:
    """While the block runs; where they go gets a moment for the last ones, and no more: it may be away."""
    end = tracing.start()
    try:
        yield
    finally:
        ending = threading.Thread(target=end, daemon=True)
        ending.start()
        await asyncio.to_thread(ending.join, _CLOSE_SECONDS / 2)


class Application(Starlette):
    """Starlette's routes; but a delivery goes straight to the webhook, past layers that it has no use for.

    They took a sixth of what a duplicate costs. The webhook answers whatever happens in it, with errors of its own.
    """

    def __init__(self, webhook: Webhook, routes: Sequence[BaseRoute], lifespan: Lifespan[Starlette]) -> None:
        by_name = Route(WEBHOOK_PATH, webhook, methods=["POST"])  # for what does not go straight: 405, HEAD
        super().__init__(
            routes=[by_name, *routes], lifespan=lifespan, exception_handlers={404: refuse_path, 405: refuse_path}
        )
        self.router.redirect_slashes = False  # a redirect is a failed delivery to Stripe
        self._webhook = webhook

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, or the lifespan."""
        if scope["type"] == "http" and scope["path"] == WEBHOOK_PATH and scope["method"] == "POST":
            await self._webhook(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


def create_app(settings: Settings) -> Starlette:
    """The application for `settings`, which name both stores. Raises `ConfigurationError`."""
    configure(settings.log_format, settings.log_level)
    registry = Registry.load(settings.handlers)
    parts = assemble(settings, registry)
    for handler in registry:
        metrics.handler_seconds(handler.pattern)  # there from the start
    stop = Stop(settings.drain_seconds, settings.shutdown_seconds)

    @contextlib.asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        stop.install()
        with stop_with_supervisor():
            async with exporting_spans(), parts.running(stop):
                # What is loaded by now stays: the collector need not look through it again and again.
                gc.collect()
                gc.freeze()
                yield

    webhook = Webhook(
        parts.pipeline,
        [secret.get_secret_value() for secret in settings.stripe_webhook_secrets],
        settings.signature_tolerance_seconds,
        settings.body_most_bytes,
    )
    probes = readiness_checks(stop, parts.lock, parts.ingest, parts.recovery)
    readiness = Readiness(probes)
    site = admin_page(settings, parts, probes)
    routes = [
        Route("/livez", livez),
        Route("/readyz", readiness.report),
        Route("/metrics", MetricsEndpoint(probes, parts.observing).report),
        *(site.routes if site else ()),
    ]
    return Application(webhook, routes, lifespan)
