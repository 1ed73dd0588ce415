"""uvicorn as `serve` runs it: one process, or several workers under a supervisor.

Guarantees: the port is bound before anything else starts, so a port in use fails early. Several workers write their
metrics to one folder, so that each of them reports the sum.
"""

import asyncio
import os
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import cast

import uvicorn
from starlette.applications import Starlette
from uvicorn.supervisors import Multiprocess

from firstclaim.errors import ConfigurationError
from firstclaim.observability import metrics
from firstclaim.server.connection_limiter import ConnectionLimiter, affordable_connections
from firstclaim.server.protocol import HttpProtocol
from firstclaim.settings import Settings

# How long a worker may be silent before its supervisor kills it. With uvicorn's 5 s, a busy machine killed workers that
# were still starting, again and again. A SIGTERM waits behind this check, so it is not much longer than a start takes.
_WORKER_SILENT_SECONDS = 20
_MAX_BUFFERED_BODIES = 64  # of the maximum size, in memory at once; of an ordinary size, some ten thousand
_KEEP_ALIVE_SECONDS = 75  # longer than a load balancer's idle timeout (60 s is common), or it would use closed sockets


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, which workers inherit. Raises `ConfigurationError`: port in use, unknown host."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigurationError([f"cannot listen on {host} port {port}: {error.strerror or error}"]) from error
    listener.set_inheritable(True)
    return listener


def exit_on_signals() -> None:
    """Exit through every `finally` on SIGTERM and SIGINT, so that the embedded servers stop with the service."""

    def exit_once(_signum: int, _frame: FrameType | None) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)  # a second signal must not interrupt the shutdown
        raise SystemExit(0)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, exit_once)


def server_config(application: Callable[[], Starlette], settings: Settings, workers: int) -> uvicorn.Config:
    """The configuration that `serve` runs uvicorn with, for the application that `application` creates."""
    limiter = ConnectionLimiter(affordable_connections(settings), _MAX_BUFFERED_BODIES * settings.body_most_bytes)
    request_seconds = settings.body_timeout_seconds + settings.answer_budget_seconds + 1
    return uvicorn.Config(
        application,
        factory=True,
        workers=workers,
        loop="uvloop",
        # uvicorn only calls it, to create a protocol.
        http=cast(type[asyncio.Protocol], partial(HttpProtocol, limiter, settings.body_timeout_seconds)),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_worker_healthcheck=_WORKER_SILENT_SECONDS,
        timeout_graceful_shutdown=max(1, int(min(request_seconds, settings.shutdown_seconds / 2))),
    )


def run(create_app: Callable[[Settings], Starlette], settings: Settings, listener: socket.socket, workers: int) -> None:
    """Serve until a signal is received."""
    config = server_config(partial(create_app, settings), settings, workers)
    if workers > 1:
        with _shared_metrics():
            Multiprocess(config, sockets=[listener]).run()
    else:
        uvicorn.Server(config).run(sockets=[listener])


@contextmanager
def _shared_metrics() -> Iterator[None]:
    """The folder that the workers write their metrics to, so that each of them can report the sum."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="firstclaim-metrics-", ignore_cleanup_errors=True)
    except OSError as error:
        raise ConfigurationError(
            [f"several workers need a writable folder for temporary files, e.g. a tmpfs at /tmp: {error.strerror}"]
        ) from error
    with folder as path:
        os.environ[metrics.FOLDER] = path
        yield
