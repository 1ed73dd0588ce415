"""The clock of one database, moved by the test: the time as the sessions of this database read it, and no others.

Guarantees: the service has no switch for it. Its statements call `clock_timestamp()` without a schema, and the
database's search_path names a schema of the tests before `pg_catalog`, where that function adds the time by which the
test has advanced the clock. An advance applies to every session at once, also within a running statement (the function
is volatile: each call sees what is committed by then). Tables are still created in `public`, which stays first.

It does not apply to sessions that were opened before (so install it first), to defaults of columns that were created
before (the ledger has none with a time), to the TTLs of Redis keys, and to the timeouts of the process.
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
    """The clock of one database, and the connection that moves it."""

    _connection: asyncpg.Connection

    async def advance(self, seconds: float) -> None:
        """Advance the clock, for every session at once."""
        await self._connection.execute(_ADVANCE, seconds)

    async def now(self) -> datetime:
        """The time as the ledger's statements read it."""
        return cast(datetime, await self._connection.fetchval(_NOW))


@asynccontextmanager
async def installed(url: str, *, standing: bool = False) -> AsyncIterator[Clock]:
    """The clock of the database at `url`, for sessions that are opened from now on, until the database is dropped.

    `standing`: time passes only when the test advances it, so that the test decides what is due.
    """
    connection = await asyncpg.connect(url, timeout=10)
    try:
        await connection.execute(_INSTALL)
        if standing:
            await connection.execute(_STAND)
        yield Clock(connection)
    finally:
        await connection.close()
