"""The ledger's epoch, which identifies the ledger that a marker in Redis belongs to.

A restore or a failover replaces the ledger, while Redis still holds the markers of the old one. A marker carries the
epoch of its ledger, and counts only under that epoch.
"""

import hashlib
import time
import weakref
from typing import Any

import asyncpg

from firstclaim.postgres.statement import statement

# The rights to ask for the timeline: a call that is refused would be an ERROR in the server's log, at every round of
# every process.
_RIGHTS = """
SELECT has_function_privilege(to_regprocedure('pg_control_system()'), 'EXECUTE')
       AND has_function_privilege(to_regprocedure('pg_walfile_name(pg_lsn)'), 'EXECUTE')
       AND has_function_privilege(to_regprocedure('pg_current_wal_insert_lsn()'), 'EXECUTE')
"""
_TIMELINE = """(SELECT system_identifier::text FROM pg_control_system())
       || '/' || substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8)"""

_NO_LEDGER = (asyncpg.UndefinedTableError, asyncpg.InvalidSchemaNameError)

# Some managed servers grant the right, and the function itself refuses, with whatever error: such a connection does not
# ask again. It does after an error of these classes: a lost connection, a conflict, no resources, a server in recovery,
# a cancelled statement.
_MOMENTARY = ("08", "40", "53", "55", "57")
_refused: "weakref.WeakSet[Any]" = weakref.WeakSet()
_may_ask: "weakref.WeakKeyDictionary[Any, bool]" = weakref.WeakKeyDictionary()


class Epoch:
    """The ledger's epoch as this process last read it. A marker counts only under an epoch confirmed recently.

    While Postgres cannot confirm the epoch, it may be down because it is being restored, so no marker counts. The
    epoch is in doubt as soon as a connection is lost, or ended because the server is silent: the server that answers
    next may be another one. A connection that ends for a reason of our own says nothing about the server.
    """

    def __init__(self, fresh_seconds: float) -> None:
        self._fresh_seconds = fresh_seconds
        self._value: str | None = None
        self._confirmed = float("-inf")
        self._unbroken_since = float("inf")

    def confirm(self, value: str | None) -> None:
        """Note what a connection has just read."""
        now = time.monotonic()
        if now - self._confirmed > self._fresh_seconds:
            self._unbroken_since = now
        self._value = value
        self._confirmed = now

    def doubt(self, _lost: object = None) -> None:
        """No marker counts until the epoch is confirmed again."""
        self._confirmed = float("-inf")

    @property
    def unbroken_seconds(self) -> float:
        """For how long it has been confirmed without a break, that is, Postgres has been reachable."""
        now = time.monotonic()
        return now - self._unbroken_since if now - self._confirmed <= self._fresh_seconds else 0

    @property
    def latest(self) -> str | None:
        """The epoch that was read last, however long ago."""
        return self._value

    @property
    def current(self) -> str | None:
        """The epoch, or None if it was not confirmed within `fresh_seconds`."""
        return self._value if time.monotonic() - self._confirmed <= self._fresh_seconds else None


class EpochStatement:
    """A statement of one row that reads the epoch as well. `columns` is its select list."""

    def __init__(self, columns: str) -> None:
        self._by_asking = {
            asks: statement(f"""
SELECT (SELECT id::text FROM firstclaim.ledger_epoch) AS stored, {_TIMELINE if asks else "NULL"} AS timeline,
{columns}
""")
            for asks in (False, True)
        }

    async def fetch(self, connection: Any, **values: object) -> tuple[str | None, Any]:
        """The epoch, and the row. Raises what asyncpg raises; see `Statement.fetch`."""
        if connection not in _may_ask:
            _may_ask[connection] = bool(await connection.fetchval(_RIGHTS))
        if _may_ask[connection] and connection not in _refused:
            try:
                return self._read(await self._by_asking[True].fetch(connection, **values))
            except _NO_LEDGER:
                raise
            except asyncpg.PostgresError as error:
                if not (error.sqlstate or "").startswith(_MOMENTARY):
                    _refused.add(connection)
        return self._read(await self._by_asking[False].fetch(connection, **values))

    @staticmethod
    def _read(rows: list[Any]) -> tuple[str | None, Any]:
        [row] = rows
        stored, timeline = row["stored"], row["timeline"]
        if stored is None:
            return None, row
        named = stored if timeline is None else f"{stored}/{timeline}"
        return hashlib.sha256(named.encode()).hexdigest()[:16], row


_ALONE = EpochStatement("true AS read")


async def read_epoch(connection: Any) -> str | None:
    """The epoch as 16 hex digits, read on a `PinnedConnection`; None while the ledger has no tables.

    It is a hash of the stored uuid, the system identifier and the timeline: a promoted standby, a point-in-time
    recovery and `firstclaim epoch rotate` each change it. On servers that hide the last two (some managed ones) it is
    a hash of the uuid alone.
    """
    try:
        epoch, _ = await _ALONE.fetch(connection)
    except _NO_LEDGER:
        return None
    return epoch
