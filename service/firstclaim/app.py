"""The application: its paths, on the components of this process, and its lifespan, which runs them.

Guarantees: nothing is opened at import or when the application is created. Everything is opened in the application's
lifespan, and closed when the lifespan ends, within the time that is left of the shutdown.
"""

import asyncio
import contextlib
import gc
import threading
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from functools import partial

from prometheus_client.metrics_core import Metric
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.types import Lifespan

from firstclaim.admin.composition import compose
from firstclaim.admin.page import AdminPage
from firstclaim.components import CLOSE_SECONDS, Components, assemble, process_name
from firstclaim.inbox.loop_watch import LoopWatch
from firstclaim.inbox.pipeline import Pipeline
from firstclaim.observability import metrics, metrics_export, tracing
from firstclaim.observability.logging import configure
from firstclaim.registry import Registry
from firstclaim.settings import Settings
from firstclaim.shutdown import Shutdown, stop_with_supervisor
from firstclaim.web.application import Application
from firstclaim.web.health import HealthCheck, Liveness, Readiness
from firstclaim.web.metrics import MetricsEndpoint
from firstclaim.web.readiness_checks import readiness_checks
from firstclaim.web.webhook import Webhook


def admin_page(settings: Settings, components: Components, checks: Sequence[HealthCheck]) -> AdminPage | None:
    """The page at /admin, or None if it is switched off."""
    return compose(
        settings, components.admin, checks, components.routes, components.pauses, components.recent, process_name()
    )


def create_series(settings: Settings, registry: Registry) -> None:
    """Create the series of all handlers and endpoints: an alert on their increase notices the first event."""
    for handler in registry:
        _ = handler.metrics
    for name in settings.endpoints:
        metrics.endpoint_requests(name)


@contextlib.asynccontextmanager
async def exporting(endpoint: MetricsEndpoint) -> AsyncIterator[None]:
    """Export spans, and the metrics of `endpoint`, while the block runs.

    At the end, sending the last ones may take half of `CLOSE_SECONDS`, because the collector may be unreachable.
    """
    loop = asyncio.get_running_loop()

    def read(seconds: float) -> Iterable[Metric]:
        return asyncio.run_coroutine_threadsafe(endpoint.read(), loop).result(seconds).collect()

    endings = [threading.Thread(target=end, daemon=True) for end in (tracing.start(), metrics_export.start(read))]
    try:
        yield
    finally:
        ends_at = time.monotonic() + CLOSE_SECONDS / 2
        for ending in endings:
            ending.start()
        for ending in endings:
            await asyncio.to_thread(ending.join, max(0, ends_at - time.monotonic()))


def release_unstarted(settings: Settings, registry: Registry, pipeline: Pipeline) -> None:
    """After a crash: release the claims whose attempt had not begun, on an event loop and connections of its own.

    Without a charge, and in the time of a shutdown's end. Attempts that had begun are left alone: recovery finds them
    when their lease is over, and counts them as abandoned. One of them may have ended the process.
    """

    async def release() -> None:
        async with asyncio.timeout(CLOSE_SECONDS):
            await assemble(settings, registry).pipeline.release_unstarted(claims)

    if claims := pipeline.unstarted:
        with contextlib.suppress(Exception):  # then recovery releases them
            asyncio.run(release())


def application(
    settings: Settings, components: Components, shutdown: Shutdown, lifespan: Lifespan[Starlette] | None = None
) -> Application:
    """All paths of the service, on these components. `lifespan` runs them, or the caller does."""
    tolerance, most = settings.signature_tolerance_seconds, settings.body_most_bytes
    webhooks = {
        name: Webhook(components.pipeline, secrets, tolerance, most, name)
        for name, secrets in settings.endpoints.items()
    }
    checks = readiness_checks(shutdown, components.lock, components.ingest, components.recovery, components.slots)
    readiness = Readiness(checks)
    site = admin_page(settings, components, checks)
    slots = settings.workers * settings.handler_slots
    endpoint = MetricsEndpoint(checks, components.metrics_pool, slots, components.routes, components.pauses)
    routes = [
        Route("/livez", Liveness(components.slots).report),
        Route("/readyz", readiness.report),
        Route("/metrics", endpoint.report),
        *(site.routes if site else ()),
    ]
    return Application(webhooks, routes, lifespan, webhook_path=settings.webhook_path, root_path=settings.root_path)


def own_metrics(settings: Settings, components: Components, shutdown: Shutdown) -> MetricsEndpoint:
    """The metrics of this process alone, whichever other workers there are."""
    checks = readiness_checks(shutdown, components.lock, components.ingest, components.recovery, components.slots)
    return MetricsEndpoint(
        checks, components.metrics_pool, settings.handler_slots, components.routes, components.pauses
    )


def create_app(settings: Settings, shutdown: Shutdown) -> Starlette:
    """The application for `settings`, which must name both stores. Raises `ConfigurationError`."""
    configure(settings.log_format, settings.log_level)
    registry = Registry.load(settings.handlers, settings)
    components = assemble(settings, registry)
    create_series(settings, registry)

    @contextlib.asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        shutdown.install()
        shutdown.started(partial(release_unstarted, settings, registry, components.pipeline))
        with stop_with_supervisor(), LoopWatch(lambda: components.transaction_watch.calls).running():
            async with exporting(own_metrics(settings, components, shutdown)), components.running(shutdown):
                # Objects that exist now live as long as the process: exclude them from every later collection.
                gc.collect()
                gc.freeze()
                # An event leaves no cycles: looking for them every 700 objects took 2.6% of the worker's time.
                gc.set_threshold(10_000)
                yield

    return application(settings, components, shutdown, lifespan)
