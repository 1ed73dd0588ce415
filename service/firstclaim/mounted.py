"""The service inside an application of the user's: `firstclaim.asgi`, to be mounted at any path.

Guarantees: a delivery is accepted only while the lifespan runs, on its own event loop, with a recovery loop that has
not ended. Otherwise it is answered 503, and Stripe sends it again: an application that mounts another one usually does
not run that one's lifespan, and without it an event could be recorded that nobody finishes. The lifespan makes the
checks of `serve`, and does not start where one of them is fatal.

The process stays the user's: no signal handler, no thread, no set-up of logging, no change of its limits or its garbage
collector. Of Python's warnings, those of a coroutine that was never awaited are switched on while the lifespan runs:
a handler that forgot an `await` must not complete its event.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

import structlog
from starlette.applications import Starlette
from starlette.types import Receive, Scope, Send

from firstclaim import outcome
from firstclaim.app import application, create_series
from firstclaim.components import assemble
from firstclaim.observability.logging import configure_embedded
from firstclaim.registry import Registry
from firstclaim.server.check import Verdict
from firstclaim.server.preflight import check_postgres, raise_if_fatal
from firstclaim.server.redis_check import check_redis
from firstclaim.settings import Settings, load_settings
from firstclaim.shutdown import Shutdown
from firstclaim.web.answers import answer

log = structlog.get_logger(__name__)

_NOT_RUNNING = (
    "firstclaim does not run here: the application that mounts it must run its lifespan "
    "(async with webhooks.lifespan(): yield)"
)
_OTHER_LOOP = "firstclaim runs on another event loop than this request"
_ENDED = "firstclaim's recovery has ended in this process: restart it"


@dataclass(frozen=True, slots=True)
class _Running:
    """What there is while the lifespan runs: the task that finishes what was accepted, and what accepts it."""

    recovery: asyncio.Task[None]
    paths: Starlette


class MountedApp:
    """An ASGI application. Mount it, and run `lifespan` from the lifespan of the application that mounts it.

    A server can also serve it by itself: then it runs its lifespan as the server asks it to.
    """

    def __init__(self, settings: Settings) -> None:
        """Load the handlers and check the settings; opens nothing. Raises `ConfigurationError`."""
        self._settings = settings
        self._registry = Registry.load(settings.handlers, settings)
        assemble(settings, self._registry)
        self._lifespans = Starlette(lifespan=lambda _: self.lifespan())
        self._entered = False
        self._warned = False
        self._running: _Running | None = None

    @contextlib.asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        """Receive deliveries and run recovery while the block runs; then finish or release the work in flight.

        The end takes as long as the handlers that run, and at most `FIRSTCLAIM_SHUTDOWN_SECONDS`. May be entered
        again after it has ended, not before. Raises `StoreUnsuitable` if a check fails without which `serve` would
        not start: an unreachable or read-only Postgres, a missing migration, a transaction-mode pooler.
        """
        if self._entered:
            raise RuntimeError("this lifespan runs already: one application of the process enters it, and once")
        self._entered = True
        try:
            configure_embedded()
            await self._check()
            components = assemble(self._settings, self._registry)
            create_series(self._settings, self._registry)
            shutdown = Shutdown(0, self._settings.shutdown_seconds)
            async with components.running(shutdown) as recovery:
                self._running = _Running(recovery, application(self._settings, components, shutdown))
                yield
        finally:
            self._running = None
            self._entered = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or the lifespan if the server asks for it."""
        if scope["type"] == "lifespan":
            await self._lifespans(scope, receive, send)
        elif isinstance(target := self._target(), Starlette):
            await target(scope, receive, send)
        elif scope["type"] == "http":
            self._warn(target)
            await answer(None, outcome.unavailable(target))(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1013})

    def _target(self) -> Starlette | str:
        """The running application, or the reason why nothing may be accepted now."""
        if self._running is None:
            return _NOT_RUNNING
        if self._running.recovery.get_loop() is not asyncio.get_running_loop():
            return _OTHER_LOOP
        return _ENDED if self._running.recovery.done() else self._running.paths

    def _warn(self, reason: str) -> None:
        if not self._warned:  # once, not for each retry of Stripe's
            self._warned = True
            log.error("not_accepting", reason=reason)

    async def _check(self) -> None:
        checks = [check async for check in check_postgres(self._settings, wait=True)]
        checks += [check async for check in check_redis(self._settings)]
        raise_if_fatal(checks)
        for check in checks:
            if check.verdict is not Verdict.OK:
                log.warning("start_check", check=check.name, detail=check.detail)


def asgi(settings: Settings | None = None) -> MountedApp:
    """The service as an ASGI application, to be mounted. `settings`: by default those of the environment.

    Raises `ConfigurationError` with all faults: of the settings, of the handler modules, and if an address is missing.
    """
    if not isinstance(settings, Settings | None):
        raise TypeError(f"asgi: expected firstclaim.Settings(...), or nothing, got {type(settings).__name__}")
    return MountedApp(load_settings() if settings is None else settings)
