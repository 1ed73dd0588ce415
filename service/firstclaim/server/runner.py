"""uvicorn as `serve` runs it: one process, or several workers under a supervisor.

Guarantees: the port is bound before anything else starts, so a port in use fails early. Several workers write their
metrics to one folder, so that each of them reports the sum. A requested stop releases running attempts without a charge
and ends within its time; any other end of the process leaves them to be counted as abandoned.
"""

import asyncio
import os
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import cast

import uvicorn
from starlette.applications import Starlette

from firstclaim.errors import ConfigurationError
from firstclaim.observability import metrics
from firstclaim.observability.logging import configure
from firstclaim.server.connection_limiter import ConnectionLimiter, affordable_connections
from firstclaim.server.protocol import HttpProtocol
from firstclaim.server.reload import Reloader, exit_with, watched_paths
from firstclaim.server.supervisor import Heartbeat, Supervisor
from firstclaim.settings import Settings
from firstclaim.shutdown import Shutdown, Watchdog, stop_signals

_MAX_BUFFERED_BODIES = 64  # of the maximum size, in memory at once; of an ordinary size, some ten thousand
# A supervisor's part of a stop's time: to pass the signal on (0.25 s), to kill workers (0.5 s) and to exit.
_SUPERVISOR_SECONDS = 1.0
_CANCEL_SECONDS = 1.5  # for tasks that are left on the event loop after a shutdown; in the same 2 s as the exit itself


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, which workers inherit. Raises `ConfigurationError`: port in use, unknown host.

    `::` is every address of both families, whatever the machine's default for IPv6 sockets is.
    """
    both = host == "::" and socket.has_dualstack_ipv6()
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=2048, dualstack_ipv6=both)
    except OSError as error:
        raise ConfigurationError([f"cannot listen on {host} port {port}: {error.strerror or error}"]) from error
    listener.set_inheritable(True)
    return listener


def exit_on_signals() -> None:
    """Exit through every `finally` on a signal to stop, so that the embedded servers stop with the service."""
    numbers = stop_signals()

    def exit_once(_signum: int, _frame: FrameType | None) -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)  # a second signal must not interrupt the shutdown
        raise SystemExit(0)

    for number in numbers:
        signal.signal(number, exit_once)


def server_config(application: Callable[[], Starlette], settings: Settings) -> uvicorn.Config:
    """The configuration that `serve` runs uvicorn with, for the application that `application` creates."""
    limiter = ConnectionLimiter(affordable_connections(settings), _MAX_BUFFERED_BODIES * settings.body_most_bytes)
    request_seconds = settings.body_timeout_seconds + settings.answer_budget_seconds + 1
    return uvicorn.Config(
        application,
        factory=True,
        loop="uvloop",
        # uvicorn only calls it, to create a protocol.
        http=cast(type[asyncio.Protocol], partial(HttpProtocol, limiter, settings.body_timeout_seconds)),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=settings.keepalive_seconds,  # type: ignore[arg-type]  # it is a delay of the event loop
        timeout_graceful_shutdown=max(1, int(min(request_seconds, settings.shutdown_seconds / 2))),
    )


class Server(uvicorn.Server):
    """uvicorn's server, except for how it ends.

    After a shutdown, the event loop gets a moment to cancel what is left on it. It is not closed: closing would wait
    for tasks that ignore their cancellation, and for threads. If anything else ends the loop, such as a `sys.exit` in a
    task that a handler started, the loop never runs again. So running attempts are not released, and their events count
    as abandoned, as after a kill.
    """

    def __init__(self, config: uvicorn.Config, shutdown: Shutdown) -> None:
        super().__init__(config)
        self._shutdown = shutdown
        self._finished = False

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until a signal. Raises `SystemExit`, with a code that is not 0, if anything else ends the loop."""
        runner = asyncio.Runner(loop_factory=self.config.get_loop_factory())
        try:
            runner.run(self.serve(sockets))
        except BaseException as error:
            if not self._finished:  # else: uvicorn raised the signal again
                if self._shutdown.on_crash is None:  # the application has not started
                    raise
                raise SystemExit(self._shutdown.crashed(error)) from error
        with suppress(Exception, SystemExit, KeyboardInterrupt):
            runner.get_loop().run_until_complete(_cancel_all())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting, answer what is open, end the application's lifespan: then everything is released."""
        await super().shutdown(sockets)
        self._finished = True
        self._shutdown.finished()


async def _cancel_all() -> None:
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    if left:
        await asyncio.wait(left, timeout=_CANCEL_SECONDS)


CreateApp = Callable[[Settings, Shutdown], Starlette]


def run(create_app: CreateApp, settings: Settings, listener: socket.socket, workers: int, watchdog: Watchdog) -> None:
    """Serve until a signal. Raises `SystemExit` if a handler ended the process, or a worker had to be killed."""
    if workers == 1:
        _serve(create_app, settings, listener, watchdog)
        return
    watchdog.start()
    configure(settings.log_format, settings.log_level)
    with _shared_metrics():
        theirs = workers_settings(settings)
        work = partial(_work, create_app, theirs, listener)
        on_stop = partial(watchdog.limit, settings.shutdown_seconds, 1)
        if code := Supervisor(work, workers, theirs.shutdown_seconds, on_stop).run():
            raise SystemExit(code)


def run_reloading(create_app: CreateApp, settings: Settings, listener: socket.socket, watchdog: Watchdog) -> None:
    """Serve until a signal, in a process that is replaced whenever a source file changes."""
    watchdog.start()
    configure(settings.log_format, settings.log_level)
    theirs = workers_settings(settings)
    work = partial(_work_until_change, create_app, theirs, listener)
    on_stop = partial(watchdog.limit, settings.shutdown_seconds, 1)
    Reloader(work, watched_paths(settings.handlers, Path.cwd()), theirs.shutdown_seconds, on_stop).run()


def workers_settings(settings: Settings) -> Settings:
    """For processes that another one supervises: their stop leaves it the time to kill them, and to exit."""
    most = (settings.shutdown_seconds - settings.drain_seconds) / 2  # the drain is a part of their time
    return settings.model_copy(update={"shutdown_seconds": settings.shutdown_seconds - min(_SUPERVISOR_SECONDS, most)})


def _work_until_change(create_app: CreateApp, settings: Settings, listener: socket.socket) -> None:
    """One process of `serve --reload`. A fault in a handler module is reported in one line, as at the start."""
    exit_on_signals()
    watchdog = Watchdog()
    watchdog.skip_teardown()
    with watchdog.bounded_exit():
        try:
            _serve(create_app, settings, listener, watchdog)
        except ConfigurationError as error:
            exit_with(error.faults)


def _work(create_app: CreateApp, settings: Settings, listener: socket.socket, heartbeat: Heartbeat) -> None:
    """One worker process."""
    exit_on_signals()
    watchdog = Watchdog()
    watchdog.skip_teardown()
    with watchdog.bounded_exit():
        _serve(create_app, settings, listener, watchdog, heartbeat)


def _serve(
    create_app: CreateApp,
    settings: Settings,
    listener: socket.socket,
    watchdog: Watchdog,
    heartbeat: Heartbeat | None = None,
) -> None:
    shutdown = Shutdown(settings.drain_seconds, settings.shutdown_seconds, watchdog)
    server = Server(server_config(partial(create_app, settings, shutdown), settings), shutdown)
    if heartbeat is not None:
        shutdown.on_start = heartbeat.serves
        heartbeat.start()
    watchdog.start()
    server.run(sockets=[listener])


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
