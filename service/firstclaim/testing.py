"""For tests of your handlers: events from the shipped templates, and a transaction that is never committed.

Guarantees: `deliver` calls a handler as the service does, with the same connection, context, rules and deadline. What
the handler writes can be read until the block of `transaction` ends, and is then rolled back. No ledger, no Redis and
no signature are involved: what they guarantee is tested in this project, not in yours.

The pytest fixtures of the same purpose are in `firstclaim.pytest_plugin`.
"""

import asyncio
import os
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import asyncpg
from pydantic import SecretStr
from sqlalchemy import CursorResult, Executable
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from sqlalchemy.orm import Session

from firstclaim.context import BatchContext, Context
from firstclaim.embedded.data_folder import servers
from firstclaim.errors import LedgerUnavailable
from firstclaim.event import Event
from firstclaim.inbox.attempt import call_batch_handler, call_handler, swallowed
from firstclaim.inbox.dispatch import decision
from firstclaim.inbox.handler_call import HandlerCall
from firstclaim.inbox.step_timer import StepTimer
from firstclaim.inbox.transaction_watch import TransactionEnded
from firstclaim.inbox.unawaited import detected
from firstclaim.migrations import schema
from firstclaim.postgres.connection import PinnedConnection
from firstclaim.postgres.epoch import Epoch
from firstclaim.postgres.handler_connections import HandlerConnection, HandlerConnections
from firstclaim.postgres.places import Places
from firstclaim.postgres.probe import Probe
from firstclaim.registry import Handler, handlers_of
from firstclaim.sending.make_event import make_event
from firstclaim.settings import Settings
from firstclaim.urls.postgres import postgres_dsn

__all__ = ["SyncTransaction", "Transaction", "embedded_postgres", "make_event", "sync_transaction", "transaction"]

_DEADLINE_SECONDS = 30.0  # the default of FIRSTCLAIM_HANDLER_DEADLINE_SECONDS
_GRACE_SECONDS = 1.0
_POSTGRES_SECONDS = 10.0
_USE, _CHECK = "firstclaim_use", "firstclaim_check"  # savepoints
_XID = "SELECT pg_current_xact_id()::text"

T = TypeVar("T")
HandlerFunction = Callable[[Event, Context], Any]
BatchFunction = Callable[[list[Event], BatchContext], Any]


# -- a transaction ------------------------------------------------------------------------------------


class Transaction:
    """A transaction that is rolled back at its end: for handlers, and for what a test arranges and reads."""

    def __init__(self, connections: HandlerConnections, driver: PinnedConnection, xid: str) -> None:
        self._connections = connections
        self._driver = driver
        self._xid = xid
        self._in_use = False

    async def deliver(
        self,
        handler: HandlerFunction,
        event: Event,
        *,
        attempt: int = 1,
        deadline_seconds: float = _DEADLINE_SECONDS,
    ) -> str:
        """Call `handler`, async or sync, as the service would. Returns its action.

        Raises what the handler raises. `Retry` and `Permanent` are raised also if the handler raised them in an
        exception group. `HandlerRuleBroken` names a rule that the handler broke, for example that it committed. If it
        raises, what the handler wrote is rolled back; what the test and earlier handlers wrote is kept.
        """
        _check_handler(handler, "deliver", batch=False)
        _check_event(event, "deliver")

        async def handle(call: HandlerCall, connection: HandlerConnection) -> str:
            return await call_handler(call, event, attempt, connection, deadline_seconds)

        return await self._call(Handler(event.type, handler), deadline_seconds, handle)

    async def deliver_batch(
        self,
        handler: BatchFunction,
        events: Sequence[Event],
        *,
        attempt: int = 1,
        deadline_seconds: float = _DEADLINE_SECONDS,
    ) -> list[str]:
        """Call a batch handler with all of `events` at once. Returns the action of each.

        As `deliver` otherwise: the service would let each event of a batch that raises go alone, in a list of one.
        """
        _check_handler(handler, "deliver_batch", batch=True)
        if not events:
            raise TypeError("deliver_batch: expected events, got none: the service never calls a handler with none")
        for event in events:
            _check_event(event, "deliver_batch")
        attempts = {event.id: attempt for event in events}

        async def handle(call: HandlerCall, connection: HandlerConnection) -> list[str]:
            return await call_batch_handler(call, events, attempts, connection, deadline_seconds)

        return await self._call(Handler(events[0].type, handler, batch=True), deadline_seconds, handle)

    async def _call(
        self,
        handler: Handler,
        deadline_seconds: float,
        handle: Callable[[HandlerCall, HandlerConnection], Coroutine[Any, Any, T]],
    ) -> T:
        timer = StepTimer()
        call = HandlerCall(handler, deadline_seconds, timer)
        try:
            async with self.use() as connection:
                try:
                    with detected(), closing(timer):
                        action = await handle(call, connection)
                finally:
                    if call.running is not None:  # it was cancelled at its deadline
                        await asyncio.wait({call.running}, timeout=_GRACE_SECONDS)
                    if call.running is not None:  # it ignores that: nothing else may use the connection
                        self._driver.retire()
                await self._check_transaction(connection)
        except Exception as error:
            if (decided := decision(error)) is not None and decided is not error:
                raise decided from error
            raise
        return action

    async def fetch(self, sql: str, *values: Any) -> list[Any]:
        """Run one statement on the driver, as `Context.fetch` does, and return its rows."""
        async with self.use():
            return list(await self._driver.fetch(sql, *values))

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[AsyncConnection]:
        """The transaction as an SQLAlchemy connection while the block runs: to arrange and to read with it."""
        async with self.use() as connection:
            yield connection.connection

    @asynccontextmanager
    async def session(self, **options: Any) -> AsyncIterator[AsyncSession]:
        """A session of SQLAlchemy's ORM in the transaction while the block runs, as `Context.session`."""
        async with self.use() as connection, connection.session(**options) as session:
            yield session

    @asynccontextmanager
    async def use(self) -> AsyncIterator[HandlerConnection]:
        """A use of the connection as a handler has it, in a savepoint of this transaction."""
        if self._in_use:
            raise RuntimeError(
                "the transaction is in use: await one call, or leave the block of connect() or session(), first"
            )
        if self._driver.is_closed() or not self._driver.is_in_transaction():
            raise LedgerUnavailable("this test's transaction is gone: a handler has ended it, or its connection")
        self._in_use = True
        connection = await self._connections.acquire()  # the only one that there is
        try:
            await self._driver.execute(f"SAVEPOINT {_USE}")
            yield connection
            await self._driver.execute(f"RELEASE {_USE}")
        except BaseException:
            await self._undo_use()
            raise
        finally:
            await self._connections.release(connection)
            self._in_use = False

    async def _undo_use(self) -> None:
        """Undo what a use that failed has written, if the transaction is still there; else it is lost."""
        if self._driver.is_closed():
            return
        if not self._driver.is_in_transaction():
            self._driver.retire()
            return
        try:
            async with asyncio.timeout(_POSTGRES_SECONDS):
                await self._driver.execute(f"ROLLBACK TO {_USE}; SELECT pg_advisory_unlock_all()")
        except BaseException:
            self._driver.retire()
            raise

    async def _check_transaction(self, connection: HandlerConnection) -> None:
        """What the service finds at the completion mark and at COMMIT: raises as these would."""
        try:
            if not self._driver.is_in_transaction() or await self._driver.fetchval(_XID) != self._xid:
                self._driver.retire()
                raise TransactionEnded
            # Constraints that are deferred to COMMIT. In a savepoint of its own, so that they are deferred again.
            await self._driver.execute(f"SAVEPOINT {_CHECK}")
            try:
                await self._driver.execute("SET CONSTRAINTS ALL IMMEDIATE")
            finally:
                await self._driver.execute(f"ROLLBACK TO {_CHECK}")
        except asyncpg.InFailedSQLTransactionError as error:
            raise swallowed(connection) from connection.sql_error or error


def _check_handler(handler: object, method: str, *, batch: bool) -> None:
    if not callable(handler):
        raise TypeError(f"{method}: expected the handler's function, got {type(handler).__name__} {handler!r:.80}")
    if any(declared.batch is not batch for declared in handlers_of(handler)):
        other = "deliver" if batch else "deliver_batch"
        raise TypeError(f"{method}: {handler!r:.80} takes {'one event' if batch else 'a list'}: use {other}")


def _check_event(event: object, method: str) -> None:
    if not isinstance(event, Event):
        raise TypeError(f"{method}: expected an event, as make_event returns it, got {type(event).__name__}")


@asynccontextmanager
async def transaction(database_url: str) -> AsyncIterator[Transaction]:
    """A transaction in this database while the block runs; nothing of it is committed.

    Raises `LedgerUnavailable` or what asyncpg raises if the database cannot be reached.
    """
    dsn = postgres_dsn(database_url)
    probe = Probe(dsn, timeout_seconds=_POSTGRES_SECONDS)
    epoch = Epoch(fresh_seconds=0)
    connections = HandlerConnections(Places(dsn, probe, size=1, timeout_seconds=_POSTGRES_SECONDS, epoch=epoch))
    try:
        connection = await connections.acquire()
    except BaseException:
        await probe.close()
        raise
    driver = connection.driver
    try:
        await driver.execute("BEGIN")
        xid = await driver.fetchval(_XID)
        await connections.release(connection)
        yield Transaction(connections, driver, xid)
    finally:
        driver.retire()  # then the server rolls back
        await probe.close()


# -- the same for sync tests --------------------------------------------------------------------------


class _LoopThread:
    """An event loop in a thread of its own, for callers that have none."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True, name="firstclaim-testing")
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@contextmanager
def _loop_thread() -> Iterator[_LoopThread]:
    thread = _LoopThread()
    try:
        yield thread
    finally:
        thread.close()


@contextmanager
def _entered(loop: _LoopThread, block: AbstractAsyncContextManager[T]) -> Iterator[T]:
    """An async block, entered and left on `loop`."""

    async def enter() -> T:
        return await block.__aenter__()

    async def leave(error: BaseException | None) -> bool | None:
        kind, traceback = (None, None) if error is None else (type(error), error.__traceback__)
        return await block.__aexit__(kind, error, traceback)

    value = loop.run(enter())
    try:
        yield value
    except BaseException as error:
        if not loop.run(leave(error)):
            raise
    else:
        loop.run(leave(None))


class SyncTransaction:
    """`Transaction` for sync tests. Async handlers run too, on the event loop of another thread."""

    def __init__(self, loop: _LoopThread, work: Transaction) -> None:
        self._loop = loop
        self._transaction = work

    def deliver(
        self,
        handler: HandlerFunction,
        event: Event,
        *,
        attempt: int = 1,
        deadline_seconds: float = _DEADLINE_SECONDS,
    ) -> str:
        """As `Transaction.deliver`."""
        return self._loop.run(
            self._transaction.deliver(handler, event, attempt=attempt, deadline_seconds=deadline_seconds)
        )

    def deliver_batch(
        self,
        handler: BatchFunction,
        events: Sequence[Event],
        *,
        attempt: int = 1,
        deadline_seconds: float = _DEADLINE_SECONDS,
    ) -> list[str]:
        """As `Transaction.deliver_batch`."""
        return self._loop.run(
            self._transaction.deliver_batch(handler, events, attempt=attempt, deadline_seconds=deadline_seconds)
        )

    def fetch(self, sql: str, *values: Any) -> list[Any]:
        """Run one statement on the driver and return its rows. Parameters are written `$1`, `$2`, ..."""
        return self._loop.run(self._transaction.fetch(sql, *values))

    def execute(self, statement: Executable, parameters: Any = None) -> CursorResult[Any]:
        """Run one SQLAlchemy statement, as `Context.execute` does. Its rows are buffered."""

        async def execute() -> CursorResult[Any]:
            async with self._transaction.connect() as connection:
                return await connection.execute(statement, parameters)

        return self._loop.run(execute())

    @contextmanager
    def session(self, **options: Any) -> Iterator[Session]:
        """A session of SQLAlchemy's ORM in the transaction while the block runs, as `Context.sync_session`."""
        run = self._loop.run
        with (
            _entered(self._loop, self._transaction.use()) as connection,
            run(connection.sync_session(run, **options)) as session,
        ):
            yield session


@contextmanager
def sync_transaction(database_url: str) -> Iterator[SyncTransaction]:
    """As `transaction`, for sync tests."""
    with _loop_thread() as loop, _entered(loop, transaction(database_url)) as opened:
        yield SyncTransaction(loop, opened)


# -- a database ---------------------------------------------------------------------------------------


@contextmanager
def embedded_postgres() -> Iterator[str]:
    """The address of a PostgreSQL of this process's own while the block runs; it has firstclaim's tables.

    It takes some seconds to start: once per test session is enough. Needs the extra `firstclaim[embedded]`, else
    raises `ConfigurationError`.
    """
    with tempfile.TemporaryDirectory(prefix="firstclaim-test-", ignore_cleanup_errors=True) as folder:
        # Not from the environment, which may name a database that tests must not touch.
        settings = Settings.model_construct(
            data_dir=Path(os.path.realpath(folder)) / "data",
            redis_url=SecretStr("redis://127.0.0.1"),  # set, so that no Valkey is started
            stripe_webhook_secrets=(SecretStr("whsec_test"),),
        )
        with servers(settings) as ready, _loop_thread() as loop:
            if ready.database_url is None:
                raise LedgerUnavailable("the embedded server has no address")
            url = ready.database_url.get_secret_value()
            loop.run(schema.migrate(postgres_dsn(url), _POSTGRES_SECONDS))
            yield url
