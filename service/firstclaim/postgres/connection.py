"""Connections to the ledger's Postgres: pinned and checked when they are opened, and closed when they do not answer.

Guarantees, for every connection: `synchronous_commit` is on, or `remote_apply` where the role, the database or the
server says so; the default isolation level is READ COMMITTED, whatever they say; the server sends its warnings, without
which a COMMIT whose wait for the standby was cancelled looks like any other; the server is writable; the ledger's epoch
was read when it was opened. A connection that timed out is terminated before it returns to its pool: otherwise
asyncpg would wait, on release, until a frozen server confirms the cancellation.

A connection that the server or the network ends, or that is terminated because the server is silent, puts the epoch in
doubt: another server may answer next. One that is retired, for a reason of our own, does not: handlers that exceed
their deadline would otherwise send most duplicates to Postgres, exactly when the service is slow.
"""

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime

import asyncpg
from sqlalchemy import exc

from firstclaim.errors import LedgerUnavailable
from firstclaim.postgres.advice import describe as describe
from firstclaim.postgres.connect import connect
from firstclaim.postgres.epoch import Epoch, read_epoch
from firstclaim.postgres.joined_writes import JoiningLoop
from firstclaim.postgres.one_round_trip import OneRoundTripConnection
from firstclaim.schema_name import DEFAULT_SCHEMA

# Everything that the driver, the pool and the network raise when Postgres is unreachable or refuses.
UNAVAILABLE = (
    exc.SQLAlchemyError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    OSError,
    TimeoutError,
)

# Of these, what one row of a statement can cause: its values, its index entry, another transaction's lock on it.
ROW_FAULTS = (
    asyncpg.DataError,
    asyncpg.IntegrityConstraintViolationError,
    asyncpg.ProgramLimitExceededError,
    asyncpg.LockNotAvailableError,
    asyncpg.TransactionRollbackError,
    UnicodeError,
)

_CLOSE_SECONDS = 0.2  # on top of a statement's timeout of 1.5 s, a 503 is still sent within 2 s

_PIN = """
SELECT set_config('synchronous_commit', CASE current_setting('synchronous_commit')
                  WHEN 'remote_apply' THEN 'remote_apply' ELSE 'on' END, false) AS synchronous_commit,
       set_config('default_transaction_isolation', 'read committed', false) AS isolation,
       set_config('client_min_messages', CASE current_setting('client_min_messages')
                  WHEN 'error' THEN 'warning' ELSE current_setting('client_min_messages') END, false),
       pg_is_in_recovery() OR current_setting('default_transaction_read_only')::bool AS read_only,
       pg_backend_pid() AS pid,
       (SELECT backend_start FROM pg_stat_get_activity(pg_backend_pid())) AS backend_start,
       pg_postmaster_start_time() AS server_started_at
"""
_DURABLE = ("on", "remote_apply")
_PIN_MORE = "SELECT set_config(name, value, false) FROM unnest($1::text[], $2::text[]) AS pin (name, value)"


@dataclass(frozen=True, slots=True)
class Backend:
    """A server process of ours. Pids are reused, so its start names it too; None: it is not known yet."""

    pid: int
    started_at: datetime | None


class PinnedConnection(OneRoundTripConnection):
    """A connection with the ledger's epoch that was read when it was opened; None: no ledger yet.

    `schema` is where the ledger's tables are. `backend` serves it; None: a pooler's, which ends it or gives it to
    others when this connection is closed. `server_started_at` tells its server from another one that is reached by the
    same address after a failover. `synchronous_commit` is what it was pinned to.
    """

    schema: str = DEFAULT_SCHEMA
    backend: Backend | None = None
    server_started_at: datetime | None = None
    epoch: str | None = None
    on_loss: Callable[[object], None] | None = None
    synchronous_commit: str = "on"

    def retire(self) -> None:
        """Terminate for a reason of our own (a handler's deadline, a shutdown, a newer epoch): no doubt follows."""
        if self.on_loss is not None:
            self.remove_termination_listener(self.on_loss)
        self.terminate()

    async def close(self, *, timeout: float | None = None) -> None:
        """Close, and wait only briefly for the server: SQLAlchemy would wait 2 s for a frozen one, or for ever."""
        with suppress(*UNAVAILABLE):  # then it is aborted
            await super().close(timeout=min(timeout or _CLOSE_SECONDS, _CLOSE_SECONDS))


async def open_connection(
    dsn: str,
    timeout_seconds: float,
    epoch: Epoch | None = None,
    pins: Mapping[str, str] | None = None,
    schema: str = DEFAULT_SCHEMA,
    *,
    for_migration: bool = False,
) -> PinnedConnection:
    """`connect_unpinned` and `prepare`. Raises what they raise; `LedgerRefused` when no other attempt can help.

    `schema`: where the ledger's tables are.
    """
    connection = await connect_unpinned(dsn, timeout_seconds, schema)
    await prepare(connection, timeout_seconds, epoch, pins, for_migration=for_migration)
    return connection


async def connect_unpinned(dsn: str, timeout_seconds: float, schema: str = DEFAULT_SCHEMA) -> PinnedConnection:
    """A connection on which nothing is pinned yet. Raises what `UNAVAILABLE` lists, and `LedgerUnavailable`."""
    loop = JoiningLoop(asyncio.get_running_loop())
    connection = await connect(dsn, timeout_seconds, PinnedConnection, loop=loop)
    connection.schema = schema
    connection.backend = Backend(connection.get_server_pid(), None)
    connection.add_log_listener(connection.note_log_message)
    return connection


async def prepare(
    connection: PinnedConnection,
    timeout_seconds: float,
    epoch: Epoch | None = None,
    pins: Mapping[str, str] | None = None,
    *,
    for_migration: bool = False,
) -> None:
    """Pin, check, read the epoch. If that fails, the connection is terminated.

    Raises what `UNAVAILABLE` lists, and `LedgerUnavailable` when the pins do not hold. `pins`: further settings of the
    server, for this connection alone. `for_migration`: nothing is read in the schema, where anything may be.
    """
    try:
        async with asyncio.timeout(timeout_seconds):
            await pin(connection)
            if pins is not None:
                await connection.fetch(_PIN_MORE, list(pins), list(pins.values()))
            if not for_migration:
                connection.epoch = await read_epoch(connection)
    except BaseException:
        connection.terminate()
        raise
    if epoch is not None:
        epoch.confirm(connection.epoch)
        connection.on_loss = epoch.doubt
        connection.add_termination_listener(epoch.doubt)


async def pin(connection: PinnedConnection) -> None:
    """Pin `synchronous_commit`, the isolation level and that warnings are sent. Raises as `prepare` does."""
    pinned = await connection.fetchrow(_PIN)
    if pinned is None or pinned["read_only"]:  # a standby, or the losing side of a failover
        raise LedgerUnavailable("the server is read-only: set DATABASE_URL to the primary")
    is_direct = pinned["pid"] == connection.get_server_pid()
    connection.backend = Backend(pinned["pid"], pinned["backend_start"]) if is_direct else None
    connection.server_started_at = pinned["server_started_at"]
    connection.synchronous_commit = pinned["synchronous_commit"]
    if connection.synchronous_commit not in _DURABLE or pinned["isolation"] != "read committed":
        raise LedgerUnavailable("synchronous_commit or the isolation level cannot be pinned")
