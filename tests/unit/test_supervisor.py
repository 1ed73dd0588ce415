"""The supervisor's decisions, on a clock of the test's own and with processes that only look like some."""

import signal
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

import pytest

from firstclaim.server import supervisor
from firstclaim.server.runner import workers_settings
from firstclaim.server.supervisor import Heartbeat, Supervisor
from firstclaim.settings import Settings

FOR_EVER = 1_000.0


class Process:
    """A worker that ends with `code` after `seconds`, and on SIGTERM unless it is frozen."""

    sentinel = object()

    def __init__(self, clock: "Clock", pid: int, seconds: float, code: int) -> None:
        self._clock, self.pid, self._ends_at, self._code = clock, pid, clock.now + seconds, code
        self.frozen = False
        self.killed = False

    def start(self) -> None:
        self._clock.started.append(self._clock.now)
        if self._clock.serves_at_once:
            self._clock.heartbeats[self.pid].send(True)

    @property
    def exitcode(self) -> int | None:
        return self._code if self._clock.now >= self._ends_at else None

    def end(self, code: int) -> None:
        self._ends_at, self._code = self._clock.now, code

    def kill(self) -> None:
        self.killed = True
        self.end(-signal.SIGKILL)

    def join(self) -> None:
        assert self.exitcode is not None


class Clock:
    """Runs only while the supervisor waits; the processes that it has started, and when."""

    def __init__(self) -> None:
        self.now = 0.0
        self.started: list[float] = []
        self.processes: list[Process] = []
        self.heartbeats: list[Connection] = []
        self.life: tuple[float, int] = (FOR_EVER, 0)
        self.serves = True
        self.serves_at_once = False
        self.silent = False
        self.stop_at = 100.0

    def monotonic(self) -> float:
        return self.now

    def wait(self, objects: list[Any], timeout: float) -> list[Any]:
        self.now += timeout
        assert self.now < FOR_EVER, "the supervisor does not stop"
        if self.now >= self.stop_at:
            self.stop_at = FOR_EVER
            signal.raise_signal(signal.SIGTERM)
        for process, heartbeat in zip(self.processes, self.heartbeats, strict=True):
            if process.exitcode is None and not self.silent:
                heartbeat.send(self.serves)
        return objects

    def get_context(self, _method: str) -> Any:
        def process(**_: object) -> Process:
            self.processes.append(Process(self, len(self.processes), *self.life))
            return self.processes[-1]

        def pipe(*, duplex: bool) -> tuple[Connection, SimpleNamespace]:
            ours, theirs = Pipe(duplex=duplex)
            self.heartbeats.append(theirs)
            return ours, SimpleNamespace(close=lambda: None)

        return SimpleNamespace(Pipe=pipe, Process=process)

    def terminate(self, process: Process) -> None:
        if not process.frozen:
            process.end(0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    """In place of the real clock and of real processes."""
    clock = Clock()
    monkeypatch.setattr(supervisor, "time", SimpleNamespace(monotonic=clock.monotonic))
    monkeypatch.setattr(supervisor, "wait", clock.wait)
    monkeypatch.setattr(supervisor, "multiprocessing", SimpleNamespace(get_context=clock.get_context))
    monkeypatch.setattr(supervisor, "_terminate", clock.terminate)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    yield clock
    for number, handler in before.items():
        signal.signal(number, handler)


def _run(size: int = 1, on_stop: Callable[[], None] = lambda: None) -> int:
    work: Callable[[Heartbeat], None] = print
    return Supervisor(work, size, stop_seconds=6, on_stop=on_stop).run()


def test_workers_run_until_a_signal(clock: Clock) -> None:
    """Workers that serve are left alone, and stop when the supervisor is told to: exit code 0."""
    assert _run(2) == 0
    assert clock.started == [0, 0]
    assert not any(process.killed for process in clock.processes)


def test_a_worker_that_exits_is_replaced_and_the_others_stay(clock: Clock) -> None:
    """Whatever its exit code is: 3 is that of uvicorn's failed start, and a handler may choose it."""
    clock.life = (40, 3)
    clock.stop_at = 60
    assert _run(2) == 0
    assert clock.started == [0, 0, 40.25, 40.25]


def test_a_worker_that_dies_at_once_is_replaced_ever_more_slowly(clock: Clock) -> None:
    """At once, then after 1, 2, 4, 8 and 10 s: at most a start in ten seconds, and never none."""
    clock.life = (0.5, 1)
    assert _run() == 0
    waits = [int(later - earlier) for earlier, later in zip(clock.started, clock.started[1:], strict=False)]
    assert waits[:7] == [0, 1, 2, 4, 8, 10, 10]  # and the half second that it lives
    assert len(clock.started) < 15


def test_a_worker_that_ends_with_its_first_event_had_started(clock: Clock) -> None:
    """Its one report precedes its first handler and counts, even if no heartbeat follows: it is replaced."""
    clock.life, clock.serves_at_once, clock.silent = (0.1, 3), True, True
    clock.stop_at = 10
    assert _run() == 0
    assert len(clock.started) > 2


def test_a_worker_reports_its_start_at_once() -> None:
    """Not with the next beat: by then a handler may have ended the process."""
    ours, theirs = Pipe(duplex=False)
    Heartbeat(theirs).serves()
    assert ours.poll()
    assert ours.recv() is True


def test_workers_that_cannot_start_end_the_service(clock: Clock) -> None:
    """If no worker has ever served, a further one would fail in the same way: the exit code is the worker's."""
    clock.life, clock.serves = (0.5, 3), False
    assert _run(2) == 3
    assert len(clock.started) == 2


def test_a_silent_worker_is_replaced(clock: Clock) -> None:
    """A frozen process is killed after 20 s without a heartbeat."""
    clock.silent = True
    clock.stop_at = 25
    assert _run() == 0
    assert [process.killed for process in clock.processes] == [True, False]


def test_a_frozen_worker_does_not_delay_the_stop(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has not ended when the shutdown's time is over is killed, and the exit code says so."""
    clock.stop_at = 10

    def terminate(process: Process) -> None:
        process.frozen = process.pid == 0
        clock.terminate(process)

    monkeypatch.setattr(supervisor, "_terminate", terminate)
    stopped: list[float] = []
    assert _run(2, lambda: stopped.append(clock.now)) == 1
    assert [process.killed for process in clock.processes] == [True, False]
    assert stopped == [10]
    assert clock.now <= 10 + 6 + 0.5


@pytest.mark.parametrize(("stop", "drain", "theirs"), [(25, 3, 24), (4, 0, 3), (1, 0, 0.5), (4, 3.5, 3.75)])
def test_the_supervisor_has_a_part_of_the_stop(stop: float, drain: float, theirs: float) -> None:
    """The workers have a second less, to kill a frozen one and to exit; but always more than the drain."""
    settings = Settings.model_construct(shutdown_seconds=stop, drain_seconds=drain)
    assert workers_settings(settings).shutdown_seconds == theirs
