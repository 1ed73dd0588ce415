"""Connections to the ledger's Postgres: pinned, checked, and given up for good when they stop answering.

Guarantees, for every connection that a pool hands out: `synchronous_commit` is on and the default isolation
is READ COMMITTED (whatever the role or the database says), the server is writable, and the ledger's epoch
was read on it when it was opened. A connection that timed out is terminated before it goes back: asyncpg
would otherwise wait, on release, for a frozen server to confirm the cancellation.
"""

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

import asyncpg
from asyncpg.transaction import Transaction
from sqlalchemy import event, exc
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import PoolResetState

from service.errors import HandlerRuleBroken, LedgerUnavailable

# Everything the driver, the pool and the network raise when Postgres is away or says no.
UNAVAILABLE = (
    exc.SQLAlchemyError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    OSError,
    TimeoutError,
)

# Of these, what one row of a statement can be the cause of: its values, its index entry, another's lock on it.
ROW_FAULTS = (
    asyncpg.DataError,
    asyncpg.IntegrityConstraintViolationError,
    asyncpg.ProgramLimitExceededError,
    asyncpg.LockNotAvailableError,
    asyncpg.TransactionRollbackError,
    UnicodeError,
)

_HANDLER_RUNS = "firstclaim_handler_runs"
_REFUSED = "firstclaim_refused"
_MUST_NOT_END = (
    "a handler must not commit or roll back: its transaction carries the completion mark "
    "(use context.connection.begin_nested() for a part that may fail)"
)
_GOODBYE_SECONDS = 0.2  # with it on top a statement's timeout of 1.5 s is still a 503 within 2 s

_PIN = """
SELECT set_config('synchronous_commit', 'on', false) AS synchronous_commit,
       set_config('default_transaction_isolation', 'read committed', false) AS isolation,
       pg_is_in_recovery() OR current_setting('default_transaction_read_only')::bool AS read_only
"""
_PIN_MORE = "SELECT set_config(name, value, false) FROM unnest($1::text[], $2::text[]) AS pin (name, value)"
_EPOCH = "SELECT id::text FROM ledger_epoch"
_TIMELINE = """
SELECT (SELECT system_identifier::text FROM pg_control_system())
       || '/' || substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8)
"""


class PinnedConnection(asyncpg.Connection):
    """An asyncpg connection that remembers the ledger epoch read when it was opened; None: no ledger yet."""

    epoch: str | None = None

    # Of a handler, from `begin` until whoever began it has ended it.
    handling: Transaction | None = None

    async def close(self, *, timeout: float | None = None) -> None:
        """Say goodbye, but not for long: of a frozen server SQLAlchemy would wait 2 s for it, or for ever."""
        with suppress(TimeoutError):  # it is aborted then
            await super().close(timeout=min(timeout or _GOODBYE_SECONDS, _GOODBYE_SECONDS))


class Epoch:
    """The ledger's epoch as this process last saw it; a marker counts only under a freshly confirmed one.

    A restore swaps the ledger under a Redis that still holds the old one's markers. While Postgres cannot
    confirm the epoch (it is down: perhaps being restored), no marker may answer for it. It is in doubt as soon as a
    connection is lost: the server that it went to may not be the one that answers next.
    """

    def __init__(self, fresh_seconds: float) -> None:
        self._fresh_seconds = fresh_seconds
        self._value: str | None = None
        self._confirmed = float("-inf")

    def confirm(self, value: str | None) -> None:
        """Note what a connection has just read."""
        self._value = value
        self._confirmed = time.monotonic()

    def doubt(self, _lost: object = None) -> None:
        """No marker counts until the epoch is confirmed anew."""
        self._confirmed = float("-inf")

    @property
    def latest(self) -> str | None:
        """The epoch that was read last, however long ago."""
        return self._value

    @property
    def current(self) -> str | None:
        """The epoch, or None when it was not confirmed lately."""
        return self._value if time.monotonic() - self._confirmed <= self._fresh_seconds else None


async def read_epoch(connection: Any) -> str | None:
    """The epoch as 16 hex digits, from an asyncpg connection; None while the ledger has no tables.

    A hash of the stored uuid, the system identifier and the timeline: a promoted standby, a point-in-time
    recovery and `firstclaim epoch rotate` each change it. Servers that hide the last two (some managed ones)
    leave the uuid.
    """
    try:
        stored = await connection.fetchval(_EPOCH)
    except asyncpg.UndefinedTableError:
        return None
    with suppress(asyncpg.PostgresError):
        stored += "/" + (await connection.fetchval(_TIMELINE) or "")
    return hashlib.sha256(stored.encode()).hexdigest()[:16]


async def open_connection(
    dsn: str, timeout_seconds: float, epoch: Epoch | None = None, pins: Mapping[str, str] | None = None
) -> PinnedConnection:
    """Connect, pin, check; raises what `UNAVAILABLE` lists, or `LedgerUnavailable` when the pins do not hold.

    `pins`: more of the server's settings, for this connection alone.
    """
    connection: PinnedConnection = await asyncpg.connect(
        dsn,
        timeout=timeout_seconds,
        connection_class=PinnedConnection,
        server_settings={"application_name": "firstclaim"},
    )
    try:
        async with asyncio.timeout(timeout_seconds):
            pinned = await connection.fetchrow(_PIN)
            if pinned is None or pinned["read_only"]:  # a standby, or the losing side of a failover
                raise LedgerUnavailable("the server is read-only")
            if (pinned["synchronous_commit"], pinned["isolation"]) != ("on", "read committed"):
                raise LedgerUnavailable("synchronous_commit or the isolation level cannot be pinned")
            if pins is not None:
                await connection.fetch(_PIN_MORE, list(pins), list(pins.values()))
            connection.epoch = await read_epoch(connection)
    except BaseException:
        connection.terminate()
        raise
    if epoch is not None:
        epoch.confirm(connection.epoch)
        connection.add_termination_listener(epoch.doubt)
    return connection


def create_engine(
    dsn: str,
    *,
    size: int,
    timeout_seconds: float,
    queue_seconds: float,
    epoch: Epoch,
    pins: Mapping[str, str] | None = None,
) -> AsyncEngine:
    """A pool of exactly `size` connections; opens nothing yet. No overflow: that would reconnect per request.

    SQLAlchemy begins no transaction on them (`AUTOCOMMIT`): the ledger's statements are one each, and around a
    handler `begin` does it, on the driver, where it costs half.

    `timeout_seconds` is for connecting; `queue_seconds` is how long a caller waits for a connection that is in
    use: a burst of ours that queues here is no sign of Postgres being away. `pins`: see `open_connection`.
    """
    engine = create_async_engine(
        "postgresql+asyncpg://",
        async_creator=lambda: open_connection(dsn, timeout_seconds, epoch, pins),
        pool_size=size,
        max_overflow=0,
        pool_timeout=queue_seconds,
        hide_parameters=True,
        isolation_level="AUTOCOMMIT",
    )
    event.listen(engine.sync_engine, "checkout", partial(_refuse_outdated, epoch))
    event.listen(engine.sync_engine, "commit", _refuse_in_handler)
    event.listen(engine.sync_engine, "rollback", _refuse_in_handler)
    event.listen(engine.sync_engine, "reset", _end_transaction)
    return engine


def _refuse_outdated(epoch: Epoch, dbapi_connection: Any, _record: Any, _proxy: Any) -> None:
    """The pool then connects anew, and nobody sees an error.

    A server that restarted has closed the socket. And what a connection has read as the ledger's epoch goes
    into the markers of what it commits: after a rotation, markers of the old one would never count again.
    """
    if not is_current(dbapi_connection.driver_connection, epoch):
        raise exc.DisconnectionError


def is_current(connection: PinnedConnection, epoch: Epoch) -> bool:
    """Whether it is open, and markers of what it commits will count."""
    return not connection.is_closed() and connection.epoch == epoch.latest


def _end_transaction(dbapi_connection: Any, _record: Any, _state: PoolResetState) -> None:
    """Never back into the pool with a transaction: the next event's handler would commit what this one wrote."""
    connection = dbapi_connection.driver_connection
    if connection.handling is not None:
        connection.terminate()  # the pool then connects anew


def _refuse_in_handler(connection: Any) -> None:
    if not connection.invalidated and connection.info.get(_HANDLER_RUNS):
        connection.info[_REFUSED] = True
        raise HandlerRuleBroken(_MUST_NOT_END)


def handler_runs(connection: AsyncConnection, running: bool) -> None:
    """While `running`, commit() and rollback() on `connection` raise `HandlerRuleBroken`."""
    if (info := _info(connection)) is not None:
        info[_HANDLER_RUNS] = running
        if running:
            info.pop(_REFUSED, None)


def check_not_refused(connection: AsyncConnection) -> None:
    """Raise `HandlerRuleBroken` if the handler swallowed that: it takes for committed or undone what is not."""
    if (info := _info(connection)) is not None and info.get(_REFUSED):
        raise HandlerRuleBroken(_MUST_NOT_END)


def _info(connection: AsyncConnection) -> dict[Any, Any] | None:
    """What is noted beside a pooled connection; None when it is gone."""
    sync = connection.sync_connection
    return None if sync is None or sync.closed or sync.invalidated else sync.info


def driver(connection: AsyncConnection) -> PinnedConnection:
    """The asyncpg connection underneath; raises `LedgerUnavailable` when it is gone already."""
    sync = connection.sync_connection
    found = None if sync is None or sync.closed or sync.invalidated else sync.connection.driver_connection
    if not isinstance(found, PinnedConnection):
        raise LedgerUnavailable("the connection is gone")
    return found


async def begin(connection: AsyncConnection) -> None:
    """Begin the transaction that a handler works in."""
    underneath = driver(connection)
    underneath.handling = underneath.transaction()
    await underneath.handling.start()


async def commit(connection: AsyncConnection) -> None:
    """Commit what `begin` began."""
    underneath = driver(connection)
    if underneath.handling is None:
        raise LedgerUnavailable("the transaction is gone")
    await underneath.handling.commit()
    underneath.handling = None


async def roll_back(connection: AsyncConnection, timeout_seconds: float | None = None) -> None:
    """Roll back what `begin` began, if it is still open; nothing when it was committed. Raises TimeoutError."""
    with suppress(LedgerUnavailable):  # a lost connection has nothing to roll back
        underneath = driver(connection)
        if underneath.handling is not None and underneath.is_in_transaction():
            async with asyncio.timeout(timeout_seconds):
                await underneath.handling.rollback()
            underneath.handling = None


async def discard(connection: AsyncConnection) -> None:
    """Close for good without waiting for the server, which may be frozen, and free the place in the pool."""
    with suppress(LedgerUnavailable):
        driver(connection).terminate()
        await connection.invalidate()
    await connection.close()


@asynccontextmanager
async def borrow(engine: AsyncEngine, timeout_seconds: float) -> AsyncIterator[AsyncConnection]:
    """A pooled connection for one short piece of work, which may take `timeout_seconds`.

    Raises `LedgerUnavailable` for whatever Postgres, the network or the pool says, without their words
    where these could hold a value.
    """
    try:
        connection = await engine.connect()
        try:
            async with asyncio.timeout(timeout_seconds):
                yield connection
        except (TimeoutError, asyncio.CancelledError):
            await discard(connection)
            raise
        finally:
            await connection.close()
    except UNAVAILABLE as error:
        raise LedgerUnavailable(describe(error)) from error


def describe(error: BaseException) -> str:
    """Class and SQLSTATE: enough to act on, and no value of a row or of a URL in it."""
    original: BaseException = error
    if isinstance(error, exc.DBAPIError) and error.orig is not None:
        original = error.orig.__cause__ or error.orig  # the driver's own is the cause of what SQLAlchemy makes of it
    state = getattr(original, "sqlstate", None)
    return type(original).__name__ + (f" ({state})" if state else "")
