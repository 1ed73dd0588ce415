"""uvicorn as `serve` runs it: one process, or several workers under a supervisor.

Guarantees: the port is bound before anything else starts, so a port in use costs nothing; several workers count into
one folder, so that each of them reports the sum.
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

# How long a worker may be silent before its supervisor kills it. uvicorn's 5 s also killed workers that were still
# starting, on a busy machine again and again; but a SIGTERM waits behind this, so not much longer than a start takes.
_WORKER_SILENT_SECONDS = 20
_BODIES_ARRIVING_MOST = 64  # of the largest size, at once in memory; of an ordinary one some ten thousand
_KEEP_ALIVE_SECONDS = 75  # longer than a load balancer's idle timeout (60 s is common), or it meets closed sockets


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, which workers inherit. Raises `ConfigurationError`: the port is taken, the host unknown."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigurationError([f"cannot listen on {host} port {port}: {error.strerror or error}"]) from error
    listener.set_inheritable(True)
    return listener


def exit_on_signals() -> None:
    """Leave through every `finally`: the embedded servers stop with the service, also on SIGTERM."""

    def leave(_signum: int, _frame: FrameType | None) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)  # once is enough: the second must not interrupt the stopping
        raise SystemExit(0)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)


def server_config(application: Callable[[], Starlette], settings: Settings, workers: int) -> uvicorn.Config:
    """uvicorn as `serve` runs it, whatever `application` makes."""
    lobby = ConnectionLimiter(affordable_connections(settings), _BODIES_ARRIVING_MOST * settings.body_most_bytes)
    reading_and_answering = settings.body_timeout_seconds + settings.answer_budget_seconds + 1
    return uvicorn.Config(
        application,
        factory=True,
        workers=workers,
        loop="uvloop",
        # All that is asked of it is to make one.
        http=cast(type[asyncio.Protocol], partial(HttpProtocol, lobby, settings.body_timeout_seconds)),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_worker_healthcheck=_WORKER_SILENT_SECONDS,
        timeout_graceful_shutdown=max(1, int(min(reading_and_answering, settings.shutdown_seconds / 2))),
    )


def run(create_app: Callable[[Settings], Starlette], settings: Settings, listener: socket.socket, workers: int) -> None:
    """Serve until a signal."""
    config = server_config(partial(create_app, settings), settings, workers)
    if workers > 1:
        with _shared_metrics():
            Multiprocess(config, sockets=[listener]).run()
    else:
        uvicorn.Server(config).run(sockets=[listener])


@contextmanager
def _shared_metrics() -> Iterator[None]:
    """Where the workers count, so that each of them can tell the sum."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="firstclaim-metrics-", ignore_cleanup_errors=True)
    except OSError as error:
        raise ConfigurationError(
            [f"several workers need a writable folder for temporary files, e.g. a tmpfs at /tmp: {error.strerror}"]
        ) from error
    with folder as path:
        os.environ[metrics.FOLDER] = path
        yield
