"""A Patroni cluster of two PostgreSQL servers with etcd, and HAProxy in front of it, which belong to one test.

Guarantees: all of them are real, run as the unprivileged user of the other servers, and listen on loopback alone. When
the block of `running` ends, none of their processes is left, in whatever state they are.
"""

import asyncio
import os
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import asyncpg
import httpx
import orjson
import psutil

from firstclaim.embedded.processes import User
from firstclaim.migrations import schema
from tests.acceptance.harness import START_SECONDS, eventually
from tests.chaos.failovers import now
from tests.chaos.server import Server, free_port
from tests.chaos.servers import Servers
from tests.stores import EFFECTS, SHIPPED

_PATH: Final = f"{os.environ.get('PATH', '')}:/usr/sbin"
PROGRAMS: Final = {name: shutil.which(name, path=_PATH) for name in ("etcd", "patroni", "haproxy")}
MISSING: Final = [name for name, program in PROGRAMS.items() if program is None]

_SCOPE: Final = "firstclaim"
# A primary that is killed is replaced when its key has expired. 1 + 2 * 3 must not exceed the TTL.
_DCS: Final = {"ttl": 10, "loop_wait": 1, "retry_timeout": 3, "maximum_lag_on_failover": 1_048_576}
_HBA: Final = ["local all all trust", "host all all 127.0.0.1/32 trust", "host replication all 127.0.0.1/32 trust"]


class _Process(Server):
    """A process without children that outlive it."""

    _last_signal = signal.SIGTERM

    def __init__(self, name: str, folder: Path, user: User | None, *arguments: str) -> None:
        program = PROGRAMS[name]
        assert program is not None
        super().__init__(Path(program), folder, user)
        self._arguments = arguments

    def start(self) -> None:
        """Start, without waiting for anything."""
        self._spawn(self._arguments)

    def pids(self) -> list[int]:
        return [self.pid] if self.running else []


class Member(_Process):
    """Patroni, and the PostgreSQL that it starts."""

    def __init__(self, name: str, folder: Path, user: User | None, etcd_port: int, bin_dir: Path) -> None:
        super().__init__("patroni", folder, user, str(folder / "patroni.json"))
        self.name, self.port, self.rest_port = name, free_port(), free_port()
        self.data = folder / "data"
        settings: dict[str, Any] = {
            "scope": _SCOPE,
            "name": name,
            "restapi": self._at(self.rest_port),
            "etcd3": {"host": f"127.0.0.1:{etcd_port}"},
            "bootstrap": {
                "dcs": {**_DCS, "synchronous_mode": True, "postgresql": {"use_pg_rewind": True}},
                "initdb": [{"encoding": "UTF8"}, {"locale": "C"}],
            },
            "postgresql": {
                **self._at(self.port),
                "data_dir": str(self.data),
                "bin_dir": str(bin_dir),
                "pgpass": str(folder / "pgpass"),
                "authentication": {role: {"username": "postgres"} for role in ("superuser", "replication", "rewind")},
                "pg_hba": _HBA,
                "basebackup": [{"checkpoint": "fast"}],
                "parameters": {
                    "unix_socket_directories": str(folder),
                    "max_connections": 100,
                    "shared_buffers": "32MB",
                    "wal_keep_size": "256MB",
                },
            },
        }
        # JSON is YAML.
        (folder / "patroni.json").write_bytes(orjson.dumps(settings))

    @staticmethod
    def _at(port: int) -> dict[str, str]:
        return {"listen": f"127.0.0.1:{port}", "connect_address": f"127.0.0.1:{port}"}

    def url(self, database: str = "ledger") -> str:
        """The address of this server."""
        return f"postgresql://postgres@127.0.0.1:{self.port}/{database}"

    async def is_primary(self) -> bool:
        """Whether it accepts writes."""
        with suppress(OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            connection = await asyncpg.connect(self.url("postgres"), timeout=2)
            try:
                return not await connection.fetchval("SELECT pg_is_in_recovery()")
            finally:
                connection.terminate()
        return False

    async def ask(self, method: str, path: str, **content: str) -> httpx.Response:
        """A request to Patroni's REST API."""
        async with httpx.AsyncClient(trust_env=False, timeout=30) as client:
            return await client.request(method, f"http://127.0.0.1:{self.rest_port}{path}", json=content or None)

    def pids(self) -> list[int]:
        return [*super().pids(), *self._postgres()]

    def _postgres(self) -> list[int]:
        """The postmaster, which outlives Patroni, and its processes."""
        with suppress(FileNotFoundError, IndexError, ValueError, psutil.NoSuchProcess):
            postmaster = psutil.Process(int((self.data / "postmaster.pid").read_text().split()[0]))
            if str(self.data) in " ".join(postmaster.cmdline()):  # else the pid is another's by now
                return [postmaster.pid, *(each.pid for each in postmaster.children())]
        return []


@dataclass(frozen=True, slots=True)
class PatroniCluster:
    """Two members with a synchronous standby; `balanced` is the address of HAProxy, which leads to the primary."""

    members: list[Member]
    balanced: str

    @property
    def url(self) -> str:
        """The address of both members."""
        hosts = ",".join("127.0.0.1" for _ in self.members)
        ports = ",".join(str(member.port) for member in self.members)
        return f"postgresql://postgres@/ledger?host={hosts}&port={ports}"

    async def primary(self) -> Member:
        """The member that accepts writes."""

        async def look() -> Member | None:
            for member in self.members:
                if await member.is_primary():
                    return member
            return None

        found = await eventually(look, bool, START_SECONDS)
        assert found is not None
        return found

    def other(self, member: Member) -> Member:
        """The other one."""
        return next(each for each in self.members if each is not member)

    async def protected(self) -> None:
        """Wait until the standby is synchronous, and Patroni has noted that: before, it would promote none."""
        standby = self.other(await self.primary())

        async def look() -> int:
            with suppress(httpx.TransportError):
                return (await standby.ask("GET", "/synchronous")).status_code
            return 0

        await eventually(look, lambda status: status == 200, START_SECONDS)

    async def promoted(self, member: Member) -> float:
        """Wait until this one accepts writes; returns the instant."""
        await eventually(member.is_primary, bool, START_SECONDS)
        return now()

    async def switch_over(self) -> float:
        """Have Patroni make the standby the primary; returns the instant at which it was."""
        old = await self.primary()
        new = self.other(old)
        asking = asyncio.create_task(old.ask("POST", "/switchover", leader=old.name, candidate=new.name))
        promoted = await self.promoted(new)
        answer = await asking
        assert answer.status_code == 200, answer.text
        return promoted


@asynccontextmanager
async def running(servers: Servers) -> AsyncIterator[PatroniCluster]:
    """The cluster, with a migrated ledger, for the duration of the block."""
    made: list[Server] = []
    try:
        yield await _start(servers, made)
    except AssertionError:
        for server in made:
            print(f"--- {server.folder.name}:\n{server.output[-4000:]}")
        raise
    finally:
        await asyncio.gather(*(server.kill() for server in made))


async def _start(servers: Servers, made: list[Server]) -> PatroniCluster:
    user, client, peer = servers._user, free_port(), free_port()
    folder = servers._place("etcd")
    etcd = _Process(
        "etcd",
        folder,
        user,
        *("--name", "one", "--data-dir", str(folder / "data")),
        *(f"--{kind}-client-urls=http://127.0.0.1:{client}" for kind in ("listen", "advertise")),
        *(f"--{kind}-peer-urls=http://127.0.0.1:{peer}" for kind in ("listen", "initial-advertise")),
        f"--initial-cluster=one=http://127.0.0.1:{peer}",
    )
    made.append(etcd)
    etcd.start()
    await eventually(lambda: _answers(client), bool, START_SECONDS)
    members = []
    for name in ("alpha", "beta"):  # `first` is a keyword in synchronous_standby_names
        members.append(Member(name, servers._place(name), user, client, servers._postgres.parent))
        made.append(members[-1])
    members[0].start()
    await eventually(members[0].is_primary, bool, START_SECONDS)
    members[1].start()  # a copy of the first
    await _make_ledger(members[0])
    balancer_port = free_port()
    haproxy = _haproxy(servers, balancer_port, members)
    made.append(haproxy)
    haproxy.start()
    cluster = PatroniCluster(members, f"postgresql://postgres@127.0.0.1:{balancer_port}/ledger")
    await cluster.protected()
    return cluster


def _haproxy(servers: Servers, port: int, members: list[Member]) -> _Process:
    folder = servers._place("haproxy")
    lines = [
        "defaults",
        "    mode tcp",
        "    timeout connect 2s",
        "    timeout client 30m",
        "    timeout server 30m",
        "listen postgres",
        f"    bind 127.0.0.1:{port}",
        "    option httpchk OPTIONS /primary",
        "    http-check expect status 200",
        "    default-server inter 200ms fall 2 rise 1 on-marked-down shutdown-sessions",
        *(f"    server {each.name} 127.0.0.1:{each.port} check port {each.rest_port}" for each in members),
        "",
    ]
    (folder / "haproxy.cfg").write_text("\n".join(lines))
    return _Process("haproxy", folder, servers._user, "-db", "-f", str(folder / "haproxy.cfg"))


async def _make_ledger(member: Member) -> None:
    connection = await asyncpg.connect(member.url("postgres"), timeout=30)
    await connection.execute("CREATE DATABASE ledger")
    await connection.close()
    await schema.migrate(member.url(), 30, handlers=SHIPPED)
    connection = await asyncpg.connect(member.url(), timeout=30)
    await connection.execute(EFFECTS)
    await connection.close()


async def _answers(port: int) -> bool:
    with suppress(OSError):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.close()
        return True
    return False
