"""The drain delay, with a fake server; the watchdog, with a fake end of the process."""

import asyncio
import os
import queue
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from firstclaim.shutdown import Shutdown, Watchdog, exit_code, stop_signals

NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
Ends = queue.SimpleQueue[int]


@pytest.fixture
def signals() -> Iterator[None]:
    """The process' handling of the signals, put back afterwards."""
    before = {number: signal.getsignal(number) for number in NUMBERS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Ends:
    """The exit codes that a watchdog ends the process with."""
    ends: Ends = queue.SimpleQueue()
    monkeypatch.setattr(os, "_exit", ends.put)
    return ends


class Server:
    """Handles SIGTERM and SIGINT, as uvicorn does."""

    def __init__(self) -> None:
        self.handled: list[int] = []
        self.stopping = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, _frame: object) -> None:
        self.handled.append(number)
        self.stopping.set()

    async def stopped(self) -> None:
        async with asyncio.timeout(10):
            await self.stopping.wait()


@pytest.mark.usefixtures("signals")
async def test_only_a_second_signal_skips_the_drain_delay() -> None:
    """The server's handling of the first signal waits for the drain; that of the second runs at once."""
    server = Server()
    shutdown = Shutdown(drain_seconds=60, shutdown_seconds=90)
    shutdown.install()
    signal.raise_signal(signal.SIGTERM)
    assert shutdown.requested
    signal.raise_signal(signal.SIGINT)
    await server.stopped()
    assert server.handled == [signal.SIGINT]


@pytest.mark.usefixtures("signals")
async def test_a_hangup_is_a_request_to_stop() -> None:
    """SIGHUP, which the server does not handle, starts the same shutdown as SIGTERM."""
    server = Server()
    shutdown = Shutdown(drain_seconds=0, shutdown_seconds=90)
    shutdown.install()
    assert callable(signal.getsignal(signal.SIGHUP))  # else it would end this process
    signal.raise_signal(signal.SIGHUP)
    assert shutdown.requested
    await server.stopped()


@pytest.mark.usefixtures("signals")
def test_an_ignored_hangup_stays_ignored() -> None:
    """Under `nohup` SIGHUP is ignored: it is not one of the signals that stop the service."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert signal.SIGHUP not in stop_signals()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    assert signal.SIGHUP in stop_signals()


@pytest.mark.usefixtures("signals")
async def test_a_shutdown_has_a_time_limit(ends: Ends) -> None:
    """From the first signal on, the watchdog waits for the end of the shutdown's time, and then ends the process."""
    Server()
    shutdown = Shutdown(drain_seconds=0, shutdown_seconds=0.05)
    shutdown.watchdog.start()
    shutdown.install()
    signal.raise_signal(signal.SIGTERM)
    assert ends.get(timeout=10) == 1


def test_the_last_limit_counts(ends: Ends) -> None:
    """A limit replaces the one before it: once everything is released, what remains has no more than a moment."""
    shutdown = Shutdown(drain_seconds=0, shutdown_seconds=0.05)
    shutdown.watchdog.limit(600, 1)
    shutdown.watchdog.start()
    shutdown.finished()
    assert ends.get(timeout=10) == 0


def test_the_exit_itself_has_a_time_limit(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that never ends does not keep the interpreter alive, and the exit code stays the same."""
    monkeypatch.setattr("firstclaim.shutdown._EXIT_SECONDS", 0.05)
    watchdog = Watchdog()
    watchdog.start()
    with pytest.raises(SystemExit), watchdog.bounded_exit():
        raise SystemExit(3)
    assert ends.get(timeout=10) == 3


def test_the_exit_does_not_extend_the_shutdown(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shutdown that has used up its time leaves none for the interpreter's exit, which usually has a moment."""
    monkeypatch.setattr("firstclaim.shutdown._EXIT_SECONDS", 600)
    watchdog = Watchdog()
    with watchdog.bounded_exit():
        watchdog.limit(-600, 1)
    watchdog.start()
    assert ends.get(timeout=5) == 0


@pytest.mark.parametrize("code", [0, 3])
def test_the_exit_does_not_wait_for_the_interpreters_teardown(code: int) -> None:
    """An object that takes a minute to be freed delays nothing; exit functions run, and the code is kept."""
    program = """if True:
        import atexit, sys, time
        from firstclaim.shutdown import Watchdog

        class Slow:
            def __del__(self, sleep=time.sleep):
                sleep(60)

        kept, watchdog = Slow(), Watchdog()
        watchdog.skip_teardown()
        watchdog.start()
        atexit.register(print, "exit function", end="")
        with watchdog.bounded_exit():
            print("block", end=" ")
            sys.exit(int(sys.argv[1]))
    """
    ended = subprocess.run([sys.executable, "-c", program, str(code)], capture_output=True, check=False, timeout=30)
    assert (ended.returncode, ended.stdout) == (code, b"block exit function"), ended.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (SystemExit(3), 3),
        (SystemExit(0), 1),
        (SystemExit(None), 1),
        (SystemExit(256), 1),
        (SystemExit("why"), 1),
        (KeyboardInterrupt(), 1),
        (RuntimeError(), 1),
    ],
)
def test_a_crash_never_exits_with_0(error: BaseException, code: int) -> None:
    """The exit code of a process that a handler ended is the handler's, or 1 if that would mean success."""
    released: list[str] = []
    shutdown = Shutdown(drain_seconds=0, shutdown_seconds=1, on_crash=lambda: released.append("once"))
    assert shutdown.crashed(error) == code
    assert released == ["once"]


def test_the_start_is_reported_before_anything_runs() -> None:
    """From the application's start on, the end of the process is a crash and no failed start."""
    reported: list[bool] = []
    shutdown = Shutdown(drain_seconds=0, shutdown_seconds=1, on_start=lambda: reported.append(True))
    shutdown.started(lambda: None)
    assert reported == [True]
    assert shutdown.on_crash is not None


def test_the_exit_code_is_that_of_python() -> None:
    """`SystemExit` without a code is a success, with a text a failure; the kernel keeps eight bits of a number."""
    assert [exit_code(SystemExit(each)) for each in (None, 0, 3, 259, "why")] == [0, 0, 3, 3, 1]
