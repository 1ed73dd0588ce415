"""A server that belongs to one test, which ends, kills or freezes it, and starts it again on the same address.

Guarantees: a wait ends when all of its processes have ended. The kernel ends the server if this process is killed.
`end` leaves nothing of it in any state (a frozen process is resumed first).
"""

import asyncio
import os
import secrets
import signal
import socket
import subprocess
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

from firstclaim.embedded.processes import User, _popen_options
from tests.acceptance.harness import START_SECONDS, eventually

_PORTS: Final = range(20_000, 32_000)  # below those that the kernel gives to outgoing connections


class Server:
    """One server process with its children, which can be ended and started again on the same address."""

    _last_signal = signal.SIGKILL

    def __init__(self, program: Path, folder: Path, user: User | None) -> None:
        self._program, self._user = program, user
        self.folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Of the process that was started last."""
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the process that was started last is still running."""
        return self._process is not None and self._process.poll() is None

    @property
    def output(self) -> str:
        """The content of its log."""
        return (self.folder / "log").read_text(errors="replace")

    async def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        """Send the signal, and wait until all processes have ended."""
        os.kill(self.pid, how)
        await self._gone()

    async def kill(self) -> None:
        """kill -9 to all processes at once."""
        self.send(signal.SIGKILL)
        await self._gone()

    def pause(self, pid: int | None = None) -> None:
        """Freeze all processes, or one of them."""
        self.send(signal.SIGSTOP, pid)

    def resume(self, pid: int | None = None) -> None:
        """Resume all processes, or one of them."""
        self.send(signal.SIGCONT, pid)

    async def end(self) -> None:
        """End all processes, in whatever state they are."""
        if self._process is not None:
            self.resume()
            if self.running:
                os.kill(self.pid, self._last_signal)
                with suppress(AssertionError):
                    await self._gone(10)
            await self.kill()

    def pids(self) -> list[int]:
        """The pids of all processes."""
        raise NotImplementedError

    def send(self, number: signal.Signals, pid: int | None = None) -> None:
        """Send a signal to all processes, or to one of them."""
        for each in self.pids() if pid is None else [pid]:
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(each, number)

    def _spawn(self, arguments: Iterable[str]) -> None:
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [str(self._program), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                **_popen_options(signal.SIGKILL, self._user),
            )

    async def _ready(self, look: Callable[[], bool]) -> None:
        async def seen() -> bool:
            assert self.running, f"{self._program.name} ended:\n{self.output[-3000:]}"
            return await asyncio.to_thread(look)

        await eventually(seen, bool, START_SECONDS)

    async def _gone(self, seconds: float = START_SECONDS) -> None:
        assert self._process is not None
        process = self._process

        async def left() -> list[int]:
            process.poll()
            return self.pids()

        await eventually(left, lambda left: not left, seconds)
        await asyncio.to_thread(process.wait)  # it has ended: reap it


def free_port() -> int:
    """A port that is free now. Servers of other tests use the same range, so the first port to try is random."""
    start = secrets.randbelow(len(_PORTS))
    for offset in range(len(_PORTS)):
        port = _PORTS[(start + offset) % len(_PORTS)]
        with socket.socket() as probe, suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port")
