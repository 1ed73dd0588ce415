"""What every attempt has: one connection, one transaction, one call of a handler.

`firstclaim.inbox.single_attempt` is the attempt at one event, `firstclaim.inbox.batch_attempt` that at many together.

Guarantees: the transaction that holds the handler's SQL locks its rows first and marks them last, so that effects and
completion mark commit together or not at all. The attempt ends at its deadline, or once it is detected that the handler
has ended its transaction itself. Then its connection is terminated, whatever the handler does. Every way in which an
attempt can end is one of `AttemptResult`. The dispatcher decides what the ledger then says.
"""

import asyncio
import contextlib
from collections.abc import Callable, Collection, Coroutine
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import asyncpg

from firstclaim.errors import HandlerRuleBroken, LedgerUnavailable, Permanent, Retry
from firstclaim.follow_up import Outbox
from firstclaim.inbox.claim import HandlerTransaction
from firstclaim.inbox.decisions import decision
from firstclaim.inbox.enqueue import enqueue
from firstclaim.inbox.handler_call import DeadlineExceeded, HandlerCall
from firstclaim.inbox.ledger import Ledger
from firstclaim.inbox.step_timer import StepTimer
from firstclaim.inbox.transaction_watch import TransactionEnded, TransactionWatch
from firstclaim.observability.handler_metrics import AttemptOutcome
from firstclaim.observability.redaction import is_a
from firstclaim.postgres.connection import UNAVAILABLE, describe
from firstclaim.postgres.handler_connections import HandlerConnection, HandlerConnections
from firstclaim.postgres.one_round_trip import NotCommitted
from firstclaim.registry import Handler

T = TypeVar("T")

_SWALLOWED = "rule broken: the handler swallowed an SQL error, which had aborted its transaction"
_OTHER_ROLE = (
    "the handler has left its transaction in another role, which may not write the ledger: a function that sets ROLE "
    "must be followed by RESET ROLE"
)
_READ_ONLY = "the handler has made its transaction read-only: the completion mark cannot be written in it"


@dataclass(frozen=True, slots=True)
class Committed:
    """The handler's effects and the completion mark are committed. `follow_ups_due`: so are follow-ups, due at once."""

    action: str
    follow_ups_due: bool = False


@dataclass(frozen=True, slots=True)
class TakenOver:
    """Another process holds the row now; the handler was not called."""


@dataclass(frozen=True, slots=True)
class KeyTaken:
    """Another event of the same key runs, in whichever process; the handler was not called."""


@dataclass(frozen=True, slots=True)
class NotStarted:
    """There was no connection, or the row could not be locked; the handler was not called."""

    error: str


@dataclass(frozen=True, slots=True)
class CommitUnknown:
    """The handler has returned, and Postgres has not confirmed the COMMIT; perhaps it was not even sent."""

    action: str
    error: str
    transaction: HandlerTransaction


@dataclass(frozen=True, slots=True)
class Failed:
    """The handler failed.

    `effects_committed`: its effects are committed, so a retry would repeat them; None if the database cannot say.
    `running`: the handler's task or thread, if it ignores the end of its attempt. `hung`: it is a thread that ignores
    its deadline, and only the end of the process can end it. `conflict`: a deadlock or a serialization failure was in
    the way, and nobody is at fault.
    """

    error: Exception
    effects_committed: bool | None
    running: asyncio.Future[Any] | None
    hung: bool
    conflict: bool = False


@dataclass(frozen=True, slots=True)
class Interrupted:
    """A shutdown cancelled the attempt; the fields are those of `Failed`."""

    effects_committed: bool | None
    running: asyncio.Future[Any] | None


@dataclass(frozen=True, slots=True)
class Postponed:
    """What the handler needs cannot be had before a time that another system has named; the handler was not called."""

    error: Retry


# What leaves an attempt without a connection, or without its rows' locks: it has not begun, so nobody is charged.
NO_CONNECTION = (*UNAVAILABLE, LedgerUnavailable)

# How Postgres fails a statement of ours, whatever a handler has done.
_LEDGER_FAILED = (
    OSError,  # a timeout is one
    LedgerUnavailable,
    asyncpg.PostgresConnectionError,
    asyncpg.LockNotAvailableError,
    asyncpg.QueryCanceledError,
)

_CONFLICTS: tuple[type[BaseException], ...] = (asyncpg.DeadlockDetectedError, asyncpg.SerializationError)

# Begins the transaction and locks the rows. None: none of them is ours any more.
Hold = Callable[[HandlerConnection], Coroutine[Any, Any, HandlerTransaction | None]]
Mark = Callable[[], Coroutine[Any, Any, bool]]  # marks and commits; returns whether there was a row to mark
# Calls the handler. Returns its action, what marks the rows, and what it has enqueued.
Work = Callable[[HandlerCall, HandlerConnection, HandlerTransaction], Coroutine[Any, Any, tuple[str, Mark, Outbox]]]
AttemptResult = Committed | TakenOver | KeyTaken | NotStarted | CommitUnknown | Failed | Interrupted | Postponed


@dataclass(frozen=True, slots=True)
class Attempt:
    """What an attempt at one event or at a batch needs, and how its transaction ends; times in seconds."""

    connections: HandlerConnections
    ledger: Ledger
    watch: TransactionWatch
    handler: Handler
    deadline_seconds: float
    idle_seconds: float | None  # None: that of all handlers
    postgres_timeout_seconds: float
    tasks: Collection[str]
    _timer: StepTimer = field(default_factory=StepTimer, init=False)

    async def _run(self, hold: Hold, work: Work) -> AttemptResult:
        """Lock the rows, call the handler, mark the rows, commit. Never raises."""
        try:
            return await self._in_transaction(hold, work)
        finally:
            self._timer.close()

    async def _in_transaction(self, hold: Hold, work: Work) -> AttemptResult:
        try:
            connection = await self.connections.acquire()
            transaction = await self._held(connection, hold)
        except NO_CONNECTION as error:
            return NotStarted(describe(error))
        except asyncio.CancelledError:
            return Interrupted(effects_committed=False, running=None)
        if transaction is None or not transaction.has_key:
            await self._give_back(connection, None)
            return TakenOver() if transaction is None else KeyTaken()
        call = HandlerCall(self.handler, self.deadline_seconds, self._timer)
        try:
            self.watch.add(transaction, call)
            try:
                action, mark, outbox = await work(call, connection, transaction)
            finally:
                self.watch.remove(transaction)
            result: AttemptResult = await self._complete(connection, transaction, action, mark, outbox)
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001  (whatever a handler raises is its failure)
            result = await self._not_committed(error, call, connection, transaction)
        else:
            await self._give_back(connection, transaction)
        call.observe(outcome_of(result))
        return result

    async def _held(self, connection: HandlerConnection, hold: Hold) -> HandlerTransaction | None:
        try:
            with self._timer.limit(self.postgres_timeout_seconds, connection.terminate):
                return await hold(connection)
        except BaseException as error:
            await connection.discard(error)
            raise

    async def _complete(
        self, connection: HandlerConnection, transaction: HandlerTransaction, action: str, mark: Mark, outbox: Outbox
    ) -> Committed | CommitUnknown:
        """Write what was enqueued, then mark and commit, which is what `mark` does.

        Raises the reason if nothing is committed.
        """
        try:
            try:
                await connection.reset_role(self.postgres_timeout_seconds)
                await self._enqueue(connection, transaction, outbox)
            except _LEDGER_FAILED as error:
                await self._terminate(connection, transaction, error)  # COMMIT was not sent: it can wait for no standby
                return CommitUnknown(action, describe(error), transaction)
            result = await self._commit(connection, transaction, action, mark)
            return replace(result, follow_ups_due=outbox.has_due) if isinstance(result, Committed) else result
        except asyncpg.InFailedSQLTransactionError as error:
            raise swallowed(connection) from connection.sql_error or error
        except asyncpg.InsufficientPrivilegeError as error:
            raise HandlerRuleBroken(_OTHER_ROLE) from error
        except asyncpg.ReadOnlySQLTransactionError as error:
            raise HandlerRuleBroken(_READ_ONLY) from error

    async def _enqueue(self, connection: HandlerConnection, transaction: HandlerTransaction, outbox: Outbox) -> None:
        if outbox.follow_ups:
            with self._timer.limit(self.postgres_timeout_seconds, connection.terminate):
                await enqueue(connection, transaction, outbox.follow_ups, give_up_seconds=self.ledger.give_up_seconds)

    async def _commit(
        self, connection: HandlerConnection, transaction: HandlerTransaction, action: str, mark: Mark
    ) -> Committed | CommitUnknown:
        try:
            with self._timer.limit(self.postgres_timeout_seconds, connection.terminate):
                marked = await mark()
        except NotCommitted as error:
            raise error.reason from error.reason.__cause__
        except (*UNAVAILABLE, LedgerUnavailable, asyncio.CancelledError) as error:
            await connection.discard(error)
            return CommitUnknown(action, describe(error), transaction)
        if not marked:  # the statement did not run in the transaction that was begun for it
            raise TransactionEnded
        return Committed(action)

    async def _not_committed(
        self,
        error: Exception | asyncio.CancelledError,
        call: HandlerCall,
        connection: HandlerConnection,
        transaction: HandlerTransaction,
    ) -> Failed | Interrupted:
        ended_by_handler = is_a(error, TransactionEnded) or connection.ended_by_handler
        conflict = _is_conflict(error) or _is_conflict(connection.sql_error)
        if call.running is not None or connection.is_closed or is_a(error, asyncio.CancelledError):
            await self._terminate(connection, transaction)
        await self._give_back(connection, transaction)
        committed = True if ended_by_handler else await self._is_committed(transaction)
        if is_a(error, Exception):
            hung = is_a(error, DeadlineExceeded) and not self.handler.is_async and call.running is not None
            return Failed(error, committed, call.running, hung, conflict)
        return Interrupted(committed, call.running)

    async def _is_committed(self, transaction: HandlerTransaction) -> bool | None:
        """Whether it was committed, or None if the database cannot say. A query that a shutdown cancels is repeated."""
        for _ in range(2):
            try:
                return await self.ledger.committed(transaction)
            except LedgerUnavailable:
                return None
            except asyncio.CancelledError:
                continue
        return None

    async def _terminate(
        self, connection: HandlerConnection, transaction: HandlerTransaction, error: BaseException | None = None
    ) -> None:
        """Close the connection and end the transaction on the server, whatever the two are doing."""
        await connection.discard(error)
        with contextlib.suppress(LedgerUnavailable):  # then the server's own timeouts end it
            await self.ledger.end(transaction)

    async def _give_back(self, connection: HandlerConnection, transaction: HandlerTransaction | None) -> None:
        try:
            await connection.roll_back(self.postgres_timeout_seconds)
            await self.connections.release(connection)
        except (*UNAVAILABLE, LedgerUnavailable, asyncio.CancelledError) as error:
            # The handler closed it, or left a statement running on it. The backend may still hold the row's lock.
            if transaction is None:
                await connection.discard(error)
            else:
                await self._terminate(connection, transaction, error)


def _is_conflict(error: BaseException | None) -> bool:
    return error is not None and any(is_a(error, conflict) for conflict in _CONFLICTS)


def outcome_of(result: AttemptResult) -> AttemptOutcome | None:
    """What the attempt counts as. None: the handler was not called or was interrupted, or COMMIT may have succeeded."""
    match result:
        case Committed():
            return "completed"
        case Postponed():
            return "retry"
        case Failed(error, effects_committed=False, hung=False) if (decided := decision(error)) is not None:
            return "dead" if is_a(decided, Permanent) else "retry"
        case Failed():
            return "failed"
        case _:
            return None


def swallowed(connection: HandlerConnection) -> HandlerRuleBroken:
    """The error of a handler that left its transaction aborted. It names the SQL error's class, and no value of it."""
    return HandlerRuleBroken(
        _SWALLOWED + ("" if connection.sql_error is None else f": {describe(connection.sql_error)}")
    )


def effects_committed(result: AttemptResult | None) -> bool | None:
    """What a shutdown assumes if it interrupts the settling of `result`; None: it must leave the row alone."""
    if isinstance(result, Failed | Interrupted):
        return result.effects_committed
    return False if result is None or isinstance(result, NotStarted | KeyTaken | Postponed) else None
