"""One attempt at an event: one connection, one transaction, one call of its handler.

Guarantees: the transaction that holds the handler's SQL locks the row first and marks it last, so that effects and
completion mark commit together or not at all. The attempt ends at its deadline, or once the handler is seen to have
ended its transaction itself: then its connection is terminated, whatever the handler does. Every way in which an
attempt can end is one of `AttemptResult`. The dispatcher decides what the ledger then says.
"""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import asyncpg

from firstclaim.context import BatchContext, Context
from firstclaim.errors import HandlerRuleBroken, LedgerUnavailable
from firstclaim.event import Event
from firstclaim.inbox.handler_call import DeadlineExceeded, HandlerCall
from firstclaim.inbox.ledger import Claim, HandlerTransaction, Ledger
from firstclaim.inbox.step_timer import StepTimer
from firstclaim.inbox.transaction_watch import TransactionEnded, TransactionWatch
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
    """The handler's effects and the completion mark are committed."""

    action: str


@dataclass(frozen=True, slots=True)
class TakenOver:
    """Another process holds the row now; the handler was not called."""


@dataclass(frozen=True, slots=True)
class NotStarted:
    """There was no connection, or the row could not be locked; the handler was not called."""

    error: str


@dataclass(frozen=True, slots=True)
class CommitUnknown:
    """COMMIT was sent, and its success was not confirmed."""

    action: str
    error: str
    transaction: HandlerTransaction


@dataclass(frozen=True, slots=True)
class Failed:
    """The handler failed.

    `effects_committed`: its effects are committed, so a retry would repeat them; None if the database cannot say.
    `running`: the handler's task or thread, if it ignores the end of its attempt. `hung`: it is a thread that ignores
    its deadline, and only the end of the process can end it.
    """

    error: Exception
    effects_committed: bool | None
    running: asyncio.Future[Any] | None
    hung: bool


@dataclass(frozen=True, slots=True)
class Interrupted:
    """A shutdown cancelled the attempt; the fields are those of `Failed`."""

    effects_committed: bool | None
    running: asyncio.Future[Any] | None


Mark = Callable[[], Coroutine[Any, Any, bool]]  # marks and commits; whether there was what to mark
AttemptResult = Committed | TakenOver | NotStarted | CommitUnknown | Failed | Interrupted


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt at `claim`; times in seconds."""

    connections: HandlerConnections
    ledger: Ledger
    watch: TransactionWatch
    claim: Claim
    event: Event
    handler: Handler
    deadline_seconds: float
    postgres_timeout_seconds: float
    _timer: StepTimer = field(default_factory=StepTimer, init=False)

    async def run(self) -> AttemptResult:
        """Lock the row, call the handler, mark the row, commit. Never raises."""
        try:
            return await self._run()
        finally:
            self._timer.close()

    async def _run(self) -> AttemptResult:
        try:
            connection = await self.connections.acquire()
            transaction = await self._hold(connection)
        except UNAVAILABLE as error:
            return NotStarted(describe(error))
        except asyncio.CancelledError:
            return Interrupted(effects_committed=False, running=None)
        if transaction is None:
            await self._give_back(connection, None)
            return TakenOver()
        call = HandlerCall(self.handler, self.deadline_seconds, self._timer)
        try:
            self.watch.add(transaction, call)
            try:
                action = await self._call(call, connection)
            finally:
                self.watch.remove(transaction)
            mark = partial(self.ledger.complete_if_held, connection, self.claim, transaction, action)
            result = await self._complete(connection, transaction, action, mark)
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001  (whatever a handler raises is its failure)
            return await self._not_committed(error, call, connection, transaction)
        await self._give_back(connection, transaction)
        return result

    async def _hold(self, connection: HandlerConnection) -> HandlerTransaction | None:
        try:
            with self._timer.limit(self.postgres_timeout_seconds, connection.terminate):
                return await self.ledger.hold(connection, self.claim)
        except BaseException as error:
            await connection.discard(error)
            raise

    async def _call(self, call: HandlerCall, connection: HandlerConnection) -> str:
        if self.handler.batch:
            attempts = {self.claim.event_id: self.claim.attempt}
            return (await call_batch_handler(call, [self.event], attempts, connection, self.deadline_seconds))[0]
        return await call_handler(call, self.event, self.claim.attempt, connection, self.deadline_seconds)

    async def _complete(
        self, connection: HandlerConnection, transaction: HandlerTransaction, action: str, mark: Mark
    ) -> Committed | CommitUnknown:
        """Mark and commit, which is what `mark` does. Raises the reason if nothing is committed."""
        try:
            await self._reset_role(connection, transaction)
            return await self._commit(connection, transaction, action, mark)
        except asyncpg.InFailedSQLTransactionError as error:
            raise swallowed(connection) from connection.sql_error or error
        except asyncpg.InsufficientPrivilegeError as error:
            raise HandlerRuleBroken(_OTHER_ROLE) from error
        except asyncpg.ReadOnlySQLTransactionError as error:
            raise HandlerRuleBroken(_READ_ONLY) from error

    async def _reset_role(self, connection: HandlerConnection, transaction: HandlerTransaction) -> None:
        try:
            await connection.reset_role(self.postgres_timeout_seconds)
        except TimeoutError as error:
            await self._terminate(connection, transaction, error)
            raise

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
        if not marked:  # it is not in the transaction that was begun for it
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
        if call.running is not None or connection.is_closed or is_a(error, asyncio.CancelledError):
            await self._terminate(connection, transaction)
        await self._give_back(connection, transaction)
        committed = True if ended_by_handler else await self._is_committed(transaction)
        if is_a(error, Exception):
            hung = is_a(error, DeadlineExceeded) and not self.handler.is_async and call.running is not None
            return Failed(error, committed, call.running, hung)
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


async def call_handler(
    call: HandlerCall, event: Event, attempt: int, connection: HandlerConnection, deadline_seconds: float
) -> str:
    """Let the handler of `call` work on a connection that is in a transaction; returns its action.

    Raises what the handler or `HandlerCall.end` gives, `DeadlineExceeded`, and `HandlerRuleBroken`.
    """
    loop = asyncio.get_running_loop()
    context = Context(connection, loop, loop.time() + deadline_seconds, event, attempt)
    return await _within_its_rules(connection, call.run(event, context))


async def call_batch_handler(
    call: HandlerCall,
    events: Sequence[Event],
    attempts: Mapping[str, int],
    connection: HandlerConnection,
    deadline_seconds: float,
) -> list[str]:
    """Let the handler of `call` work on a connection that is in a transaction; returns the action for each event.

    Raises as `call_handler` does.
    """
    loop = asyncio.get_running_loop()
    context = BatchContext(connection, loop, loop.time() + deadline_seconds, attempts)
    return await _within_its_rules(connection, call.run_batch(events, context))


async def _within_its_rules(connection: HandlerConnection, work: Coroutine[Any, Any, T]) -> T:
    connection.start()
    try:
        result = await work
    finally:
        connection.stop()
    connection.check_rules()
    return result


def swallowed(connection: HandlerConnection) -> HandlerRuleBroken:
    """The error of a handler that left its transaction aborted. It names the SQL error's class, and no value of it."""
    return HandlerRuleBroken(
        _SWALLOWED + ("" if connection.sql_error is None else f": {describe(connection.sql_error)}")
    )
