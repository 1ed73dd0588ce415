"""The composition root: the only place where engines, clients and loops are built, started and stopped.

Guarantees: nothing opens at import; what was opened is closed in reverse. A stop goes in this order: SIGTERM
turns `/readyz` to 503, the drain delay passes with everything still served, the server stops accepting, work
in flight ends or is released uncharged, connections close; all of it within `shutdown_seconds`.
"""

import asyncio
import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from types import FrameType

import structlog
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from service.errors import ConfigurationError, Rejected
from service.inbox.claims import Claims
from service.inbox.dispatch import Dispatcher, DispatchLimits
from service.inbox.ledger import Ledger
from service.inbox.lock import Lock, connect
from service.inbox.pipeline import Pipeline
from service.inbox.postgres import Epoch, borrow, create_engine, driver
from service.inbox.recovery import Recovery
from service.inbox.retry import Backoff
from service.inbox.schema import SchemaState, compare, outdated, read_version
from service.logs import configure
from service.registry import Registry
from service.settings import Settings
from service.web.health import Finding, Health, Part, Readiness, livez
from service.web.webhook import Webhook, rejection

log = structlog.get_logger(__name__)

WEBHOOK_PATH = "/webhooks/stripe"
_CLOSE_SECONDS = 2.0  # kept back from the shutdown for releasing and closing
_RECOVERY_ROUNDS_MISSED = 10  # how many intervals without a good round until /readyz says so


@dataclass(slots=True)
class Stop:
    """When and how far this process is stopping."""

    drain_seconds: float
    asked_at: float | None = None
    _previous: dict[int, object] = field(default_factory=dict)

    @property
    def asked(self) -> bool:
        return self.asked_at is not None

    def install(self) -> None:
        """Put the drain delay before what the server does on SIGTERM and SIGINT."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            previous = signal.getsignal(number)
            self._previous[number] = previous

            def begin(signum: int, frame: FrameType | None, previous: object = previous) -> None:
                again = self.asked
                if not again:
                    self.asked_at = time.monotonic()
                delay = 0 if again else self.drain_seconds
                if callable(previous):
                    loop.call_soon_threadsafe(loop.call_later, delay, previous, signum, frame)

            with contextlib.suppress(ValueError):  # not the main thread: an application embedding the app
                signal.signal(number, begin)

    def remaining(self, shutdown_seconds: float) -> float:
        """Seconds left of the shutdown."""
        spent = 0.0 if self.asked_at is None else time.monotonic() - self.asked_at
        return max(0.0, shutdown_seconds - spent)


def create_app(settings: Settings) -> Starlette:
    """The application for `settings`, which name both stores. Raises `ConfigurationError`."""
    if settings.database_url is None or settings.redis_url is None:
        raise ConfigurationError(["DATABASE_URL and REDIS_URL must both be set for the application itself"])
    configure(settings.log_format, settings.log_level)
    registry = Registry.load(settings.handlers)
    dsn, redis_url = settings.database_url.get_secret_value(), settings.redis_url.get_secret_value()

    epoch = Epoch(fresh_seconds=5 * settings.recovery_interval_seconds + 2 * settings.postgres_timeout_seconds)
    ingest = create_engine(
        dsn,
        size=settings.ingest_connections,
        timeout_seconds=settings.postgres_timeout_seconds,
        epoch=epoch,
        autocommit=True,
    )
    handlers = create_engine(
        dsn, size=settings.handler_slots, timeout_seconds=settings.postgres_timeout_seconds, epoch=epoch
    )
    lock = Lock(
        connect(redis_url, timeout_seconds=settings.redis_timeout_seconds),
        prefix=settings.redis_prefix,
        lock_ttl_seconds=settings.lock_ttl_seconds,
        marker_ttl_seconds=settings.marker_ttl_seconds,
        breaker_seconds=settings.redis_breaker_seconds,
    )
    ledger = Ledger(
        ingest,
        timeout_seconds=settings.postgres_timeout_seconds,
        lease_seconds=settings.lease_seconds,
        give_up_seconds=settings.give_up_seconds,
        idle_in_transaction_seconds=settings.idle_in_transaction_seconds,
        abandoned_most=settings.abandoned_most,
        backoff_first_seconds=settings.backoff_first_seconds,
        backoff_most_seconds=settings.backoff_most_seconds,
    )
    claims = Claims(lock, ledger, epoch, settings.lock_ttl_seconds)
    dispatcher = Dispatcher(
        handlers,
        ledger,
        claims,
        Backoff(settings.backoff_first_seconds, settings.backoff_most_seconds),
        DispatchLimits(
            slots=settings.handler_slots,
            deadline_seconds=settings.handler_deadline_seconds,
            lease_seconds=settings.lease_seconds,
            postgres_timeout_seconds=settings.postgres_timeout_seconds,
        ),
    )
    pipeline = Pipeline(
        claims,
        dispatcher,
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
    stop = Stop(settings.drain_seconds)

    async def ask_service() -> Finding:
        return Finding(Health.DOWN, "draining") if stop.asked else Finding(Health.OK)

    async def ask_redis() -> Finding:
        await lock.ping()
        return Finding(Health.OK)

    async def ask_postgres() -> Finding:
        async with borrow(ingest, settings.postgres_timeout_seconds) as connection:
            await driver(connection).fetchval("SELECT 1")
        return Finding(Health.OK)

    async def ask_schema() -> Finding:
        async with borrow(ingest, settings.postgres_timeout_seconds) as connection:
            version = await read_version(driver(connection))
        if compare(version) is SchemaState.OUTDATED:
            return Finding(Health.DOWN, str(outdated(version)))
        return Finding(Health.OK, version)

    async def ask_recovery() -> Finding:
        idle = recovery.idle_seconds
        well = idle < _RECOVERY_ROUNDS_MISSED * settings.recovery_interval_seconds + settings.postgres_timeout_seconds
        return Finding(Health.OK if well else Health.DOWN, f"last good round {idle:.1f} s ago")

    @contextlib.asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        stop.install()
        with _leave_with_parent():
            loop_task = asyncio.create_task(recovery.run(), name="recovery")
            try:
                yield
            finally:
                loop_task.cancel()
                await asyncio.wait({loop_task})
                await pipeline.drain(stop.remaining(settings.shutdown_seconds) - _CLOSE_SECONDS)
                await lock.close()
                await handlers.dispose()
                await ingest.dispose()

    webhook = Webhook(
        pipeline,
        [secret.get_secret_value() for secret in settings.stripe_webhook_secrets],
        settings.signature_tolerance_seconds,
        settings.body_most_bytes,
        settings.body_timeout_seconds,
    )
    readiness = Readiness(
        [
            Part("service", ask_service),
            Part("redis", ask_redis, failing=Health.DEGRADED),
            Part("postgres", ask_postgres),
            Part("schema", ask_schema),
            Part("recovery", ask_recovery),
        ]
    )
    app = Starlette(
        routes=[
            Route(WEBHOOK_PATH, webhook.__call__, methods=["POST"]),
            Route("/livez", livez),
            Route("/readyz", readiness.__call__),
        ],
        lifespan=lifespan,
        exception_handlers={HTTPException: _no_such_place},
    )
    app.router.redirect_slashes = False  # a redirect is a failed delivery to Stripe
    return app


async def _no_such_place(_request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    reason = {404: f"No such path; webhooks go to POST {WEBHOOK_PATH}", 405: "Method not allowed"}.get(status)
    response = rejection(Rejected("path", reason or "Refused", status))
    response.headers.update(getattr(error, "headers", None) or {})
    return response


@contextlib.contextmanager
def _leave_with_parent() -> Iterator[None]:
    """A worker whose supervisor was killed stops by itself: nobody else would ever stop it."""
    parent = multiprocessing.parent_process()
    if parent is None:
        yield
        return
    loop = asyncio.get_running_loop()

    def left() -> None:
        loop.remove_reader(parent.sentinel)
        log.warning("supervisor_vanished")
        os.kill(os.getpid(), signal.SIGTERM)

    loop.add_reader(parent.sentinel, left)
    try:
        yield
    finally:
        loop.remove_reader(parent.sentinel)
