"""What a handler gets beside its events: the transaction that also writes the completion mark.

Guarantees: what a handler writes through its context is committed together with the completion mark, or not at all.
Once the handler has ended, its context refuses everything.
"""

from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Protocol

from firstclaim.errors import HandlerRuleBroken
from firstclaim.event import Event
from firstclaim.follow_up import Origin, Outbox

if TYPE_CHECKING:  # importing them takes a quarter of a second, in every command and test process
    import asyncio

    from sqlalchemy import CursorResult, Executable
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
    from sqlalchemy.orm import Session

_DEADLINE_PASSED = "the handler's deadline has passed; its transaction was rolled back"


class Transaction(Protocol):
    """The operations of a handler's transaction that the context uses."""

    @property
    def connection(self) -> "AsyncConnection":
        """The transaction as an SQLAlchemy connection."""

    def session(self, **options: Any) -> "AsyncSession":
        """A session in a savepoint of the transaction."""

    def sync_session(
        self, run: Callable[[Coroutine[Any, Any, Any]], Any], **options: Any
    ) -> "Coroutine[Any, Any, Session]":
        """A session for a thread, whose statements go through `run`."""

    def fetch(self, sql: str, *values: Any) -> "Coroutine[Any, Any, list[Any]]":
        """Run one statement on the driver."""

    def refuse(self) -> None:
        """The deadline of the handler has passed: it cannot complete any more, even if it runs on."""


@dataclass(frozen=True, slots=True)
class TransactionContext:
    """The transaction of one call of a handler.

    The completion mark commits in the same transaction: what you write through it (`connection`, `session`, `fetch`;
    `execute`, `sync_session`) happens exactly once in this database.
    """

    _transaction: Transaction
    _loop: "asyncio.AbstractEventLoop"
    _deadline: float

    @property
    def connection(self) -> "AsyncConnection":
        """The transaction as an SQLAlchemy connection, for async handlers. Sessions can be bound to it.

        `commit()` raises; after `rollback()` every statement raises, and the handler fails. Savepoints (`begin_nested`)
        are allowed. Raises `HandlerRuleBroken` after the handler has ended.
        """
        return self._transaction.connection

    def session(self, **options: Any) -> "AsyncSession":
        """An SQLAlchemy session in a savepoint of the transaction, for async handlers. `options`: see `AsyncSession`.

        Use it as `async with context.session() as session:`: what is not written yet is written when the block ends.
        `commit()` releases the savepoint, and `rollback()` undoes what was written since. Nothing is durable before
        the handler has returned. Raises `HandlerRuleBroken` after the handler has ended, and in a sync handler.
        """
        if not is_on_a_loop():
            raise HandlerRuleBroken(
                "context.session() is for async handlers; a sync handler uses context.sync_session()"
            )
        return self._transaction.session(**options)

    def sync_session(self, **options: Any) -> "Session":
        """The same in the thread of a sync handler: `with context.sync_session() as session:`, lazy loads included.

        Raises `HandlerRuleBroken` on the event loop's thread, and `TimeoutError` after the handler's deadline.
        """
        if is_on_a_loop():
            raise HandlerRuleBroken("context.sync_session() is for sync handlers; an async one uses context.session()")
        session: Session = self._run(self._transaction.sync_session(self._run, **options))
        return session

    def fetch(self, sql: str, *values: Any) -> Coroutine[Any, Any, list[Any]]:
        """Run one statement in the same transaction, directly on the driver, and return its rows. To be awaited.

        Parameters are written `$1`, `$2`, ... Values of a row are accessible by name and by index. Raises what asyncpg
        raises, and `HandlerRuleBroken` after the handler has ended, and in a sync handler: nothing would await it
        there, and the event would be completed without its effect.
        """
        if not is_on_a_loop():
            raise HandlerRuleBroken("context.fetch() is for async handlers; a sync handler calls context.execute()")
        return self._transaction.fetch(sql, *values)

    def execute(self, statement: "Executable", parameters: Any = None) -> "CursorResult[Any]":
        """Run one statement in the same transaction, from the thread of a sync handler. Its rows are buffered.

        Raises what SQLAlchemy raises; `HandlerRuleBroken` on the event loop's thread (an async handler awaits
        `context.connection.execute`); and `TimeoutError` after the handler's deadline has passed.
        """
        if is_on_a_loop():
            raise HandlerRuleBroken(
                "context.execute() is for sync handlers; an async handler awaits context.connection.execute()"
            )
        result: CursorResult[Any] = self._run(self._execute(statement, parameters))
        return result

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run `work` on the event loop, and wait for it here, in the handler's thread, until the deadline."""
        import asyncio

        remaining = self._deadline - self._loop.time()
        if remaining <= 0:
            work.close()
            self._transaction.refuse()
            raise TimeoutError(_DEADLINE_PASSED)
        call = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return call.result(remaining)
        except TimeoutError:
            if call.done():  # an error of the statement's own
                raise
            self._transaction.refuse()
            raise TimeoutError(_DEADLINE_PASSED) from None

    async def _execute(self, statement: "Executable", parameters: Any) -> "CursorResult[Any]":
        return await self.connection.execute(statement, parameters)


@dataclass(frozen=True, slots=True)
class RowContext(TransactionContext):
    """The context of one row: an event's, or a follow-up's. `attempt`: its number, from 1, always rising."""

    attempt: int
    _outbox: Outbox = field(repr=False, compare=False)

    @property
    def _origin(self) -> Origin:
        raise NotImplementedError

    @property
    def idempotency_key(self) -> str:
        """The row's id: the event's, or the follow-up's. Pass it to every call to another system, also to Stripe's API.

        It is the same on every attempt, so that the other system can detect a repeated call. If a function makes
        several calls, add a suffix of your own to each. Where several handlers get the event, each has a row, and so a
        key, of its own.
        """
        return self._origin.row_id

    def enqueue(
        self,
        name: str,
        payload: Any = None,
        *,
        after: float | timedelta = 0,
        at: datetime | None = None,
        repeat: bool = False,
    ) -> str:
        """Write a follow-up for `@task(name)`, which is committed with the completion mark or not at all.

        Returns its id. `payload` is what JSON has, 64 KiB at most. It is due `after` seconds or a timedelta from the
        COMMIT on, or `at` an aware datetime, within 366 days. Not to be awaited; async and sync functions call it
        alike. A task may enqueue one for itself. If a savepoint around the call is rolled back, the follow-up is
        forgotten. The n-th call with a name has the same id in every attempt: if the row is replayed, a follow-up that
        exists is not written again, unless `repeat` is set. Raises `TypeError` or `ValueError` for an argument that
        cannot be stored, `HandlerRuleBroken` for a name that no task of this process has, and after the function has
        ended.
        """
        attempt = self.attempt if repeat else None
        return self._outbox.enqueue(name, payload, self._origin, after=after, at=at, repeat=attempt)


@dataclass(frozen=True, slots=True)
class Context(RowContext):
    """What a handler gets beside the event: the attempt's number (from 1, always rising) and a transaction.

    `body`: the bytes that Stripe has signed. In tests of handlers, the event's payload as JSON.
    """

    event: Event
    body: bytes = field(repr=False)

    @property
    def _origin(self) -> Origin:
        return _origin_of(self.event, self._outbox)

    @property
    def snapshot(self) -> dict[str, Any] | None:
        """The object as the event has it: its state when Stripe made the event. None for a thin event.

        For a handler with `fresh=True`: `event.object` is the object as it is now. Without, both are the same.
        """
        data = self.event.payload.get("data")
        found: dict[str, Any] | None = data.get("object") if isinstance(data, dict) else None
        return found


@dataclass(frozen=True, slots=True)
class BatchContext(TransactionContext):
    """What a batch handler gets beside its events: one transaction for all of them, and each one's attempt.

    `attempts`: the number of each event's attempt (from 1, always rising), by event id. Pass the id of the event that a
    call to another system is about as its idempotency key: if one event fails, the batch is rolled back, and each of
    its events is handled again, alone.
    """

    attempts: Mapping[str, int]
    _outbox: Outbox = field(repr=False, compare=False)

    def enqueue(
        self,
        event: Event,
        name: str,
        payload: Any = None,
        *,
        after: float | timedelta = 0,
        at: datetime | None = None,
        repeat: bool = False,
    ) -> str:
        """Write a follow-up of one of the events, as `Context.enqueue` does. Raises `ValueError` for another event."""
        if event.id not in self.attempts:
            raise ValueError(f"enqueue: the event {event.id} is not in this batch")
        attempt = self.attempts[event.id] if repeat else None
        origin = _origin_of(event, self._outbox)
        return self._outbox.enqueue(name, payload, origin, after=after, at=at, repeat=attempt)


@dataclass(frozen=True, slots=True)
class TaskContext(RowContext):
    """What a task gets: what was enqueued for it, the attempt's number (from 1, always rising) and a transaction.

    `id` is that of its row, and `parent_id` that of the row which enqueued it: of the event, or of another follow-up.
    `event_id` is the event of Stripe's that it goes back to, with its `account` and `livemode`.
    """

    id: str
    name: str
    payload: Any = field(repr=False)
    event_id: str
    parent_id: str
    account: str | None
    livemode: bool

    @property
    def _origin(self) -> Origin:
        return Origin(self.id, self.event_id, self.account, self.livemode)


def _origin_of(event: Event, outbox: Outbox) -> Origin:
    return Origin(outbox.row_id(event.id), event.id, event.account, event.livemode)


def outbox_of(context: Context) -> Outbox:
    """What this attempt has enqueued."""
    return context._outbox  # noqa: SLF001  (it is of this module; a handler of users' has no need of it)


def is_on_a_loop() -> bool:
    """Whether the caller runs on an event loop, and not in the thread of a sync handler."""
    import asyncio

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
