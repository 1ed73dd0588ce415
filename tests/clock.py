"""The database's clock, moved by the test: everything that one database's sessions ask for the time, and no other's.

Guarantees: the service holds no switch for it. Its statements call `clock_timestamp()` by that bare name, and the
database's search_path names a schema of ours before `pg_catalog`, where that function adds what the test has
advanced. What is advanced holds at once for every session, also within a statement that runs (the function is
volatile: each call sees what is committed by then). Tables are still made in `public`, which stays first.

What it cannot move: sessions that were opened before (so install it first), defaults of columns that were made
before (the ledger has none with a time in it), the lives of Redis's keys, and the process's own time-outs.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import cast

import asyncpg

_INSTALL = """
CREATE SCHEMA test_clock;
CREATE TABLE test_clock.reading (
    singleton    boolean PRIMARY KEY DEFAULT true CHECK (singleton),
    stands_at    timestamptz,
    ahead        interval NOT NULL DEFAULT '0'
);
INSERT INTO test_clock.reading DEFAULT VALUES;
CREATE FUNCTION test_clock.clock_timestamp() RETURNS timestamptz LANGUAGE sql VOLATILE AS
    'SELECT coalesce(stands_at, pg_catalog.clock_timestamp()) + ahead FROM test_clock.reading';
GRANT USAGE ON SCHEMA test_clock TO PUBLIC;
GRANT SELECT ON test_clock.reading TO PUBLIC;
DO $$ BEGIN
    EXECUTE format('ALTER DATABASE %I SET search_path = public, test_clock, pg_catalog', current_database());
END $$;
"""
_STAND = "UPDATE test_clock.reading SET stands_at = pg_catalog.clock_timestamp()"
_ADVANCE = "UPDATE test_clock.reading SET ahead = ahead + make_interval(secs => $1)"
_NOW = "SELECT test_clock.clock_timestamp()"


@dataclass(frozen=True, slots=True)
class Clock:
    """The clock of one database, and the connection it is moved on."""

    _connection: asyncpg.Connection

    async def advance(self, seconds: float) -> None:
        """Let this much time pass, for every session at once."""
        await self._connection.execute(_ADVANCE, seconds)

    async def now(self) -> datetime:
        """What the ledger's statements are told the time is."""
        return cast(datetime, await self._connection.fetchval(_NOW))


@asynccontextmanager
async def installed(url: str, *, standing: bool = False) -> AsyncIterator[Clock]:
    """The clock of the database at `url`, for sessions opened from now on; it stays until the database is dropped.

    `standing`: time passes only when it is advanced, so that what is due is the test's own doing.
    """
    connection = await asyncpg.connect(url, timeout=10)
    try:
        await connection.execute(_INSTALL)
        if standing:
            await connection.execute(_STAND)
        yield Clock(connection)
    finally:
        await connection.close()
