"""The end of a process: a graceful shutdown that a signal requests, and a watchdog that bounds it.

Guarantees: the first of SIGTERM, SIGINT and SIGHUP only starts the drain delay. During the delay everything is still
served, and `/readyz` returns 503. The server's own signal handling runs after the delay. A second signal skips the
delay. A worker whose supervisor was killed shuts itself down, because no other process would. Once the time of the
shutdown is over the watchdog ends the process, whatever threads, executors and tasks remain.
"""

import asyncio
import atexit
import contextlib
import math
import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import structlog

# For the interpreter's own exit: `atexit`, and threads that are about to end. A thread that never ends, and Python
# would wait for it for ever, costs this time.
_EXIT_SECONDS = 2.0
_CRASH_SECONDS = 3.0  # to release what had not begun
_FLUSH_SECONDS = 0.5  # the reader of standard error may be frozen

log = structlog.get_logger(__name__)


def stop_signals() -> list[signal.Signals]:
    """The signals that request a shutdown. SIGHUP is not one of them if it is ignored: `nohup` wants that."""
    hangup = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGTERM, signal.SIGINT, *hangup]


class Watchdog:
    """Ends the process when a time limit is over. Without `start`, limits have no effect.

    It is a daemon thread: neither a blocked event loop nor the interpreter's wait for other threads stops it.
    """

    def __init__(self) -> None:
        # A SimpleQueue may be used in a signal handler: its `put` is reentrant. A lock would not be.
        self._limits: queue.SimpleQueue[tuple[float, int]] = queue.SimpleQueue()
        self._ends_at = math.inf  # by the last limit
        self._exit_code: int | None = None  # None: no exit has begun, or an error is its reason
        self._started = False

    def start(self) -> None:
        """Start the thread. It does nothing until the first limit."""
        self._started = True
        threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def limit(self, seconds: float, code: int) -> None:
        """From now on the process has `seconds`, then it ends with `code`. Replaces the last limit."""
        self._ends_at = time.monotonic() + seconds
        self._limits.put((self._ends_at, code))

    def skip_teardown(self) -> None:
        """Let the exit end with the last of the exit functions (`atexit`) that are registered from now on.

        Python would then free every object. That takes half a second of processor time, which was 3.6 s on a busy
        machine, and no longer lets a daemon thread run, the watchdog included.
        """
        atexit.register(self._end)

    def _end(self) -> None:
        if self._started and self._exit_code is not None:
            _flush()
            os._exit(self._exit_code)

    def lift(self) -> None:
        """Remove the limit."""
        self.limit(threading.TIMEOUT_MAX / 2, 1)

    @contextlib.contextmanager
    def bounded_exit(self) -> Iterator[None]:
        """After the block, the interpreter has `_EXIT_SECONDS` to exit, but no longer than the last limit.

        The exit code is that of the exception.
        """
        code = 1
        try:
            yield
            code = self._exit_code = 0
        except SystemExit as error:
            code = self._exit_code = exit_code(error)
            raise
        finally:
            self.limit(min(_EXIT_SECONDS, self._ends_at - time.monotonic()), code)

    def _watch(self) -> None:
        ends_at, code = self._limits.get()
        while True:
            try:
                ends_at, code = self._limits.get(timeout=max(0.0, ends_at - time.monotonic()))
            except queue.Empty:
                break
        report = threading.Thread(target=_report_end, args=(code,), daemon=True)
        report.start()
        report.join(_FLUSH_SECONDS)
        os._exit(code)


def exit_code(error: SystemExit) -> int:
    """The exit code that Python gives the process for `error`."""
    if error.code is None:
        return 0
    return error.code & 0xFF if isinstance(error.code, int) else 1


def _report_end(code: int) -> None:
    left = [thread.name for thread in threading.enumerate() if thread.is_alive() and not thread.daemon]
    log.warning("exit_forced", exit_code=code, threads=left)
    _flush()


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


@dataclass(slots=True)
class Shutdown:
    """Whether a shutdown was requested, and how much of its time is left."""

    drain_seconds: float
    shutdown_seconds: float
    watchdog: Watchdog = field(default_factory=Watchdog)
    # Called when the application starts, before it runs a handler.
    on_start: Callable[[], None] | None = None
    # Set once the application runs: called when something else than a shutdown has ended the event loop.
    on_crash: Callable[[], None] | None = None
    _requested_at: float | None = None

    @property
    def requested(self) -> bool:
        """Whether a signal was received."""
        return self._requested_at is not None

    @property
    def remaining_seconds(self) -> float:
        """The time left for the shutdown. All of it, if no shutdown was requested."""
        spent = 0.0 if self._requested_at is None else time.monotonic() - self._requested_at
        return max(0.0, self.shutdown_seconds - spent)

    def install(self) -> None:
        """Delay the server's handling of the signals by the drain. Must be called on the server's event loop.

        The server itself does not handle SIGHUP. Here it is a SIGTERM.
        """
        loop, terminate = asyncio.get_running_loop(), signal.getsignal(signal.SIGTERM)
        for number in stop_signals():
            proceed = terminate if number is signal.SIGHUP else signal.getsignal(number)
            if callable(proceed):
                with contextlib.suppress(ValueError):  # not the main thread: another program embeds the application
                    signal.signal(number, self._delayed(proceed, loop))

    def started(self, on_crash: Callable[[], None]) -> None:
        """The application starts. From now on, whatever ends the process, it was able to start."""
        self.on_crash = on_crash
        if self.on_start is not None:
            self.on_start()

    def finished(self) -> None:
        """Everything is finished or released: what still runs has a moment to end, and is ended then."""
        self.watchdog.limit(min(_EXIT_SECONDS, self.remaining_seconds), 0)

    def crashed(self, error: BaseException) -> int:
        """Something else than a shutdown has ended the event loop: returns the exit code, which is never 0."""
        self.watchdog.limit(_CRASH_SECONDS, 1)
        log.critical("unexpected_exit", exc_info=error)
        if self.on_crash is not None:
            self.on_crash()
        return (exit_code(error) if isinstance(error, SystemExit) else 1) or 1

    def _delayed(self, proceed: Callable[..., Any], loop: asyncio.AbstractEventLoop) -> Callable[..., None]:
        def begin(number: int, frame: FrameType | None) -> None:
            delay = 0.0 if self.requested else self.drain_seconds
            if self._requested_at is None:
                self._requested_at = time.monotonic()
                self.watchdog.limit(self.shutdown_seconds, 1)
            loop.call_soon_threadsafe(loop.call_later, delay, proceed, number, frame)

        return begin


@contextlib.contextmanager
def stop_with_supervisor() -> Iterator[None]:
    """While the block runs in a worker process, that process sends itself SIGTERM when its supervisor exits."""
    supervisor = multiprocessing.parent_process()
    if supervisor is None:
        yield
        return
    loop, sentinel = asyncio.get_running_loop(), supervisor.sentinel

    def vanished() -> None:
        loop.remove_reader(sentinel)
        log.warning("supervisor_vanished")
        os.kill(os.getpid(), signal.SIGTERM)

    loop.add_reader(sentinel, vanished)
    try:
        yield
    finally:
        loop.remove_reader(sentinel)
