"""The supervisor of several worker processes: it starts them, replaces those that end, and stops them all on a signal.

Guarantees: a worker that dies is replaced, whatever its exit code, and the others keep serving. Replacements are
delayed when workers end soon after their start, so a worker that dies at once does not spin. Only a worker that cannot
start, before any worker ever could, ends the service. A worker that is silent is killed. A stop ends within
`stop_seconds` and a moment: workers that are left then, such as a frozen one, are killed.

uvicorn's supervisor does not fit: it ends all workers, with exit code 0, when one exits with code 3, and while it waits
for a silent worker or for the end of a stopping one it handles no signal.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import structlog

from firstclaim.observability.metrics import forget_process
from firstclaim.shutdown import stop_signals

_BEAT_SECONDS = 1.0
# How long a worker may be silent before it is killed. With 5 s, a busy machine killed workers that were still starting,
# again and again.
_SILENT_SECONDS = 20.0
_POLL_SECONDS = 0.25  # signals are handled this late at most
# A worker that lived this long is replaced at once. Otherwise the delay doubles: an event that ends its process is
# dead after eight processes, and until then the other events need one that serves.
_STABLE_SECONDS = 30.0
_FIRST_DELAY_SECONDS = 1.0
_MAX_DELAY_SECONDS = 10.0
_KILL_SECONDS = 0.25  # after the workers' own watchdogs, which know whether everything was released

log = structlog.get_logger(__name__)


class Heartbeat:
    """A worker's side: reports every second that it is alive, and whether its application has started."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._serves = False

    def start(self) -> None:
        """Report from a thread of its own: only a process that is frozen, or whose interpreter is, becomes silent."""
        threading.Thread(target=self._beat, daemon=True, name="heartbeat").start()

    def serves(self) -> None:
        """Report now that the application has started: the first handler may end the process before the next beat."""
        self._serves = True
        with suppress(OSError):  # the supervisor is gone: see `stop_with_supervisor`
            self._connection.send(True)

    def _beat(self) -> None:
        with suppress(OSError):
            while True:
                self._connection.send(self._serves)
                time.sleep(_BEAT_SECONDS)


@dataclass(slots=True)
class _Worker:
    """One place for a worker, and the process that fills it; None: its replacement is delayed."""

    process: BaseProcess | None = None
    heartbeat: Connection | None = None
    started_at: float = 0.0
    heard_at: float = 0.0
    delay_seconds: float = 0.0
    start_at: float = 0.0


class Supervisor:
    """Runs `work(heartbeat)` in each of `size` processes, which are spawned: `work` must be picklable.

    `stop_seconds` is the workers' time to stop. `on_stop` is called in the handler of the first signal.
    """

    def __init__(
        self, work: Callable[[Heartbeat], None], size: int, stop_seconds: float, on_stop: Callable[[], None]
    ) -> None:
        self._work = work
        self._stop_seconds = stop_seconds
        self._on_stop = on_stop
        self._workers = [_Worker() for _ in range(size)]
        self._stop_at: float | None = None
        self._signals = 0
        self._ever_served = False
        self._failed: int | None = None

    def run(self) -> int:
        """Keep all places filled until a signal; returns the exit code."""
        for number in stop_signals():
            signal.signal(number, self._request_stop)
        while self._stop_at is None and self._failed is None:
            for worker in self._workers:
                self._look_after(worker)
            self._wait()
        return self._stop()

    def _request_stop(self, *_: object) -> None:
        self._signals += 1
        if self._stop_at is None:
            self._stop_at = time.monotonic()
            self._on_stop()

    def _look_after(self, worker: _Worker) -> None:
        now = time.monotonic()
        if worker.process is None:
            if now >= worker.start_at:
                self._start(worker)
            return
        if worker.process.exitcode is None and now - worker.heard_at > _SILENT_SECONDS:
            log.error("worker_silent", pid=worker.process.pid, seconds=round(now - worker.heard_at))
            worker.process.kill()
            worker.process.join()
        if worker.process.exitcode is not None:
            self._note_end(worker, worker.process.exitcode)

    def _start(self, worker: _Worker) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_run_worker, args=(self._work, theirs))
        process.start()
        theirs.close()
        worker.process, worker.heartbeat = process, ours
        worker.started_at = worker.heard_at = time.monotonic()

    def _note_end(self, worker: _Worker, code: int) -> None:
        """Plan the replacement of a worker that nobody stopped."""
        pid = worker.process.pid if worker.process is not None else None
        self._read(worker)  # its last words: it may have ended since the last look
        self._close(worker)
        if pid is not None:
            forget_process(pid)
        if code > 0 and not self._ever_served:
            log.error("worker_failed_to_start", pid=pid, exit_code=code)
            self._failed = code
            return
        if time.monotonic() - worker.started_at >= _STABLE_SECONDS:
            worker.delay_seconds = 0.0
        worker.start_at = time.monotonic() + worker.delay_seconds
        log.error("worker_died", pid=pid, exit_code=code, replaced_in_seconds=worker.delay_seconds)
        worker.delay_seconds = min(max(2 * worker.delay_seconds, _FIRST_DELAY_SECONDS), _MAX_DELAY_SECONDS)

    def _close(self, worker: _Worker) -> None:
        if worker.heartbeat is not None:
            worker.heartbeat.close()
        worker.process = worker.heartbeat = None

    def _wait(self) -> None:
        """Wait for the end of a worker, a heartbeat or the next look, and read all heartbeats."""
        processes = [worker.process for worker in self._workers if worker.process is not None]
        heartbeats = [worker.heartbeat for worker in self._workers if worker.heartbeat is not None]
        wait([*(process.sentinel for process in processes), *heartbeats], timeout=_POLL_SECONDS)
        for worker in self._workers:
            self._read(worker)

    def _read(self, worker: _Worker) -> None:
        """Read the heartbeats that have arrived."""
        if worker.heartbeat is None:
            return
        try:
            while worker.heartbeat.poll():
                self._ever_served |= worker.heartbeat.recv()
                worker.heard_at = time.monotonic()
        except (EOFError, OSError):  # it has ended, or is about to
            worker.heartbeat.close()
            worker.heartbeat = None

    def _stop(self) -> int:
        """Stop all workers, in the time that they have."""
        running = [worker.process for worker in self._workers if worker.process is not None]
        ends_at = (self._stop_at or time.monotonic()) + self._stop_seconds + _KILL_SECONDS
        signalled, killed = 0, False
        while left := [process for process in running if process.exitcode is None]:
            if signalled < max(1, self._signals):  # also a second one: it skips the drain delay
                signalled = max(1, self._signals)
                for process in left:
                    _terminate(process)
            if not killed and time.monotonic() >= ends_at:
                killed = True
                for process in left:
                    log.error("worker_killed", pid=process.pid)
                    process.kill()
            wait([process.sentinel for process in left], timeout=_POLL_SECONDS)
        if self._failed is not None:
            return self._failed
        return 0 if all(process.exitcode in (0, -signal.SIGTERM) for process in running) else 1


def _run_worker(work: Callable[[Heartbeat], None], connection: Connection) -> None:
    work(Heartbeat(connection))


def _terminate(process: BaseProcess) -> None:
    if process.pid is not None and process.exitcode is None:
        os.kill(process.pid, signal.SIGTERM)
