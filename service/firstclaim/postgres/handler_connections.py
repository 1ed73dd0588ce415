"""The connections that handlers work on: kept open between events, with limits on what a handler may do on them.

Guarantees: at most one handler at a time has a connection. The handler gets it outside a transaction and under the
ledger's latest epoch. While the handler runs, it cannot commit, roll back, or continue on another connection when this
one is lost (`firstclaim.postgres.handler_sqlalchemy` has what SQLAlchemy sees). Once it has ended, it can use nothing
of the connection. A handler that failed leaves nothing behind: its transaction is rolled back, the session's advisory
locks, which no rollback frees, are released, and the connection is closed if the handler had ended its transaction.

Handlers may use SQLAlchemy, and those that do not use it do not pay for it: its connection object is made on first
use. (One for each event, checked out of SQLAlchemy's pool on the event loop, took a tenth of what an event costs.)
Each connection has an engine of its own, whose pool can hand out this one connection only. So SQLAlchemy, which
replaces a lost connection by itself, has none to replace it with.
"""

import asyncio
from contextlib import suppress
from typing import Any

import asyncpg
from sqlalchemy import event, exc
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import AssertionPool

from firstclaim.errors import HandlerRuleBroken, LedgerUnavailable
from firstclaim.follow_up import Outbox
from firstclaim.postgres.connection import PinnedConnection
from firstclaim.postgres.handler_sqlalchemy import HandlerRules, LoopConnection, RunOnLoop, Sessions
from firstclaim.postgres.one_round_trip import NotCommitted
from firstclaim.postgres.places import Places
from firstclaim.postgres.statement import Statement

_MUST_NOT_CLOSE = "a handler must not close its connection: its transaction carries the completion mark"
_HAS_ENDED = "this handler has ended: nothing more can be written in its transaction"
_REFUSED = "a handler must not swallow the TimeoutError of its deadline: a statement of it was not executed"
_GONE = "the connection is gone"
_LOST = "this handler's connection is lost, and its transaction with it: it cannot continue on another one"


class _OnePool(AssertionPool):
    """SQLAlchemy's pool of one connection, which raises when a second checkout is attempted."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, store_traceback=False, **options)  # a traceback costs more than the checkout


class _PooledConnection:
    """One open connection: the driver's, SQLAlchemy's engine over it, and the state of the handler that has it.

    SQLAlchemy begins no transaction on it (`AUTOCOMMIT`). `HandlerConnection.begin` does, on the driver.
    """

    def __init__(self, driver: PinnedConnection) -> None:
        self.driver = driver
        self.has_begun = False  # a transaction, which nobody has ended yet but perhaps the handler
        self.rules = HandlerRules()
        self._handed_out = False
        self.engine: AsyncEngine = create_async_engine(
            "postgresql+asyncpg://",
            async_creator=self._hand_out,
            poolclass=_OnePool,
            pool_reset_on_return=None,  # what a handler leaves is rolled back on the driver, or terminated
            hide_parameters=True,
            isolation_level="AUTOCOMMIT",
        )
        event.listen(self.engine.sync_engine, "commit", self.rules.refuse_commit)
        event.listen(self.engine.sync_engine, "rollback", self.rules.note_rollback)
        event.listen(self.engine.sync_engine, "before_cursor_execute", self.rules.note_cursor)
        event.listen(self.engine.sync_engine, "after_cursor_execute", self.rules.note_executed_cursor)

    async def prepare(self) -> None:
        """Let SQLAlchemy do what it does on a new connection, so that its later checkouts need no round trip."""
        async with self.engine.connect():
            pass

    async def _hand_out(self) -> PinnedConnection:
        if self._handed_out:
            raise exc.ResourceClosedError(_LOST)
        self._handed_out = True
        return self.driver


class HandlerConnection:
    """One handler's use of a connection."""

    def __init__(self, pooled: _PooledConnection, places: Places) -> None:
        self._pooled = pooled
        self._places = places
        self._has_place = True
        self._connection: AsyncConnection | None = None
        self._sessions: Sessions | None = None
        self._has_ended = False
        self._refused = False
        self._used = False

    @property
    def driver(self) -> PinnedConnection:
        """The asyncpg connection. Raises `LedgerUnavailable` if it is closed."""
        if self._pooled.driver.is_closed():
            raise LedgerUnavailable(_GONE)
        return self._pooled.driver

    @property
    def is_closed(self) -> bool:
        """Whether the connection is lost, or was closed; its backend may still be there."""
        return self._pooled.driver.is_closed()

    @property
    def connection(self) -> AsyncConnection:
        """SQLAlchemy's view of it. Raises `HandlerRuleBroken` once the handler has ended."""
        if self._has_ended:
            raise HandlerRuleBroken(_HAS_ENDED)
        if self._connection is None:
            self._connection = LoopConnection.join(self._pooled.engine, self._pooled.rules)
        return self._connection

    @property
    def synchronous_commit(self) -> str:
        """The level that its commits are pinned to."""
        return self._pooled.driver.synchronous_commit

    def session(self, **options: Any) -> AsyncSession:
        """A session in a savepoint of the transaction. Raises as `connection` does."""
        return self._made_sessions.make_async(self.connection, **options)

    async def sync_session(self, run: RunOnLoop[Any], **options: Any) -> Session:
        """The same for the handler's thread, whose statements go through `run`."""
        return self._made_sessions.make(self.connection, run, **options)

    @property
    def _made_sessions(self) -> Sessions:
        if self._sessions is None:
            self._sessions = Sessions()
        return self._sessions

    async def fetch(self, sql: str, *values: Any) -> list[Any]:
        """Run one statement. Raises what asyncpg raises, and `HandlerRuleBroken` once the handler has ended."""
        if self._has_ended:  # the connection may be in another handler's transaction by now
            raise HandlerRuleBroken(_HAS_ENDED)
        self._pooled.rules.check()
        self._pooled.rules.note_statement(sql)
        try:
            rows: list[Any] = await self._pooled.driver.fetch(sql, *values)
        except BaseException as error:
            self._pooled.rules.note_error(error)
            raise
        self._pooled.rules.note_executed(sql)
        return rows

    @property
    def sql_error(self) -> BaseException | None:
        """The last error that Postgres gave to a statement of the handler's, if there was one."""
        return self._pooled.rules.sql_error

    async def begin(self, first: Statement, **values: object) -> list[Any]:
        """Begin the transaction that the handler works in. Returns the rows of its first statement.

        One round trip. Raises `LedgerUnavailable`, and what asyncpg raises: then `discard` the connection.
        """
        driver = self.driver
        self._pooled.has_begun = True
        return await driver.begin(*first.on(driver, values))

    @property
    def ended_by_handler(self) -> bool:
        """Whether it has ended the transaction that was begun for it: what it executes is committed at once."""
        driver = self._pooled.driver
        return self._pooled.has_begun and not driver.is_closed() and not driver.is_in_transaction()

    def start(self, outbox: Outbox) -> None:
        """The handler starts: from now on it must not end its transaction. `outbox`: what it enqueues."""
        self._pooled.rules.start(outbox)
        self._used = True

    def stop(self) -> None:
        """The handler has ended, or is past its deadline."""
        self._has_ended = True
        self._pooled.rules.stop()

    def refuse(self) -> None:
        """A statement of the handler's thread is refused at the deadline: what it returns now does not count.

        The event loop may be late, and see that the thread has returned before it sees that the deadline has passed.
        """
        self._refused = True

    def check_rules(self) -> None:
        """Raise `HandlerRuleBroken` if the handler ended its transaction or connection, or left changes unwritten."""
        if self._refused:
            raise HandlerRuleBroken(_REFUSED)
        if self._connection is not None and not _is_open(self._connection):
            self._pooled.rules.check_statements()  # SQLAlchemy closes the connection of a statement that is cancelled
            raise HandlerRuleBroken(_MUST_NOT_CLOSE)
        self._pooled.rules.check()
        self._pooled.rules.check_statements()
        if self._sessions is not None:
            self._sessions.check()

    async def reset_role(self, timeout_seconds: float) -> None:
        """After a handler whose SQL names a role: become the service's own again, which may write the ledger."""
        if self._pooled.rules.role_named:
            async with asyncio.timeout(timeout_seconds):
                await self.driver.execute("RESET SESSION AUTHORIZATION; RESET ROLE")

    async def commit(self, last: Statement, **values: object) -> None:
        """Commit what `begin` began, after its last statement. `last` must raise in the server if nothing may commit.

        One round trip. Raises `NotCommitted` if nothing is committed, and what UNAVAILABLE lists or `LedgerUnavailable`
        if that is not known, or it is committed and may not be replicated: then `discard` the connection.
        """
        driver = self._pooled.driver
        if driver.is_closed():
            raise NotCommitted(LedgerUnavailable(_GONE))
        await driver.commit(*last.on(driver, values))
        self._pooled.has_begun = False

    async def roll_back(self, timeout_seconds: float | None = None) -> None:
        """Roll back what `begin` began if it is still open; do nothing if it was committed. Raises TimeoutError."""
        driver = self._pooled.driver
        if not driver.is_closed() and self._pooled.has_begun and driver.is_in_transaction():
            async with asyncio.timeout(timeout_seconds):
                await driver.execute("ROLLBACK")
                if self._used:
                    await driver.execute("SELECT pg_advisory_unlock_all()")
            self._pooled.has_begun = False

    def terminate(self) -> None:
        """Close it at once, because the server is silent: what waits for an answer raises. `discard` must follow."""
        self._pooled.driver.terminate()

    async def discard(self, error: BaseException | None = None) -> None:
        """Close the connection for good, without waiting for the server, which may be frozen.

        `error`: why it cannot be used any more; None: for a reason of our own. The epoch is in doubt if the server did
        not answer in time, or not as it must; it did if we cancelled, or if the handler closed its connection or left
        a statement running on it. After a timeout it is in doubt, too, whether commits are confirmed.
        """
        self.stop()
        # No await before this line: else the driver cancels what the server does, and that may be the wait of a COMMIT
        # for the standby.
        if error is None or isinstance(error, asyncio.CancelledError | asyncpg.InterfaceError):
            self._pooled.driver.retire()
        else:
            self._pooled.driver.terminate()
            self._places.note_error(self._pooled.driver, error)
        if self._has_place:
            self._has_place = False
            self._places.leave(self._pooled.driver)
            if isinstance(error, TimeoutError):
                self._places.doubt()
        if self._connection is not None:
            with suppress(exc.SQLAlchemyError):  # the handler closed it, or SQLAlchemy saw it break
                await self._connection.invalidate()
            await self._connection.close()

    async def release(self) -> _PooledConnection | None:
        """End the handler's use. Returns what the next handler can have; None: it is lost, closed or altered."""
        self.stop()
        pooled = self._pooled
        pooled.rules.sql_error = None  # its traceback holds the handler's variables
        unusable = pooled.driver.is_closed() or pooled.has_begun
        if unusable or (self._connection is not None and not _is_unaltered(self._connection)):
            await self.discard()
            return None
        if self._connection is not None and (sync := self._connection.sync_connection) is not None:
            sync.close()
        return pooled


class HandlerConnections:
    """The connections of all handlers, in `places`, opened as they are needed.

    How many handlers run at once is the caller's limit; but a connection that was lost may keep its place for a while.
    """

    def __init__(self, places: Places) -> None:
        self._places = places
        self._free: list[_PooledConnection] = []

    async def acquire(self) -> HandlerConnection:
        """A connection outside a transaction, until `release` or its `discard`.

        Raises what `UNAVAILABLE` lists, and `LedgerUnavailable`.
        """
        await self._places.take()
        while self._free:
            pooled = self._free.pop()
            if self._places.is_current(pooled.driver):
                return HandlerConnection(pooled, self._places)
            pooled.driver.retire()
            self._places.leave(pooled.driver)
            await self._places.take()
        return HandlerConnection(await self._open(), self._places)

    async def release(self, connection: HandlerConnection) -> None:
        """Keep the connection for the next handler, or close it."""
        if (pooled := await connection.release()) is not None:
            self._free.append(pooled)
            self._places.release()

    async def close(self) -> None:
        """Close all that are free; a frozen server gets a moment to confirm it."""
        free, self._free = self._free, []
        await asyncio.gather(*(pooled.driver.close() for pooled in free))

    async def _open(self) -> _PooledConnection:
        driver = await self._places.open()
        try:
            pooled = _PooledConnection(driver)
            async with asyncio.timeout(self._places.timeout_seconds):
                await pooled.prepare()
        except BaseException as error:
            driver.terminate()
            self._places.leave(driver)
            if isinstance(error, TimeoutError):
                self._places.doubt()
            raise
        return pooled


def _is_open(connection: AsyncConnection) -> bool:
    """Whether it is neither closed nor broken nor back in SQLAlchemy's pool."""
    sync = connection.sync_connection
    return sync is not None and not sync.closed and not sync.invalidated and sync.connection.is_valid


def _is_unaltered(connection: AsyncConnection) -> bool:
    """Whether the next handler would find it as this one did."""
    sync = connection.sync_connection
    return (
        sync is not None
        and _is_open(connection)
        and not sync.connection.is_detached
        and "isolation_level" not in sync.get_execution_options()
    )
