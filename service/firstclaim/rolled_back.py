"""A transaction that is never committed, in which a test calls handlers and tasks: see `firstclaim.testing`.

Guarantees: those of `firstclaim.testing`, which opens it.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, closing
from copy import deepcopy
from typing import Any, TypeVar

import asyncpg
import orjson
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

from firstclaim.context import BatchContext, Context, TaskContext
from firstclaim.errors import LedgerUnavailable
from firstclaim.event import Event
from firstclaim.follow_up import FollowUp, Outbox
from firstclaim.handler_options import NONE, Options, key_of
from firstclaim.inbox.attempt import swallowed
from firstclaim.inbox.calls import call_batch_handler, call_handler, call_task
from firstclaim.inbox.decisions import decision
from firstclaim.inbox.handler_call import HandlerCall
from firstclaim.inbox.step_timer import StepTimer
from firstclaim.inbox.task_event import TaskEvent, parse_row
from firstclaim.inbox.transaction_watch import TransactionEnded
from firstclaim.inbox.unawaited import detected
from firstclaim.postgres.connection import PinnedConnection
from firstclaim.postgres.handler_connections import HandlerConnection, HandlerConnections
from firstclaim.registry import Handler, covers, handlers_of

DEADLINE_SECONDS = 30.0  # the default of FIRSTCLAIM_HANDLER_DEADLINE_SECONDS
_GRACE_SECONDS = 1.0
POSTGRES_SECONDS = 10.0
_USE, _CHECK = "firstclaim_use", "firstclaim_check"  # savepoints
XID = "SELECT pg_current_xact_id()::text"

T = TypeVar("T")
HandlerFunction = Callable[[Event, Context], Any]
BatchFunction = Callable[[list[Event], BatchContext], Any]
TaskFunction = Callable[[TaskContext], Any]


# -- a transaction ------------------------------------------------------------------------------------


class Transaction:
    """A transaction that is rolled back at its end: for handlers, and for what a test arranges and reads."""

    def __init__(self, connections: HandlerConnections, driver: PinnedConnection, xid: str) -> None:
        self._connections = connections
        self._driver = driver
        self._xid = xid
        self._in_use = False
        self._follow_ups: list[FollowUp] = []

    @property
    def follow_ups(self) -> list[FollowUp]:
        """What the handlers and tasks of this transaction have enqueued, in order: each id once, as in the ledger."""
        return list({each.id: each for each in reversed(self._follow_ups)}.values())[::-1]

    async def deliver(
        self,
        handler: HandlerFunction,
        event: Event,
        *,
        attempt: int = 1,
        fresh: dict[str, Any] | None = None,
        deadline_seconds: float | None = None,
    ) -> str:
        """Call `handler`, async or sync, as the service would. Returns its action.

        `fresh`: the object as Stripe's API would return it now, for a handler with `fresh=True`; by default the object
        has not changed since the event. A thin event has none, so it needs one here. `deadline_seconds`: by default the
        handler's own `deadline`, or the default of the settings. If the handler has a `key`, it is read, and raises
        what it raises in the service; nothing is locked.

        Raises what the handler raises. `Retry`, `Pause` and `Permanent` are raised also if the handler raised them in
        an exception group. `HandlerRuleBroken` names a rule that the handler broke, for example that it committed. If
        it raises, what the handler wrote is rolled back; what the test and earlier handlers wrote is kept.
        """
        _check_handler(handler, "deliver", batch=False)
        _check_event(event, "deliver")
        options = _options(handler, event.type)
        deadline = _deadline(options, deadline_seconds)
        if options.key is not None:
            key_of(options.key, event)
        body = orjson.dumps(event.payload)
        event = _with_fresh(handler, event, fresh)

        async def handle(call: HandlerCall, connection: HandlerConnection, outbox: Outbox) -> str:
            return await call_handler(call, event, attempt, body, connection, deadline, outbox)

        return await self._call(Handler(event.type, handler), deadline, handle)

    async def run(
        self,
        task: TaskFunction,
        follow_up: FollowUp | None = None,
        *,
        attempt: int = 1,
        deadline_seconds: float | None = None,
    ) -> str:
        """Call a task for what was enqueued for it, as the service would once it is due. Returns its action.

        `follow_up`: one of `follow_ups`; None: the only one that was enqueued for this task. `deadline_seconds` and the
        task's `key`: as those of a handler, see `deliver`. Raises `TypeError` for a
        function that is not declared with `@task`, `ValueError` if the follow-up is for another task, or if there is
        not exactly one, and what `deliver` raises.
        """
        handler = _task_of(task)
        if follow_up is None:
            follow_up = self._only(handler)
        if follow_up.type != handler.pattern:
            raise ValueError(f"run: {follow_up.id} was enqueued for {follow_up.type}, and not for {handler.pattern}")
        event = parse_row(follow_up.id, follow_up.type, follow_up.body or b"")
        if not isinstance(event, TaskEvent):
            raise TypeError(f"run: {follow_up.id} is not a task's")
        of_task, deadline = event, _deadline(handler.options, deadline_seconds)
        if handler.options.key is not None:
            key_of(handler.options.key, event)

        async def handle(call: HandlerCall, connection: HandlerConnection, outbox: Outbox) -> str:
            return await call_task(call, of_task, attempt, connection, deadline, outbox)

        return await self._call(handler, deadline, handle)

    def _only(self, handler: Handler) -> FollowUp:
        found = [each for each in self.follow_ups if each.type == handler.pattern]
        if len(found) != 1:
            enqueued = ", ".join(each.type for each in self.follow_ups) or "nothing"
            raise ValueError(
                f"run: expected one follow-up for {handler.pattern}, found {len(found)} (enqueued: {enqueued}): "
                "pass one of follow_ups"
            )
        return found[0]

    async def deliver_batch(
        self,
        handler: BatchFunction,
        events: Sequence[Event],
        *,
        attempt: int = 1,
        deadline_seconds: float | None = None,
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
        deadline = _deadline(_options(handler, events[0].type), deadline_seconds)

        async def handle(call: HandlerCall, connection: HandlerConnection, outbox: Outbox) -> list[str]:
            return await call_batch_handler(call, events, attempts, connection, deadline, outbox)

        return await self._call(Handler(events[0].type, handler, batch=True), deadline, handle)

    async def _call(
        self,
        handler: Handler,
        deadline_seconds: float,
        handle: Callable[[HandlerCall, HandlerConnection, Outbox], Coroutine[Any, Any, T]],
    ) -> T:
        timer, outbox = StepTimer(), Outbox()
        call = HandlerCall(handler, deadline_seconds, timer)
        try:
            async with self.use() as connection:
                try:
                    with detected(), closing(timer):
                        action = await handle(call, connection, outbox)
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
        self._follow_ups += outbox.follow_ups
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
            async with asyncio.timeout(POSTGRES_SECONDS):
                await self._driver.execute(f"ROLLBACK TO {_USE}; SELECT pg_advisory_unlock_all()")
        except BaseException:
            self._driver.retire()
            raise

    async def _check_transaction(self, connection: HandlerConnection) -> None:
        """What the service finds at the completion mark and at COMMIT: raises as these would."""
        try:
            if not self._driver.is_in_transaction() or await self._driver.fetchval(XID) != self._xid:
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


def _task_of(function: object) -> Handler:
    declared = handlers_of(function) if callable(function) else ()
    if len(declared) != 1 or not declared[0].is_task:
        raise TypeError(f"run: expected a function that is declared with @task, got {function!r:.80}")
    return declared[0]


def _with_fresh(handler: HandlerFunction, event: Event, fresh: dict[str, Any] | None) -> Event:
    """The event with the object that the handler is to get. Raises `TypeError` for what the service would not do."""
    wanted = any(declared.fresh for declared in handlers_of(handler))
    if fresh is None:
        if wanted and event.thin:
            raise TypeError("deliver: a thin event has no object: pass the one that Stripe would return, fresh={...}")
        return event.with_object(deepcopy(event.data["object"])) if wanted else event
    if not wanted:
        raise TypeError("deliver: fresh= is for a handler that is declared with @on(..., fresh=True)")
    if not isinstance(fresh, dict):
        raise TypeError(f"deliver: fresh= is the object as a dict, got {type(fresh).__name__}")
    return event.with_object(fresh)


def _options(handler: Callable[..., Any], event_type: str) -> Options:
    """The options that `@on` gives the handler for events of this type."""
    found = [each.options for each in handlers_of(handler) if covers(each.pattern, event_type)]
    return found[0] if found else NONE


def _deadline(options: Options, given: float | None) -> float:
    if given is not None:
        return given
    return DEADLINE_SECONDS if options.deadline_seconds is None else options.deadline_seconds


def _check_event(event: object, method: str) -> None:
    if not isinstance(event, Event):
        raise TypeError(f"{method}: expected an event, as make_event returns it, got {type(event).__name__}")
