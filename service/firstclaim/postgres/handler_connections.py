"""The connections that handlers work on, kept open between events, and what a handler may do with its own.

Guarantees: one handler at a time has a connection, and gets it in no transaction and under the ledger's latest epoch.
While it runs it cannot commit, roll back, or go on on another connection when this one is lost, and once it has ended
it reaches nothing any more. One that failed leaves nothing: its transaction is rolled back, the session's advisory
locks, which alone no rollback takes back, are freed, and where it had ended its transaction the connection is closed.
SQLAlchemy, which handlers may use, is not in the way of those that do not: its connection object is made when it is
asked for. (Making one for each event, and the way into its pool and back, took a tenth of what an event costs.)
"""

import asyncio
from contextlib import suppress
from functools import partial
from typing import Any

from sqlalchemy import Connection, event, exc
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import PoolProxiedConnection, PoolResetState

from firstclaim.errors import HandlerRuleBroken, LedgerUnavailable
from firstclaim.postgres.connection import Epoch, PinnedConnection, is_current, open_connection

_MUST_NOT_END = (
    "a handler must not commit or roll back: its transaction carries the completion mark "
    "(use context.connection.begin_nested() for a part that may fail)"
)
_HAS_ENDED = "this handler has ended: nothing more can be written in its transaction"


class HandlerConnection:
    """One handler's hold of a connection."""

    def __init__(self, engine: AsyncEngine, pooled: PoolProxiedConnection) -> None:
        self._engine = engine
        self._pooled = pooled
        self._raw: PinnedConnection = pooled.driver_connection  # type: ignore[assignment]
        self._connection: AsyncConnection | None = None
        self._over = False
        self._used = False

    @property
    def driver(self) -> PinnedConnection:
        """The asyncpg connection; raises `LedgerUnavailable` when it is gone already."""
        if self._raw.is_closed():
            raise LedgerUnavailable("the connection is gone")
        return self._raw

    @property
    def connection(self) -> AsyncConnection:
        """The same as SQLAlchemy has it. Raises `HandlerRuleBroken` once the handler has ended."""
        if self._over:
            raise HandlerRuleBroken(_HAS_ENDED)
        return self._around()

    async def fetch(self, sql: str, *values: Any) -> list[Any]:
        """Run one statement; raises what asyncpg raises, and `HandlerRuleBroken` once the handler has ended."""
        if self._over:  # the transaction is another handler's by now
            raise HandlerRuleBroken(_HAS_ENDED)
        return await self._raw.fetch(sql, *values)

    def is_current(self, epoch: Epoch) -> bool:
        """See `firstclaim.postgres.connection.is_current`."""
        return is_current(self._raw, epoch)

    async def begin(self) -> None:
        """Begin the transaction that a handler works in."""
        raw = self.driver
        raw.handling = raw.transaction()
        await raw.handling.start()

    def start(self) -> None:
        """The handler runs: from now on commit() and rollback() raise `HandlerRuleBroken`."""
        self._raw.handler_runs, self._raw.handler_refused = True, False
        self._used = True

    def stop(self) -> None:
        """It has ended, or is over."""
        self._over = True
        self._raw.handler_runs = False

    def check_not_refused(self) -> None:
        """Raise `HandlerRuleBroken` if the handler swallowed that: it takes for committed or undone what is not."""
        if self._raw.handler_refused:
            raise HandlerRuleBroken(_MUST_NOT_END)

    async def commit(self) -> None:
        """Commit what `begin` began."""
        raw = self.driver
        if raw.handling is None:
            raise LedgerUnavailable("the transaction is gone")
        await raw.handling.commit()
        raw.handling = None

    async def roll_back(self, timeout_seconds: float | None = None) -> None:
        """Roll back what `begin` began, if it is still open; nothing when it was committed. Raises TimeoutError."""
        raw = self._raw
        if not raw.is_closed() and raw.handling is not None and raw.is_in_transaction():
            async with asyncio.timeout(timeout_seconds):
                await raw.handling.rollback()
                if self._used:
                    await raw.execute("SELECT pg_advisory_unlock_all()")
            raw.handling = None

    async def discard(self) -> None:
        """Close for good without waiting for the server, which may be frozen, and free the place in the pool."""
        self.stop()
        self._raw.terminate()
        connection = self._around()
        with suppress(exc.SQLAlchemyError):  # the handler closed it, or SQLAlchemy saw it break
            await connection.invalidate()
        await connection.close()

    async def leave(self) -> None:
        """Close for good with a goodbye, for which a frozen server gets a moment."""
        await self._raw.close()
        await self.discard()

    async def vacate(self) -> PoolProxiedConnection | None:
        """What the next handler can have; None: nothing, for this one broke, closed or altered it."""
        self.stop()
        connection = self._connection
        ended_well = not self._raw.is_closed() and self._raw.handling is None
        if not ended_well or (connection is not None and _is_altered(connection)):
            await self.discard()
            return None
        if connection is not None and (sync := connection.sync_connection) is not None:
            pooled: Any = self._pooled
            pooled._counter += 1  # noqa: SLF001  (SQLAlchemy counts users: the close below, the handler's end, leaves it)
            sync.close()
        return self._pooled

    def _around(self) -> AsyncConnection:
        if self._connection is None:
            # It is never to connect anew: what a handler writes there is in no transaction, and no retry knows of it.
            sync = Connection(self._engine.sync_engine, connection=self._pooled, _allow_revalidate=False)
            self._connection = AsyncConnection(self._engine, sync_connection=sync)
        return self._connection


class HandlerConnections:
    """Exactly `size` connections, opened as they are needed; `size` handlers at once is the caller's business.

    SQLAlchemy begins no transaction on them (`AUTOCOMMIT`): around a handler `begin` does it, on the driver, where it
    costs half. `timeout_seconds` is for connecting; `queue_seconds` for one that is being closed.
    """

    def __init__(
        self,
        dsn: str,
        *,
        size: int,
        timeout_seconds: float,
        queue_seconds: float,
        epoch: Epoch,
    ) -> None:
        self._engine = create_async_engine(
            "postgresql+asyncpg://",
            async_creator=partial(open_connection, dsn, timeout_seconds, epoch),
            pool_size=size,
            max_overflow=0,
            pool_timeout=queue_seconds,
            hide_parameters=True,
            isolation_level="AUTOCOMMIT",
        )
        self._epoch = epoch
        self._free: list[PoolProxiedConnection] = []
        event.listen(self._engine.sync_engine, "checkout", partial(_refuse_outdated, epoch))
        event.listen(self._engine.sync_engine, "commit", _refuse_in_handler)
        event.listen(self._engine.sync_engine, "rollback", _refuse_in_handler)
        event.listen(self._engine.sync_engine, "reset", _end_transaction)

    async def take(self) -> HandlerConnection:
        """A seat in no transaction, given up by `give_back` or by its `discard`; raises what `UNAVAILABLE` lists."""
        while self._free:
            seat = HandlerConnection(self._engine, self._free.pop())
            if seat.is_current(self._epoch):
                return seat
            await seat.discard()
        return HandlerConnection(self._engine, await self._engine.raw_connection())

    async def give_back(self, seat: HandlerConnection) -> None:
        """Its connection is for the next one to take, or is closed."""
        if (pooled := await seat.vacate()) is not None:
            self._free.append(pooled)

    async def close(self) -> None:
        """Close all that are free."""
        free = [HandlerConnection(self._engine, pooled) for pooled in self._free]
        self._free.clear()
        await asyncio.gather(*(seat.leave() for seat in free))
        await self._engine.dispose()


def _is_altered(connection: AsyncConnection) -> bool:
    sync = connection.sync_connection
    return sync is None or sync.closed or "isolation_level" in sync.get_execution_options()


def _refuse_outdated(epoch: Epoch, dbapi_connection: Any, _record: Any, _proxy: Any) -> None:
    """The pool then connects anew, and nobody sees an error."""
    if not is_current(dbapi_connection.driver_connection, epoch):
        raise exc.DisconnectionError


def _end_transaction(dbapi_connection: Any, _record: Any, _state: PoolResetState) -> None:
    """Never back into the pool with a transaction: the next event's handler would commit what this one wrote."""
    connection = dbapi_connection.driver_connection
    if connection.handling is not None:
        connection.terminate()  # the pool then connects anew


def _refuse_in_handler(connection: Any) -> None:
    if connection.closed:  # lost, or the handler's own doing: there is nothing to end
        return
    raw = connection.connection.driver_connection
    if raw.handler_runs:
        raw.handler_refused = True
        raise HandlerRuleBroken(_MUST_NOT_END)
