"""SQLAlchemy in a handler: a connection and sessions that see the transaction which the service has begun.

Guarantees: SQLAlchemy takes the handler's transaction as begun, so that a session joins it, and neither begins nor
ends one of its own. A commit raises. A rollback does not: a session rolls back when a statement has failed, and an
error raised in its place would hide the real one. But after it nothing more can be executed, and the handler fails.
An error of a statement which the server has not seen leaves the transaction intact, so a handler that swallows it would
be completed without the statement's effect. It is noted, and forgotten if a savepoint around it is rolled back.
A sync handler's statements run on the event loop while its thread waits, so that one driver serves both kinds.
"""

import re
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar, cast

import asyncpg
from sqlalchemy import Connection, RootTransaction
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from firstclaim.context import is_on_a_loop
from firstclaim.errors import HandlerRuleBroken
from firstclaim.follow_up import Outbox
from firstclaim.postgres.savepoints import Savepoints

T = TypeVar("T")

# Runs a coroutine on the event loop, and waits for it in the handler's thread.
RunOnLoop = Callable[[Coroutine[Any, Any, T]], T]

_MUST_NOT_END = (
    "a handler must not commit or roll back: its transaction carries the completion mark "
    "(for a part that may fail, use context.session() or context.connection.begin_nested())"
)
_HAS_BEGUN = "the handler's transaction has begun already: use context.connection.begin_nested() for a part of it"
_BUFFERED = {"stream_results": False, "yield_per": None}
_UNWRITTEN = (
    "the handler left changes in its session that were never written: "
    "use `with` on the session, or flush it before the handler returns"
)
_ROLLED_BACK = (
    "the handler swallowed an error of its session, which has rolled back what was written in it: "
    "roll the session back, or use `with` on it"
)
_MUST_NOT_SWALLOW = "a handler must not swallow the error of a statement that was not executed: {}"
_AT_ONCE = (
    "a handler must await each statement before the next (no asyncio.gather on its connection): "
    "one was refused, and the handler swallowed its {}"
)

_OF_THE_DRIVER = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)

# SQL that may change the role; a function that does so by itself is not seen. The first look is at the letters alone:
# the expression takes 27 us for a statement of 600 characters, and most name none.
_NAMES_A_ROLE = re.compile(r"\b(?:role|authorization)\b", re.IGNORECASE)
_OF_A_ROLE = ("role", "authorization")
# The driver's error for a wrong number of arguments has the class of those for concurrent use.
_ARGUMENTS = "the server expects"


class HandlerRules:
    """Whether a handler runs, and what it takes for done and is not: an end of its transaction, a refused statement.

    `sql_error`: the last error that the server gave to it, until the connection is released.
    `role_named`: whether a statement of the handler's names a role. It may have set one that may not write the ledger.
    """

    def __init__(self) -> None:
        self._runs = False
        self._broken = False
        self._at_once: str | None = None  # the rule that concurrent use of the connection broke
        self._refused: str | None = None  # the rule that the first refused statement breaks if its error is swallowed
        self._savepoints: Savepoints[tuple[str | None, int]] = Savepoints()
        self._outbox = Outbox()
        self.role_named = False
        self.sql_error: BaseException | None = None

    def start(self, outbox: Outbox) -> None:
        """The handler starts. What it has enqueued in a savepoint is forgotten with it."""
        self._outbox = outbox
        self._runs, self._broken, self.role_named = True, False, False
        self._at_once = self._refused = None
        self._savepoints.clear()
        self.sql_error = None

    def note_statement(self, sql: str) -> None:
        """Before each statement of the handler's."""
        lowered = sql.lower()
        if any(word in lowered for word in _OF_A_ROLE) and _NAMES_A_ROLE.search(sql):
            self.role_named = True

    def note_executed(self, sql: str) -> None:
        """After each statement of the handler's that was executed."""
        enqueued = len(self._outbox.follow_ups)
        self._refused, kept = self._savepoints.executed(sql, (self._refused, enqueued))
        if kept < enqueued:
            self._outbox.undo_to(kept)

    def note_cursor(self, _connection: Connection, _cursor: object, sql: str, *_: object) -> None:
        """Before each statement that it sends through SQLAlchemy."""
        self.note_statement(sql)

    def note_executed_cursor(self, _connection: Connection, _cursor: object, sql: str, *_: object) -> None:
        """After each statement that it sent through SQLAlchemy: those of sessions and `begin_nested()` too."""
        self.note_executed(sql)

    def stop(self) -> None:
        """The handler has ended: whoever ends the transaction now breaks no rule."""
        self._runs = False

    def refuse_commit(self, connection: Connection) -> None:
        """Before SQLAlchemy commits. Raises `HandlerRuleBroken`."""
        self.note_rollback(connection)
        if self._runs:
            self.check()

    def note_rollback(self, connection: Connection) -> None:
        """Before SQLAlchemy rolls back. A connection that is lost, or closed by the handler, has nothing to end."""
        if self._runs and not connection.closed and not connection.invalidated:
            self._broken = True

    def note_error(self, error: BaseException) -> None:
        """After a statement that raised. One that the server has reported breaks no rule: it aborted the work.

        Concurrent use counts whatever is rolled back: the statement that was refused may be outside the savepoint.
        """
        cause = _drivers(error)
        if not self._runs:
            return
        if isinstance(cause, asyncpg.PostgresError) and cause.severity is not None:
            if not isinstance(cause, asyncpg.InFailedSQLTransactionError):  # it failed because an earlier one had
                self.sql_error = error
            return
        name = type(cause).__name__
        if isinstance(cause, asyncpg.InterfaceError) and not str(cause).startswith(_ARGUMENTS):
            self._at_once = self._at_once or _AT_ONCE.format(name)
        else:
            self._refused = self._refused or _MUST_NOT_SWALLOW.format(name)

    def check(self) -> None:
        """Raise `HandlerRuleBroken` if the handler committed or rolled back."""
        if self._broken:
            raise HandlerRuleBroken(_MUST_NOT_END)

    def check_statements(self) -> None:
        """The handler has returned: raise `HandlerRuleBroken` if it swallowed the error of a refused statement."""
        if rule := self._at_once or self._refused:
            raise HandlerRuleBroken(rule)


class LoopConnection(Connection):
    """SQLAlchemy's connection in the handler's transaction, for the event loop and, with `run`, for one thread."""

    rules: HandlerRules
    run: RunOnLoop[Any] | None = None

    @classmethod
    def join(cls, engine: AsyncEngine, rules: HandlerRules) -> AsyncConnection:
        """A connection of `engine` that is in a transaction, for SQLAlchemy: no statement is sent."""
        connection = cls(engine.sync_engine)
        connection.rules = rules
        connection.begin()
        return AsyncConnection(engine, sync_connection=connection)

    def begin(self) -> RootTransaction:
        """Also what SQLAlchemy does before the first statement after a rollback."""
        self.rules.check()
        if self.in_transaction():  # SQLAlchemy's own message says to commit or roll back first
            raise HandlerRuleBroken(_HAS_BEGUN)
        return super().begin()

    def execute(self, *arguments: Any, **options: Any) -> Any:
        """All statements of sessions, savepoints too, and of lazy loads."""
        return self._on_loop(super().execute, *arguments, **options)

    def scalar(self, *arguments: Any, **options: Any) -> Any:
        """See SQLAlchemy."""
        return self._on_loop(super().scalar, *arguments, **options)

    def exec_driver_sql(self, *arguments: Any, **options: Any) -> Any:
        """See SQLAlchemy."""
        return self._on_loop(super().exec_driver_sql, *arguments, **options)

    def _on_loop(self, method: Callable[..., T], *arguments: Any, **options: Any) -> T:
        if self.run is None or is_on_a_loop():
            return self._noting(method, *arguments, **options)
        # All rows at once: later ones would be fetched in the thread.
        options["execution_options"] = {**(options.get("execution_options") or {}), **_BUFFERED}
        joined = AsyncConnection(AsyncEngine(self.engine), sync_connection=self)
        result: T = self.run(joined.run_sync(lambda _: self._noting(method, *arguments, **options)))
        return result

    def _noting(self, method: Callable[..., T], *arguments: Any, **options: Any) -> T:
        try:
            return method(*arguments, **options)
        except BaseException as error:
            if not self.closed:  # else it is a session of an earlier handler's
                self.rules.note_error(error)
            raise


class HandlerAsyncSession(AsyncSession):
    """A session in a savepoint. As a context manager it writes what is left when the block ends without an error."""

    async def __aexit__(self, type_: Any, value: Any, traceback: Any) -> None:
        """Flush and release the savepoint, or roll back to it; then close."""
        try:
            if type_ is None:
                await self.commit()
        finally:
            await super().__aexit__(type_, value, traceback)


class HandlerSession(Session):
    """The same for sync handlers."""

    def __exit__(self, type_: Any, value: Any, traceback: Any) -> None:
        """Flush and release the savepoint, or roll back to it; then close."""
        try:
            if type_ is None:
                self.commit()
        finally:
            super().__exit__(type_, value, traceback)


class Sessions:
    """The sessions of one handler."""

    def __init__(self) -> None:
        self._sessions: list[Session] = []

    def make_async(self, connection: AsyncConnection, **options: Any) -> AsyncSession:
        """A session on `connection`."""
        session = HandlerAsyncSession(connection, **_options(options))
        self._sessions.append(session.sync_session)
        return session

    def make(self, connection: AsyncConnection, run: RunOnLoop[Any], **options: Any) -> Session:
        """A session for the handler's thread."""
        sync = cast(LoopConnection, connection.sync_connection)
        sync.run = run
        session = HandlerSession(sync, **_options(options))
        self._sessions.append(session)
        return session

    def check(self) -> None:
        """Raise `HandlerRuleBroken` if a session holds changes, or has undone some and its handler goes on.

        The event would be completed without them. After a failed flush, a session rolls back all that was written in
        its savepoint, and is not active before its own `rollback()`.
        """
        for session in self._sessions:
            if not session.is_active:
                raise HandlerRuleBroken(_ROLLED_BACK)
            if session.new or session.deleted or any(session.is_modified(each) for each in session.dirty):
                raise HandlerRuleBroken(_UNWRITTEN)


def _options(given: dict[str, Any]) -> dict[str, Any]:
    # A savepoint: the session's own rollback, after a failed statement too, leaves the handler's transaction usable.
    # No expiry: reading an attribute after a commit would be a statement, which async code has to await.
    return {"expire_on_commit": False, "join_transaction_mode": "create_savepoint", **given}


def _drivers(error: BaseException) -> BaseException:
    """The driver's error, which SQLAlchemy wraps; `error` itself if the statement did not reach the driver."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, _OF_THE_DRIVER):
        cause = cause.__cause__
    return cause or error
