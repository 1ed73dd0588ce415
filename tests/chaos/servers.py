"""Servers that belong to one test: a PostgreSQL and a Redis to stop, kill, freeze, fail over and restore.

Guarantees: a server keeps its address through every stop, kill and restore. When the block of `own_servers` ends, no
process and no file of them is left. The programs come from the wheels of the embedded servers, and run as the same
unprivileged user as those.
"""

import asyncio
import os
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from firstclaim.embedded import data_folder
from firstclaim.settings import Settings
from tests.chaos.postgres_server import PostgresServer
from tests.chaos.redis_server import RedisServer, SentinelServer
from tests.chaos.server import Server, free_port

__all__ = ["PostgresServer", "RedisServer", "Server", "Servers", "make_template", "own_servers"]


class Servers:
    """Creates servers in a folder of its own; see `own_servers`."""

    def __init__(self, folder: Path, template: Path | None) -> None:
        programs = data_folder._find_programs(Settings(database_url=None, redis_url=None))
        self._postgres, self._redis = programs["database_url"], programs["redis_url"]
        self._user = data_folder._server_user(folder / "no-cluster-yet")
        if self._user is not None:
            data_folder._grant_search(self._user, [folder / "any"], programs)
        self.folder = folder
        self._template = template
        self._made: list[Server] = []

    async def postgres(self, **settings: str) -> PostgresServer:
        """A running Postgres with an empty, migrated ledger."""
        server = PostgresServer(self._postgres, self._place("postgres"), self._user, settings)
        self._made.append(server)
        if self._template is None:
            await server.make()
        else:
            await server._run("cp", "-a", str(self._template), str(server.data))
        return await server.start()

    async def postgres_on_port(self, **settings: str) -> PostgresServer:
        """The same, which listens on a port of 127.0.0.1 too."""
        return await self.postgres(listen_addresses="127.0.0.1", port=str(free_port()), **settings)

    async def redis(self, **settings: str) -> RedisServer:
        """A running, empty Redis; an option's dashes are written as underscores."""
        options = {name.replace("_", "-"): value for name, value in settings.items()}
        server = RedisServer(self._redis, self._place("redis"), self._user, options)
        self._made.append(server)
        return await server.start()

    async def sentinel(self, master: RedisServer, quorum: int) -> SentinelServer:
        """A running Sentinel that watches `master`; `quorum` of them must agree that it has failed."""
        server = SentinelServer(self._redis, self._place("sentinel"), self._user, {})
        self._made.append(server)
        server.watch(master, quorum)
        return await server.start()

    async def end(self) -> None:
        """End all servers."""
        await asyncio.gather(*(server.end() for server in self._made))

    def _place(self, kind: str) -> Path:
        folder = self.folder / f"{kind}-{len(self._made)}"
        folder.mkdir(mode=0o700)
        if self._user is not None:
            os.chown(folder, *self._user)
        return folder


@asynccontextmanager
async def own_servers(template: Path | None = None) -> AsyncIterator[Servers]:
    """Servers for the duration of the block. With a `template` of `make_template`, each Postgres is a copy of it."""
    # Not pytest's folder: as root, that is closed to the user of the servers. Short, for the paths of the sockets.
    folder = Path(tempfile.mkdtemp(prefix="firstclaim-chaos-"))
    folder.chmod(0o711 if os.geteuid() == 0 else 0o700)
    servers = Servers(folder, template)
    try:
        yield servers
    finally:
        await servers.end()
        shutil.rmtree(folder)


async def make_template(folder: Path) -> Path:
    """Create a cluster with the migrated ledger in `folder`, and stop it; returns its data folder."""
    async with own_servers() as servers:
        server = await servers.postgres()
        await server.stop()
        folder.chmod(0o711 if os.geteuid() == 0 else 0o700)
        return server.data.rename(folder / "template")
