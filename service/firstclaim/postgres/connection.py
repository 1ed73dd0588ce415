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
from contextlib import asynccontextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import asyncpg
from sqlalchemy import exc

from firstclaim.errors import LedgerUnavailable

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

    async def close(self, *, timeout: float | None = None) -> None:
        """Say goodbye, but not for long: of a frozen server SQLAlchemy would wait 2 s for it, or for ever."""
        with suppress(*UNAVAILABLE):  # it is aborted then
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


def is_current(connection: PinnedConnection, epoch: Epoch) -> bool:
    """Whether it is open, and markers of what it commits will count.

    A server that restarted has closed the socket. And what a connection has read as the ledger's epoch goes into the
    markers of what it commits: after a rotation, markers of the old one would never count again.
    """
    return not connection.is_closed() and connection.epoch == epoch.latest


class Pool:
    """Connections for short pieces of work: `size` at most, opened as they are needed.

    Our own: SQLAlchemy's takes longer than a short statement, and the driver's resets a connection at each return. One
    that the server has just ended is replaced once the driver has noticed; a statement a moment before that fails.

    `timeout_seconds` is for connecting; `queue_seconds` is how long a caller waits for a connection that is in
    use: a burst of ours that queues here is no sign of Postgres being away. `pins`: see `open_connection`.
    """

    def __init__(
        self,
        dsn: str,
        *,
        size: int,
        timeout_seconds: float,
        queue_seconds: float,
        epoch: Epoch,
        pins: Mapping[str, str] | None = None,
    ) -> None:
        self._open = partial(open_connection, dsn, timeout_seconds, epoch, pins)
        self._queue_seconds = queue_seconds
        self._epoch = epoch
        self._places = asyncio.Semaphore(size)
        self._free: list[PinnedConnection] = []
        self._closed = False

    @asynccontextmanager
    async def borrow(self, timeout_seconds: float) -> AsyncIterator[PinnedConnection]:
        """A connection for one piece of work, which may take `timeout_seconds`.

        Raises `LedgerUnavailable` for whatever Postgres, the network or the queue says, without their words
        where these could hold a value.
        """
        try:
            connection = await self._take()
            try:
                async with asyncio.timeout(timeout_seconds):
                    yield connection
            except (TimeoutError, asyncio.CancelledError):
                connection.terminate()
                raise
            finally:
                self._give_back(connection)
        except UNAVAILABLE as error:
            raise LedgerUnavailable(describe(error)) from error

    def renew(self) -> None:
        """Give up what is free: a connection was lost, and with it perhaps all of them, without having noticed yet."""
        while self._free:
            self._free.pop().terminate()

    async def close(self) -> None:
        """Close what is free, without waiting for a frozen server; what is borrowed is closed when it comes back."""
        self._closed = True
        free, self._free = self._free, []
        await asyncio.gather(*(connection.close() for connection in free))

    async def _take(self) -> PinnedConnection:
        async with asyncio.timeout(self._queue_seconds) if self._places.locked() else nullcontext():
            await self._places.acquire()
        try:
            while self._free:
                connection = self._free.pop()
                if is_current(connection, self._epoch):
                    return connection
                connection.terminate()
            return await self._open()
        except BaseException:
            self._places.release()
            raise

    def _give_back(self, connection: PinnedConnection) -> None:
        if not connection.is_closed():
            if self._closed or connection.is_in_transaction():
                connection.terminate()
            else:
                self._free.append(connection)
        self._places.release()


def describe(error: BaseException) -> str:
    """Class and SQLSTATE: enough to act on, and no value of a row or of a URL in it."""
    original: BaseException = error
    if isinstance(error, exc.DBAPIError) and error.orig is not None:
        original = error.orig.__cause__ or error.orig  # the driver's own is the cause of what SQLAlchemy makes of it
    state = getattr(original, "sqlstate", None)
    return type(original).__name__ + (f" ({state})" if state else "")
