"""Dispatch: lock the row, run the handler, mark last, commit; and account for every way this can end.

Guarantees: a handler's SQL and the completion mark commit together or not at all; its row stays locked while
it runs, so a live handler is never doubled, however slow; a handler that committed by itself is caught (its
transaction id changed) and never retried by itself. The work runs apart from any request, at most `slots` at
once, and at its deadline the attempt fails and its connection is terminated, whatever the handler does.
"""

import asyncio
import contextlib
import contextvars
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import structlog
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from service.errors import HandlerRuleBroken, LedgerUnavailable, Permanent, Retry
from service.inbox import outcome
from service.inbox.claims import Claims
from service.inbox.event import Event
from service.inbox.ledger import Claim, Held, Ledger
from service.inbox.model import Status
from service.inbox.outcome import Outcome
from service.inbox.postgres import UNAVAILABLE, describe, discard, handler_runs
from service.inbox.retry import Backoff
from service.logs import describe_error, redact
from service.registry import Context, Handler

log = structlog.get_logger(__name__)

_OWN_COMMIT = "rule broken: a handler must not commit; what it committed is kept, so it is not retried by itself"
_OWN_ROLLBACK = "rule broken: a handler must not roll back; its transaction carries the completion mark"
_SWALLOWED = "rule broken: the handler swallowed an SQL error, which had aborted its transaction"
_ABORTED = "25P02"  # in_failed_sql_transaction
_ACTION_MOST_CHARACTERS = 200


class _TakenOver(Exception):
    """Another holds the row now."""


@dataclass(frozen=True, slots=True)
class DispatchLimits:
    """Seconds and counts; each argues for itself in `service.settings`."""

    slots: int
    deadline_seconds: float
    lease_seconds: float
    postgres_timeout_seconds: float


class Dispatcher:
    """Runs handlers, `limits.slots` at once, one connection of `engine` each."""

    def __init__(
        self, engine: AsyncEngine, ledger: Ledger, claims: Claims, backoff: Backoff, limits: DispatchLimits
    ) -> None:
        self._engine = engine
        self._ledger = ledger
        self._claims = claims
        self._backoff = backoff
        self._limits = limits
        self._slots = asyncio.Semaphore(limits.slots)
        # An event that was abandoned before may kill the process again: one of those at a time, so that it
        # drags as few neighbours along as can be.
        self._suspects = asyncio.Semaphore(1)
        self._waiting = 0
        self._running = 0
        self._roomy = asyncio.Event()
        self._roomy.set()

    @property
    def free_slots(self) -> int:
        """How many handlers could start right now, those already waiting for a slot counted off."""
        return max(0, self._limits.slots - self._running - self._waiting)

    @property
    def suspect_free(self) -> bool:
        """Whether an event that was abandoned before could start right now."""
        return not self._suspects.locked()

    async def room(self) -> None:
        """Wait until half of the slots are free: recovery then fetches its next batch, not single events."""
        await self._roomy.wait()

    async def run(self, claim: Claim, event: Event, handler: Handler) -> Outcome:
        """Dispatch a claimed event; raises `LedgerUnavailable` when what became of it cannot be told."""
        release = await self._enter(claim)
        if release is None:
            # A full house: nothing is charged, whoever has a free slot next takes it.
            await self._ledger.release_if_held(claim)
            await self._claims.forget(claim)
            return outcome.deferred("Recorded; dispatched when a handler slot is free", claim.attempt)
        try:
            attempt = _Attempt(self._engine, self._ledger, self._limits, claim, event, handler, release)
            return await self._settle(claim, await attempt.run())
        except asyncio.CancelledError:
            await self._ledger.release_if_held(claim)
            await self._claims.forget(claim)
            raise

    async def _enter(self, claim: Claim) -> Callable[[], None] | None:
        """Wait for a slot, half the lease at most; returns what frees it again, or None."""
        gates = [self._suspects, self._slots] if claim.abandoned else [self._slots]
        entered: list[asyncio.Semaphore] = []
        self._count(waiting=1)
        try:
            async with asyncio.timeout(self._limits.lease_seconds / 2):
                for gate in gates:
                    await gate.acquire()
                    entered.append(gate)
        except BaseException as error:
            for gate in entered:
                gate.release()
            if isinstance(error, TimeoutError):
                return None
            raise
        finally:
            self._count(waiting=-1)
        self._count(running=1)

        def release() -> None:
            self._count(running=-1)
            for gate in entered:
                gate.release()

        return release

    def _count(self, *, waiting: int = 0, running: int = 0) -> None:
        self._waiting += waiting
        self._running += running
        if self.free_slots * 2 >= self._limits.slots:
            self._roomy.set()
        else:
            self._roomy.clear()

    async def _settle(self, claim: Claim, ended: "str | Exception") -> Outcome:
        """Bring the ledger in line with how the attempt ended: its action, or why it failed."""
        if isinstance(ended, str):
            return outcome.processed(ended, claim.attempt)
        if isinstance(ended, _TakenOver):
            return outcome.duplicate(claim.event_id)
        if isinstance(ended, _CommitUnknown):
            return await self._settle_unknown(claim, ended)
        log.warning("handler_failed", event_id=claim.event_id, attempt=claim.attempt, error=describe_error(ended))
        return await self._fail(claim, ended)

    async def _fail(self, claim: Claim, error: Exception) -> Outcome:
        text = redact(f"{type(error).__name__}: {_message(error)}")
        if isinstance(error, Permanent):
            await self._ledger.kill_if_held(claim, text)
            return outcome.dead(claim.event_id, claim.attempt)
        if isinstance(error, _OwnCommit):
            await self._ledger.kill_if_held(claim, text)
            return outcome.failed(claim.attempt)
        wait = error.after if isinstance(error, Retry) else None
        if wait is None:
            wait = self._backoff.after(claim.failures + 1)
        if await self._ledger.fail_if_held(claim, text, due_in_seconds=wait) is Status.FAILED:
            await self._claims.forget(claim)
        return outcome.failed(claim.attempt)

    async def _settle_unknown(self, claim: Claim, error: "_CommitUnknown") -> Outcome:
        """The connection was lost during COMMIT. The guarded update waits for the old backend, a read would not."""
        wait = self._backoff.after(claim.failures + 1)
        if await self._ledger.fail_if_held(claim, str(error), due_in_seconds=wait) is not None:
            await self._claims.forget(claim)
            return outcome.failed(claim.attempt)
        found = await self._ledger.find(claim.event_id)
        if found is not None and (found.status, found.attempt) == (Status.COMPLETED, claim.attempt):
            return outcome.processed(error.action, claim.attempt)
        return outcome.duplicate(claim.event_id)


class _OwnCommit(HandlerRuleBroken):
    """The handler committed by itself."""


class _CommitUnknown(Exception):
    """COMMIT was sent, and what came back is not its success."""

    def __init__(self, action: str, error: str) -> None:
        super().__init__(f"COMMIT failed: {error}")
        self.action = action


@dataclass(slots=True)
class _Attempt:
    """One attempt: one connection, one transaction, one call of the handler."""

    engine: AsyncEngine
    ledger: Ledger
    limits: DispatchLimits
    claim: Claim
    event: Event
    handler: Handler
    release_slot: Callable[[], None]

    async def run(self) -> "str | Exception":
        """The action once it is committed, or the exception that says why it is not; frees the slot."""
        work: asyncio.Future[Any] | None = None
        try:
            connection = await self._connect()
        except BaseException:
            self.release_slot()
            raise
        held: Held | None = None
        try:
            async with asyncio.timeout(self.limits.postgres_timeout_seconds):
                held = await self.ledger.hold(connection, self.claim)
            if held is None:
                return _TakenOver()
            work = self._start(connection)
            action = _checked_action(await self._within_deadline(work))
            handler_runs(connection, False)
            await self._mark(connection, held, action)
        except (TimeoutError, asyncio.CancelledError) as error:
            await self._end(connection, held)
            if isinstance(error, TimeoutError):
                return error
            raise
        except Exception as error:  # noqa: BLE001  (whatever a handler raises is this attempt's failure)
            return error
        else:
            return await self._commit(connection, action)
        finally:
            await self._leave(connection, work)

    async def _end(self, connection: AsyncConnection, held: Held | None) -> None:
        """Give up on the transaction, whatever the handler and the server are doing in it."""
        await discard(connection)
        if held is not None:
            with contextlib.suppress(LedgerUnavailable):  # then the server's own timeouts end it
                await self.ledger.end(held)

    async def _connect(self) -> AsyncConnection:
        try:
            async with asyncio.timeout(self.limits.postgres_timeout_seconds):
                return await self.engine.connect()
        except UNAVAILABLE as error:
            raise LedgerUnavailable(describe(error)) from error

    def _start(self, connection: AsyncConnection) -> asyncio.Future[Any]:
        loop = asyncio.get_running_loop()
        context = Context(self.event, self.claim.attempt, connection, loop, loop.time() + self.limits.deadline_seconds)
        handler_runs(connection, True)
        if self.handler.is_async:
            return loop.create_task(_contained(self.handler.function, self.event, context))
        return _in_thread(loop, self.handler.function, self.event, context)

    async def _within_deadline(self, work: asyncio.Future[Any]) -> Any:
        """Wait for the handler, but not for one that ignores its cancellation."""
        try:
            done, _ = await asyncio.wait({work}, timeout=self.limits.deadline_seconds)
        except asyncio.CancelledError:
            _stop(work)
            raise
        if not done:
            _stop(work)
            raise TimeoutError(f"the handler ran longer than its deadline of {self.limits.deadline_seconds:g} s")
        if work.cancelled():  # by something in the handler; were it us, the wait above had raised
            raise HandlerRuleBroken("a handler must not end by cancelling itself")
        return work.result()

    async def _mark(self, connection: AsyncConnection, held: Held, action: str) -> None:
        try:
            async with asyncio.timeout(self.limits.postgres_timeout_seconds):
                if await self.ledger.complete_if_held(connection, self.claim, held, action):
                    return
                await connection.rollback()
        except DBAPIError as error:
            if getattr(error.orig, "sqlstate", None) == _ABORTED:
                raise HandlerRuleBroken(_SWALLOWED) from error
            raise
        # No row: not our transaction any more, because the handler ended it. How, the server knows.
        if await self.ledger.committed(held):
            raise _OwnCommit(_OWN_COMMIT)
        raise HandlerRuleBroken(_OWN_ROLLBACK)

    async def _commit(self, connection: AsyncConnection, action: str) -> "str | Exception":
        try:
            async with asyncio.timeout(self.limits.postgres_timeout_seconds):
                await connection.commit()
        except (*UNAVAILABLE, asyncio.CancelledError) as error:
            await discard(connection)
            return _CommitUnknown(action, describe(error))
        return action

    async def _leave(self, connection: AsyncConnection, work: asyncio.Future[Any] | None) -> None:
        """Give the connection back and, once the handler has really ended, its slot."""
        handler_runs(connection, False)
        try:
            async with asyncio.timeout(self.limits.postgres_timeout_seconds):
                await connection.close()
        except (*UNAVAILABLE, asyncio.CancelledError):
            await discard(connection)
        finally:
            if work is None or work.done():
                self.release_slot()
            else:
                work.add_done_callback(lambda _: self.release_slot())


async def _contained(function: Callable[..., Any], event: Event, context: Context) -> Any:
    try:
        return await function(event, context)
    except SystemExit as error:  # sys.exit() in a handler must not end the service
        raise HandlerRuleBroken("a handler must not exit the process") from error


def _in_thread(
    loop: asyncio.AbstractEventLoop, function: Callable[..., Any], event: Event, context: Context
) -> asyncio.Future[Any]:
    """Run a sync handler in a thread of its own: a daemon, so that one that hangs cannot hold up the exit."""
    future: asyncio.Future[Any] = loop.create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)
            future.exception()  # retrieved: after the deadline nobody else does

    def body() -> None:
        result, failure = None, None
        try:
            result = function(event, context)
        except SystemExit:
            failure = HandlerRuleBroken("a handler must not exit the process")
        except BaseException as error:  # noqa: BLE001
            failure = error  # type: ignore[assignment]
        with contextlib.suppress(RuntimeError):  # the loop is closed: the service has gone, recovery has the row
            loop.call_soon_threadsafe(settle, result, failure)

    run = contextvars.copy_context().run
    threading.Thread(target=run, args=(body,), daemon=True, name=f"handler-{event.id}").start()
    return future


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


def _message(error: Exception) -> str:
    """What may be kept of an error: a database's says which row, so only its first line without parameters."""
    original = getattr(error, "orig", None) or error
    return (str(original).splitlines() or [""])[0]
