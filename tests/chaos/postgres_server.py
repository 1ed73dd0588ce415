"""A PostgreSQL that belongs to one test, with backups and point-in-time recovery.

It listens on a Unix socket in a private folder, so that it keeps its address through every restart; and on a port of
127.0.0.1, if its `settings` name one.
"""

import asyncio
import os
import secrets
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Final, Self

import asyncpg

from firstclaim.embedded.processes import User, _command_lines, _is_ready, _make_cluster, _popen_options
from firstclaim.migrations import schema
from tests.acceptance.harness import START_SECONDS, eventually
from tests.chaos.server import Server
from tests.stores import EFFECTS, SHIPPED, with_database

_SOCKET_PORT: Final = 5432  # only a part of the socket's name
_MIGRATE_SECONDS: Final = 30.0


class PostgresServer(Server):
    """A cluster with a migrated ledger and the `effects` table; `settings` are its options."""

    _last_signal = signal.SIGQUIT  # it frees its shared memory on SIGQUIT, but not on kill -9

    def __init__(self, program: Path, folder: Path, user: User | None, settings: dict[str, str]) -> None:
        super().__init__(program, folder, user)
        self.data = folder / "data"
        self._mark = f"firstclaim-{secrets.token_hex(8)}"
        self.settings = {
            "cluster_name": self._mark,  # shown in the title of each of its processes
            "listen_addresses": "",
            "port": str(_SOCKET_PORT),
            "unix_socket_directories": str(folder),
            "max_connections": "200",
            "shared_buffers": "32MB",
            "wal_keep_size": "1GB",  # for restores, which replay it
            **settings,
        }

    @property
    def url(self) -> str:
        """The address of the migrated database, on the socket."""
        return f"postgresql://postgres@/ledger?host={self.folder}&port={self.settings['port']}"

    @property
    def host(self) -> str:
        """Where it listens on loopback, as a part of an address."""
        return f"127.0.0.1:{self.settings['port']}"

    async def start(self) -> Self:
        """Start, and wait until it accepts connections."""
        state = self.data / "postmaster.pid"
        # None of its processes is running any more, even if its pid is in use again.
        for stale in (state, *self.folder.glob(".s.PGSQL.*")):
            stale.unlink(missing_ok=True)
        options = (part for name, value in self.settings.items() for part in ("-c", f"{name}={value}"))
        self._spawn([*options, "-D", str(self.data)])
        await self._ready(lambda: _is_ready(state))
        return self

    async def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """SIGINT: fast. SIGQUIT: immediate, without a checkpoint; the next start recovers. SIGTERM: smart."""
        await super().stop(how)

    async def restart(self, how: signal.Signals = signal.SIGINT) -> None:
        """Stop and start."""
        await self.stop(how)
        await self.start()

    async def lose(self, pid: int) -> None:
        """`kill -9` one of its processes: it ends all the others, recovers in place, and accepts connections again.

        Without effect if that process has just ended by itself.
        """
        self.send(signal.SIGKILL, pid)

        async def recovered() -> bool:
            with suppress(ProcessLookupError):
                os.kill(pid, 0)
                return False  # the server has not detected it yet: it may accept a connection and then end it
            with suppress(OSError, asyncpg.PostgresError):
                return bool(await self.execute("SELECT 1"))
            return False

        await eventually(recovered, bool, START_SECONDS)

    async def configure(self, **settings: str) -> None:
        """Change settings for all connections from now on. Those that need a restart change at the next one."""
        for name, value in settings.items():
            await self.execute(f"ALTER SYSTEM SET {name} = '{value}'")
        await self.execute("SELECT pg_reload_conf()")

    async def execute(self, statement: str, *arguments: object) -> list[asyncpg.Record]:
        """Run a statement in the migrated database."""
        connection = await asyncpg.connect(self.url, timeout=30)
        try:
            # A test may have made the role read-only: that must not stop this statement.
            await connection.execute("SET default_transaction_read_only = off")
            return await connection.fetch(statement, *arguments)
        finally:
            await connection.close()

    async def backends(self, *, state: str = "%") -> list[int]:
        """The pids of the backends of services, optionally of those in a certain state only."""
        query = "SELECT pid FROM pg_stat_activity WHERE application_name = 'firstclaim' AND state LIKE $1"
        return [row["pid"] for row in await self.execute(query, state)]

    async def backup(self) -> Path:
        """A consistent base backup as of now."""
        target = self.folder / f"backup-{secrets.token_hex(4)}"
        at = ("-h", str(self.folder), "-p", self.settings["port"], "-U", "postgres")
        await self._run("pg_basebackup", "-D", str(target), *at, "-c", "fast")
        return target

    async def restore(self, backup: Path, until: str | None = None) -> None:
        """Start again from a base backup: unchanged, or recovered to a restore point on a new timeline."""
        before = await self._replace(backup)
        if until is None:
            await self.start()
            return
        self._write("recovery.signal", "")
        self._write(
            "postgresql.auto.conf",
            f"restore_command = 'cp {before}/pg_wal/%f %p'\n"
            f"recovery_target_name = '{until}'\nrecovery_target_action = 'promote'\n",
        )
        await self.start()
        recovering = "SELECT pg_is_in_recovery() AS recovering"
        await eventually(lambda: self.execute(recovering), lambda rows: not rows[0]["recovering"], START_SECONDS)

    async def stand_by(self, backup: Path) -> None:
        """Start again from a base backup as a standby, which is read-only until it is promoted."""
        await self._replace(backup)
        self._write("standby.signal", "")
        await self.start()

    async def follow(self, primary: "PostgresServer", *, port: int) -> None:
        """Start again as a copy of `primary` that streams from it, through a port of a proxy in front of it."""
        backup = await primary.backup()
        self.settings["primary_conninfo"] = f"host=127.0.0.1 port={port} user=postgres application_name=standby"
        await self.stand_by(backup)
        streaming = "SELECT FROM pg_stat_replication WHERE application_name = 'standby' AND state = 'streaming'"
        await eventually(lambda: primary.execute(streaming), bool, START_SECONDS)

    async def promote(self) -> None:
        """End the standby's recovery: it is a primary, on a new timeline."""
        await self.execute("SELECT pg_promote()")

    @property
    def socket(self) -> Path:
        """Where it listens."""
        return self.folder / f".s.PGSQL.{self.settings['port']}"

    async def restore_point(self, name: str) -> None:
        """Create a restore point at this moment."""
        await self.execute("SELECT pg_create_restore_point($1)", name)

    def pids(self) -> list[int]:
        title = f"postgres: {self._mark}: "
        workers = [pid for pid, line in _command_lines() if title in line]
        return [self.pid, *workers] if self.running else workers

    async def make(self) -> None:
        """Create a cluster with the migrated database, and stop it."""
        await asyncio.to_thread(_make_cluster, self._program, self.data, self._user)
        await self.start()
        connection = await asyncpg.connect(with_database(self.url, "postgres"), timeout=30)
        try:
            await connection.execute("CREATE DATABASE ledger")
        finally:
            await connection.close()
        await schema.migrate(self.url, _MIGRATE_SECONDS, handlers=SHIPPED)
        await self.execute(EFFECTS)
        await self.stop()

    async def _replace(self, backup: Path) -> Path:
        """Stop, and replace the data by the backup; returns the folder of the old data."""
        if self.running:
            await self.stop()
        before = self.folder / f"before-{secrets.token_hex(4)}"
        self.data.rename(before)
        await self._run("cp", "-a", str(backup), str(self.data))
        return before

    def _write(self, name: str, text: str) -> None:
        path = self.data / name
        path.write_text(text)
        path.chmod(0o600)
        if self._user is not None:
            os.chown(path, *self._user)

    async def _run(self, program: str, *arguments: str) -> None:
        beside = self._program.with_name(program)
        command = [str(beside) if beside.exists() else program, *arguments]

        def run() -> subprocess.CompletedProcess[bytes]:
            return subprocess.run(
                command, capture_output=True, check=False, **_popen_options(signal.SIGKILL, self._user)
            )

        done = await asyncio.to_thread(run)
        assert done.returncode == 0, done.stderr.decode(errors="replace")
