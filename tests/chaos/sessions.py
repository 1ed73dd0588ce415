"""What the stores were asked to do: the sessions in a test's database, observed from another one, and Redis' counters.

A statement needs a session. If there is no session and none has begun, no statement was run. Neither was one if every
session began its last statement at the same instant as before. (The server's counters of transactions lag by seconds
and include its own maintenance.)
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
    """The sessions in a sandbox's database. The server publishes the counters of a session when it has ended."""

    _database: str
    _elsewhere: asyncpg.Connection

    @classmethod
    @asynccontextmanager
    async def of(cls, sandbox: Sandbox) -> AsyncIterator[Self]:
        """Observe them while the block runs."""
        connection = await asyncpg.connect(with_database(sandbox.database_url, "postgres"))
        try:
            yield cls(urlsplit(sandbox.database_url).path.strip("/"), connection)
        finally:
            await connection.close()

    async def end(self) -> None:
        """Terminate all sessions, and wait until they have ended."""
        await self._elsewhere.execute(_END, self._database)
        await eventually(self.alive, lambda alive: alive == 0)

    async def alive(self) -> int:
        """The number of current sessions."""
        return await self._count(_ALIVE)

    async def begun(self) -> int:
        """The number of sessions that have ever been established."""
        return await self._count(_BEGUN)

    async def last_statements(self) -> dict[int, datetime]:
        """The start of each session's last statement, by pid. If it has not changed, no statement was run meanwhile."""
        found = await self._elsewhere.fetch(_STATEMENTS, self._database)
        return {row["pid"]: row["query_start"] for row in found}

    async def deadlocks(self) -> int:
        """The number of deadlocks that the server has ever resolved among them."""
        return await self._count(_DEADLOCKS)

    async def _count(self, query: str) -> int:
        count: int = await self._elsewhere.fetchval(query, self._database)
        return count


@contextmanager
def counted(sandbox: Sandbox) -> Iterator[dict[str, int]]:
    """The commands that Redis ran during the block, filled in at its end."""
    found: dict[str, int] = {}
    with redis.Redis.from_url(sandbox.redis_url) as client:
        before = client.info("commandstats")
        yield found
        after = client.info("commandstats")
    for name, seen in after.items():
        if name != "cmdstat_info" and (calls := seen["calls"] - before.get(name, {"calls": 0})["calls"]):
            found[name] = calls
