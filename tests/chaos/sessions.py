"""What was asked of the stores: the sessions in a test's database, watched from another one, and Redis' own count.

Who runs a statement must have a session: where there is none, and none has begun, none was run; nor where each that
there is began its last statement when it had before. (The server's own counts of transactions lag by seconds, and its
upkeep is among them.)
"""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Self
from urllib.parse import urlsplit

import asyncpg
import redis

from tests.acceptance.harness import Sandbox, eventually
from tests.stores import with_database

_ALIVE = "SELECT count(*) FROM pg_stat_activity WHERE datname = $1 AND backend_type = 'client backend'"
_END = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1 AND backend_type = 'client backend'"
_STATEMENTS = """
SELECT pid, query_start FROM pg_stat_activity WHERE datname = $1 AND backend_type = 'client backend'
"""
_BEGUN = "SELECT sessions FROM pg_stat_database WHERE datname = $1"
_DEADLOCKS = "SELECT deadlocks FROM pg_stat_database WHERE datname = $1"


@dataclass(frozen=True, slots=True)
class Sessions:
    """Of a sandbox's database. What the server counts of a session is there to see once that has ended."""

    _database: str
    _elsewhere: asyncpg.Connection

    @classmethod
    @asynccontextmanager
    async def of(cls, sandbox: Sandbox) -> AsyncIterator[Self]:
        """For as long as the block runs."""
        connection = await asyncpg.connect(with_database(sandbox.database_url, "postgres"))
        try:
            yield cls(urlsplit(sandbox.database_url).path.strip("/"), connection)
        finally:
            await connection.close()

    async def end(self) -> None:
        """End all of them, and wait until they have left."""
        await self._elsewhere.execute(_END, self._database)
        await eventually(self.alive, lambda alive: alive == 0)

    async def alive(self) -> int:
        """How many there are now."""
        return await self._count(_ALIVE)

    async def begun(self) -> int:
        """How many there were, ever."""
        return await self._count(_BEGUN)

    async def last_statements(self) -> dict[int, datetime]:
        """When each of them began its last statement, by its pid: the same again, and none was run meanwhile."""
        found = await self._elsewhere.fetch(_STATEMENTS, self._database)
        return {row["pid"]: row["query_start"] for row in found}

    async def deadlocks(self) -> int:
        """How many deadlocks the server has broken among them, ever."""
        return await self._count(_DEADLOCKS)

    async def _count(self, query: str) -> int:
        count: int = await self._elsewhere.fetchval(query, self._database)
        return count


@contextmanager
def counted(sandbox: Sandbox) -> Iterator[dict[str, int]]:
    """The commands that Redis ran meanwhile, filled in when the block ends."""
    found: dict[str, int] = {}
    with redis.Redis.from_url(sandbox.redis_url) as client:
        before = client.info("commandstats")
        yield found
        after = client.info("commandstats")
    for name, seen in after.items():
        if name != "cmdstat_info" and (calls := seen["calls"] - before.get(name, {"calls": 0})["calls"]):
            found[name] = calls
