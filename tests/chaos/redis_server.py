"""A Redis (the wheel's Valkey) that belongs to one test, with replicas. A replica needs a port: it is on loopback."""

import secrets
import signal
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Self

import redis.asyncio

from firstclaim.embedded.processes import User
from tests.acceptance.harness import START_SECONDS, _alive_in_group, eventually
from tests.chaos.server import Server

_PORTS: Final = range(20_000, 32_000)  # below those that the kernel gives to outgoing connections
_TEST_USER: Final = "test on >test ~* &* +@all"


class RedisServer(Server):
    """A Valkey without persistence; `settings` are its options."""

    def __init__(self, program: Path, folder: Path, user: User | None, settings: dict[str, str]) -> None:
        super().__init__(program, folder, user)
        self.port = _free_port()
        self.calls = 0  # of the test itself, each on its own connection, since the start
        self.settings = {
            "bind": "127.0.0.1",
            "port": str(self.port),
            "save": "",
            "appendonly": "no",
            "dir": str(folder),
            "repl-diskless-sync-delay": "0",
            **settings,
        }

    @property
    def url(self) -> str:
        """The address of its first database."""
        return f"redis://127.0.0.1:{self.port}/0"

    async def start(self) -> Self:
        """Start, and wait until it answers."""
        options = [part for name, value in self.settings.items() for part in (f"--{name}", value)]
        self._spawn([*options, "--user", *_TEST_USER.split()])
        await self._ready(lambda: _answers(self.port))
        self.calls = 0
        return self

    async def restart(self, how: signal.Signals = signal.SIGTERM) -> None:
        """Stop and start: it is empty."""
        await self.stop(how)
        await self.start()

    async def call(self, *command: str | int) -> Any:
        """One command, e.g. `call("CONFIG", "SET", "maxmemory", "2mb")`, with all rights in any state."""
        self.calls += 1
        async with redis.asyncio.Redis(port=self.port, username="test", password="test", socket_timeout=30) as client:
            return await client.execute_command(*command)  # type: ignore[no-untyped-call]

    async def replicate(self, primary: "RedisServer", *, port: int | None = None) -> None:
        """Become its replica (by a proxy's `port`, if given), and wait until its data has been copied."""
        await self.call("REPLICAOF", "127.0.0.1", port or primary.port)
        await eventually(self._replication, lambda seen: seen.get("master_link_status") == "up", START_SECONDS)

    async def promote(self) -> None:
        """Become a primary, with the data that had been copied until then."""
        await self.call("REPLICAOF", "NO", "ONE")

    async def _replication(self) -> dict[str, Any]:
        found: dict[str, Any] = await self.call("INFO", "replication")
        return found

    def pids(self) -> list[int]:
        # Its child process, which copies data for a replica, is in the same group.
        return [] if self._process is None else _alive_in_group(self.pid)


def _answers(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1) as client:
        client.sendall(b"PING\r\n")
        return client.recv(64) != b""
    return False


def _free_port() -> int:
    """A port that is free now. Servers of other tests use the same range, so the first port to try is random."""
    start = secrets.randbelow(len(_PORTS))
    for offset in range(len(_PORTS)):
        port = _PORTS[(start + offset) % len(_PORTS)]
        with socket.socket() as probe, suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port")
