"""A Redis (the wheel's Valkey) that belongs to one test, with replicas. A replica needs a port: it is on loopback."""

import signal
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Self

import redis.asyncio

from firstclaim.embedded.processes import User
from tests.acceptance.harness import START_SECONDS, _alive_in_group, eventually
from tests.chaos.server import Server, free_port

SERVICE: Final = "shop-locks"  # the name of the master that Sentinels watch
SILENT_MS: Final = 1000  # a server that is silent for longer has failed, to its Cluster and to the Sentinels

_LOOPBACK: Final = "127.0.0.1"
_TEST_USER: Final = "test on >test ~* &* +@all"


class RedisServer(Server):
    """A Valkey without persistence; `settings` are its options."""

    def __init__(self, program: Path, folder: Path, user: User | None, settings: dict[str, str]) -> None:
        super().__init__(program, folder, user)
        self.port = free_port()
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
        await self._ready(self._answers)
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

    async def raw(self, *command: str | int | bytes) -> Any:
        """The same, with the reply as the server sends it: a list or bytes, and no client's view of it."""
        async with redis.asyncio.Redis(port=self.port, username="test", password="test", protocol=2) as client:
            client.response_callbacks.clear()
            return await client.execute_command(*command)  # type: ignore[no-untyped-call]

    async def is_replica(self) -> bool:
        """Whether it takes no writes."""
        return bool((await self._replication())["role"] == "slave")

    async def is_synced_replica(self) -> bool:
        """Whether it is a replica that has its master's data."""
        seen = await self._replication()
        return bool(seen["role"] == "slave" and seen["master_link_status"] == "up")

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

    def _answers(self) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1) as client:
            client.sendall(b"PING\r\n")
            return client.recv(64) != b""
        return False

    def pids(self) -> list[int]:
        # Its child process, which copies data for a replica, is in the same group.
        return [] if self._process is None else _alive_in_group(self.pid)


class SentinelServer(RedisServer):
    """A Sentinel that watches one master."""

    def watch(self, master: RedisServer, quorum: int) -> None:
        """Write the configuration, which the Sentinel itself changes later."""
        lines = [
            f"port {self.port}",
            f"bind {_LOOPBACK}",
            f"dir {self.folder}",
            "user test on >test ~* &* +@all",
            f"sentinel monitor {SERVICE} {_LOOPBACK} {master.port} {quorum}",
            f"sentinel down-after-milliseconds {SERVICE} {SILENT_MS}",
            f"sentinel failover-timeout {SERVICE} {5 * SILENT_MS}",
        ]
        path = self.folder / "sentinel.conf"
        path.write_text("\n".join(lines) + "\n")
        path.chmod(0o666)  # the server may run as another user

    async def start(self) -> Self:
        """Start, and wait until it answers."""
        self._spawn([str(self.folder / "sentinel.conf"), "--sentinel"])
        await self._ready(self._answers)
        return self
