"""One attempt at an event: one connection, one transaction, one call of its handler.

Guarantees: the row is locked first and marked last, in the transaction that holds the handler's SQL, so that
effects and mark commit together or not at all; at its deadline the attempt is over and its connection
terminated, whatever the handler does; nothing that a handler raises ends the service. What the ledger should
say about an attempt that did not commit is the dispatcher's business.
"""

import asyncio
import contextlib
import contextvars
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import asyncpg

from firstclaim.errors import HandlerRuleBroken, LedgerUnavailable
from firstclaim.event import Event
from firstclaim.inbox.ledger import Claim, HandlerTransaction, Ledger
from firstclaim.observability import metrics, tracing
from firstclaim.postgres.connection import UNAVAILABLE, describe
from firstclaim.postgres.handler_connections import HandlerConnection, HandlerConnections
from firstclaim.registry import Context, Handler

_ENDED = (
    "rule broken: a handler must not commit, nor end its transaction in any other way; "
    "what it committed is kept, so it is not retried by itself"
)
_SWALLOWED = "rule broken: the handler swallowed an SQL error, which had aborted its transaction"
_ACTION_MOST_CHARACTERS = 200


class TakenOver(Exception):
    """Another holds the row now."""


class TransactionEnded(HandlerRuleBroken):
    """The handler ended the transaction that it was given: what it wrote besides is committed, or may be."""

    def __init__(self) -> None:
        super().__init__(_ENDED)


class CommitUnknown(Exception):
    """COMMIT was sent, and what came back is not its success."""

    def __init__(self, action: str, error: str) -> None:
        super().__init__(f"COMMIT failed: {error}")
        self.action = action


@dataclass(slots=True)
class Attempt:
    """One attempt. `held` is its transaction once the row is locked; `work` the handler once it is called.

    `ended_by_handler`: the attempt came to nothing, and the handler had ended its transaction by then.
    """

    seats: HandlerConnections
    ledger: Ledger
    claim: Claim
    event: Event
    handler: Handler
    deadline_seconds: float
    postgres_timeout_seconds: float
    held: HandlerTransaction | None = field(default=None, init=False)
    ended_by_handler: bool = field(default=False, init=False)
    work: asyncio.Future[Any] | None = field(default=None, init=False)

    async def run(self) -> str | Exception:
        """The action once it is committed, or the exception that says why it is not.

        Raises `LedgerUnavailable` when the row cannot be locked at all, and CancelledError when we are stopping.
        """
        try:
            seat = await self.seats.acquire()
            self.held = await self._hold(seat)
        except UNAVAILABLE as error:  # the handler has not begun: this is no failure of it
            raise LedgerUnavailable(describe(error)) from error
        try:
            if self.held is None:
                return TakenOver()
            action = _checked_action(await self._call(seat))
            seat.check_rules()
            await self._mark(seat, self.held, action)
        except (TimeoutError, asyncio.CancelledError) as error:
            self.ended_by_handler = self._in_no_transaction(seat)
            await self._end(seat)
            if isinstance(error, TimeoutError):
                return error
            raise
        except Exception as error:  # noqa: BLE001  (whatever a handler raises is this attempt's failure)
            self.ended_by_handler = isinstance(error, TransactionEnded) or self._in_no_transaction(seat)
            return error
        else:
            return await self._commit(seat, action)
        finally:
            await self._give_back(seat)

    async def _hold(self, seat: HandlerConnection) -> HandlerTransaction | None:
        try:
            async with asyncio.timeout(self.postgres_timeout_seconds):
                await seat.begin()
                return await self.ledger.hold(seat.driver, self.claim)
        except BaseException:
            await seat.discard()
            raise

    async def _call(self, seat: HandlerConnection) -> Any:
        """Run the handler and wait for it until its deadline, but not for one that ignores its cancellation."""
        loop = asyncio.get_running_loop()
        context = Context(self.event, self.claim.attempt, seat, loop, loop.time() + self.deadline_seconds)
        seat.start()
        start = _in_task if self.handler.is_async else _in_thread
        began = time.perf_counter()  # the loop's own clock counts milliseconds
        try:
            with tracing.span("handler", handler=self.handler.pattern):
                self.work = work = start(loop, self.handler.function, self.event, context)
                done, _ = await asyncio.wait({work}, timeout=self.deadline_seconds)
        except asyncio.CancelledError:
            _stop(work)
            raise
        finally:
            seat.stop()
            metrics.handler_seconds(self.handler.pattern).observe(time.perf_counter() - began)
        if not done:
            _stop(work)
            raise TimeoutError(f"the handler ran longer than its deadline of {self.deadline_seconds:g} s")
        if work.cancelled():  # by something in the handler; were it us, the wait above had raised
            raise HandlerRuleBroken("a handler must not end by cancelling itself")
        if (error := work.exception()) is not None and not isinstance(error, Exception):
            raise _refused(error)
        return work.result()

    async def _mark(self, seat: HandlerConnection, held: HandlerTransaction, action: str) -> None:
        try:
            marked = await self.ledger.complete_if_held(seat.driver, self.claim, held, action)
        except asyncpg.InFailedSQLTransactionError as error:
            raise HandlerRuleBroken(_SWALLOWED) from error
        if not marked:  # no longer the transaction that was begun
            raise TransactionEnded

    def _in_no_transaction(self, seat: HandlerConnection) -> bool:
        """Not even in a failed one: since the handler ended its own, each statement has committed."""
        try:
            raw = seat.driver
        except LedgerUnavailable:  # a lost connection committed nothing more
            return False
        return self.held is not None and not raw.is_in_transaction()

    async def _commit(self, seat: HandlerConnection, action: str) -> str | Exception:
        try:
            async with asyncio.timeout(self.postgres_timeout_seconds):
                await seat.commit()
        except (*UNAVAILABLE, LedgerUnavailable, asyncio.CancelledError) as error:
            await seat.discard()
            return CommitUnknown(action, describe(error))
        return action

    async def _end(self, seat: HandlerConnection) -> None:
        """Give up on the transaction, whatever the handler and the server are doing in it."""
        await seat.discard()
        if self.held is not None:
            with contextlib.suppress(LedgerUnavailable):  # then the server's own timeouts end it
                await self.ledger.end(self.held)

    async def _give_back(self, seat: HandlerConnection) -> None:
        try:
            await seat.roll_back(self.postgres_timeout_seconds)
            await self.seats.release(seat)
        except (*UNAVAILABLE, LedgerUnavailable, asyncio.CancelledError):  # or the handler closed it
            await seat.discard()


def _in_task(
    loop: asyncio.AbstractEventLoop, function: Callable[..., Any], event: Event, context: Context
) -> asyncio.Future[Any]:
    async def body() -> Any:
        try:
            return await function(event, context)
        except (SystemExit, KeyboardInterrupt) as error:
            raise _refused(error) from error

    return loop.create_task(body())


def _in_thread(
    loop: asyncio.AbstractEventLoop, function: Callable[..., Any], event: Event, context: Context
) -> asyncio.Future[Any]:
    """Run a sync handler in a thread of its own: a daemon, so that one that hangs cannot hold up the exit."""
    future: asyncio.Future[Any] = loop.create_future()

    def settle(result: Any, error: Exception | None) -> None:
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)
            future.exception()  # retrieved: after the deadline nobody else does

    def body() -> None:
        result: Any = None
        failure: Exception | None = None
        try:
            result = function(event, context)
        except BaseException as error:  # noqa: BLE001
            catchable = isinstance(error, Exception) and not isinstance(error, StopIteration)
            failure = error if catchable else _refused(error)  # type: ignore[assignment]
        with contextlib.suppress(RuntimeError):  # the loop is closed: the service has gone, recovery has the row
            loop.call_soon_threadsafe(settle, result, failure)

    run = contextvars.copy_context().run
    threading.Thread(target=run, args=(body,), daemon=True, name=f"handler-{event.id}").start()
    return future


def _refused(error: BaseException) -> HandlerRuleBroken:
    """For what would end the event loop, or go past every `except Exception`, were it let through."""
    return HandlerRuleBroken(f"a handler must not raise {type(error).__name__}")


def _stop(work: asyncio.Future[Any]) -> None:
    """Ask the handler to end. A thread cannot be: its later calls on the connection raise."""
    if isinstance(work, asyncio.Task):
        work.cancel()
        work.add_done_callback(lambda task: task.cancelled() or task.exception())


def _checked_action(value: object) -> str:
    if value is None:
        return "handled"
    if not isinstance(value, str) or not value.isprintable() or not 0 < len(value) <= _ACTION_MOST_CHARACTERS:
        raise HandlerRuleBroken(
            f"a handler returns its action, a short printable str, or None; this one returned {type(value).__name__}"
        )
    return value
