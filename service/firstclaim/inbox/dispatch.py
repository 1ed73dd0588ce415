"""Dispatch: a claimed event gets a slot and one attempt, and the result is recorded in the ledger.

Guarantees: the result of an attempt is recorded once, guarded by the attempt's number. A handler that committed by
itself is detected, however its attempt ended, and is not retried automatically. A claim that gets no slot within half
of its lease, or that a shutdown interrupts, is released without a charge.
"""

import asyncio
import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, assert_never

import structlog

from firstclaim import outcome
from firstclaim.backoff import Backoff
from firstclaim.errors import LedgerUnavailable, Permanent, Retry
from firstclaim.event import Event
from firstclaim.inbox.attempt import (
    Attempt,
    AttemptResult,
    Committed,
    CommitUnknown,
    Failed,
    Interrupted,
    NotStarted,
    TakenOver,
)
from firstclaim.inbox.claims import Claims
from firstclaim.inbox.ledger import Claim, Ledger
from firstclaim.inbox.slots import Place, Slots
from firstclaim.inbox.transaction_watch import TransactionEnded, TransactionWatch
from firstclaim.observability import metrics, tracing
from firstclaim.observability.frames import failure_report, frames
from firstclaim.observability.redaction import class_name, describe_error, is_a
from firstclaim.outcome import Outcome
from firstclaim.postgres.handler_connections import HandlerConnections
from firstclaim.registry import Handler
from firstclaim.status import Status

log = structlog.get_logger(__name__)

QUEUED = "Recorded; dispatched when a handler slot is free"
_RELEASE_RETRY_SECONDS = 1.0  # well below a lease: an event that is released in time is not charged


@dataclass(frozen=True, slots=True)
class DispatchLimits:
    """Seconds; `firstclaim.settings` says why each has its default."""

    deadline_seconds: float
    lease_seconds: float
    postgres_timeout_seconds: float


class Dispatcher:
    """Runs handlers, each in a slot and on a connection of its own."""

    def __init__(
        self,
        connections: HandlerConnections,
        ledger: Ledger,
        claims: Claims,
        slots: Slots,
        watch: TransactionWatch,
        backoff: Backoff,
        limits: DispatchLimits,
    ) -> None:
        self._connections = connections
        self._ledger = ledger
        self._claims = claims
        self._slots = slots
        self._watch = watch
        self._backoff = backoff
        self._limits = limits
        self._retries: dict[asyncio.Task[None], Claim] = {}
        self._waiting: dict[tuple[str, int], Claim] = {}

    @property
    def unstarted(self) -> list[Claim]:
        """The claims whose attempt has not begun: they wait for a slot, or for their release."""
        return [*self._waiting.values(), *self._retries.values()]

    async def run(self, claim: Claim, event: Event, handler: Handler, place: Place) -> Outcome:
        """Dispatch a claimed event, and release `place`.

        Raises `LedgerUnavailable` if the event's state is unknown or cannot be written.
        """
        result: AttemptResult | None = None
        self._waiting[claim.event_id, claim.attempt] = claim
        try:
            try:
                if not await place.enter(
                    previously_abandoned=claim.abandoned > 0, timeout_seconds=self._limits.lease_seconds / 2
                ):  # the next process with a free slot takes it
                    await self.release(claim)
                    return outcome.deferred(QUEUED, claim.attempt)
                del self._waiting[claim.event_id, claim.attempt]
                result = await self._attempt(claim, event, handler)
            finally:
                place.release(result.running if isinstance(result, Failed | Interrupted) else None)
            return await self.settle(claim, handler, result)
        except asyncio.CancelledError:
            # A shutdown: during the attempt, or while the claim waited for its slot or its result was being settled.
            await self.settle_interrupted(claim, effects_committed=effects_committed(result))
            raise
        finally:
            self._waiting.pop((claim.event_id, claim.attempt), None)

    async def _attempt(self, claim: Claim, event: Event, handler: Handler) -> AttemptResult:
        attempt = Attempt(
            self._connections,
            self._ledger,
            self._watch,
            claim,
            event,
            handler,
            self._limits.deadline_seconds,
            self._limits.postgres_timeout_seconds,
        )
        with tracing.span("attempt", attempt=claim.attempt):
            result = await attempt.run()
            if not isinstance(result, Committed):
                name = class_name(result.error) if isinstance(result, Failed) else type(result).__name__
                tracing.note(error=name)
        if isinstance(result, Failed):
            self._note_failed(claim, handler, result)
        return result

    def _note_failed(self, claim: Claim, handler: Handler, result: Failed) -> None:
        error = result.error
        log.warning(
            "handler_failed",
            **_names(claim, handler),
            error=describe_error(error),
            frames=frames(error, handler.function),
        )
        self.note_running(claim, handler, result, claim.event_id)

    def note_running(self, claim: Claim, handler: Handler, result: Failed, name: str) -> None:
        """Note a thread that runs on after its attempt, if it does. Readiness names it by `name`."""
        if result.running is None or handler.is_async:
            return
        if result.hung:
            self._note_hung(claim, handler, result.running, name)
        else:  # its call was ended before its deadline, because it has ended its transaction: it may return in time
            loop = asyncio.get_running_loop()
            loop.call_later(self._limits.deadline_seconds, self._note_hung, claim, handler, result.running, name)

    def _note_hung(self, claim: Claim, handler: Handler, running: asyncio.Future[Any], name: str) -> None:
        if not running.done():
            self._slots.hang(name, running)
            metrics.hung_handlers.inc()
            log.error("handler_hung", **_names(claim, handler))

    async def settle(self, claim: Claim, handler: Handler, result: AttemptResult) -> Outcome:
        """Record the result of an attempt in the ledger."""
        match result:
            case Committed(action):
                return outcome.processed(action, claim.attempt)
            case TakenOver():
                return outcome.duplicate(claim.event_id)
            case NotStarted(error):
                # For example, the server takes no more connections. If the event stayed claimed, it would count as
                # abandoned, and be dead after eight times. If it were due now, it would be tried again at once.
                await self.release(claim, due_in_seconds=self._backoff.first_seconds)
                raise LedgerUnavailable(error)
            case CommitUnknown():
                return await self._settle_unknown(claim, result)
            case Failed(hung=True, effects_committed=False):
                return await self._settle_hung(claim, failure_report(result.error, handler.function))
            case Failed(error, effects_committed):
                return await self._settle_failed(claim, handler, error, effects_committed)
            case Interrupted():  # `run` settles it, as it does if the shutdown interrupts `run` itself
                raise asyncio.CancelledError
            case _:
                assert_never(result)

    async def _settle_unknown(self, claim: Claim, result: CommitUnknown) -> Outcome:
        """The connection was lost during COMMIT. The guarded update waits for the old backend, unlike a read."""
        self._ledger.connect_anew()
        if await self._ledger.committed(result.transaction):
            # Together with the mark; or by the handler itself, before it, and then the row is not marked.
            if await self._ledger.kill_if_held(claim, str(TransactionEnded())) is not None:
                return outcome.failed(claim.attempt, dead=True)
        else:
            wait = self._backoff.after(claim.failures + 1)
            status = await self._ledger.fail_if_held(claim, f"COMMIT failed: {result.error}", due_in_seconds=wait)
            if status is not None:
                await self._claims.forget(claim)
                return outcome.failed(claim.attempt, dead=status is Status.DEAD)
        row = await self._ledger.find(claim.event_id)
        if row is None:  # the ledger was restored meanwhile: no promise for a row that does not exist
            raise LedgerUnavailable("the row is gone")
        if (row.status, row.attempt) == (Status.COMPLETED, claim.attempt):
            return outcome.processed(result.action, claim.attempt)
        return row.answer(claim.event_id)

    async def _settle_failed(
        self, claim: Claim, handler: Handler, error: Exception, effects_committed: bool | None
    ) -> Outcome:
        if effects_committed is None:
            raise LedgerUnavailable("it is not known whether the handler's transaction was committed")
        if effects_committed:
            report = "\n".join([str(TransactionEnded()), *frames(error, handler.function)])
            await self._ledger.kill_if_held(claim, report)
            return outcome.failed(claim.attempt, dead=True)
        report = failure_report(error, handler.function)
        decided = decision(error)
        if decided is not None and is_a(decided, Permanent):
            await self._ledger.kill_if_held(claim, report)
            return outcome.dead(claim.event_id, claim.attempt)
        wait = requested_wait(decided) if decided is not None and is_a(decided, Retry) else None
        if wait is None:
            wait = self._backoff.after(claim.failures + 1)
        status = await self._ledger.fail_if_held(claim, report, due_in_seconds=wait)
        if status is Status.FAILED:
            await self._claims.forget(claim)
        return outcome.failed(claim.attempt, dead=status is Status.DEAD)

    async def _settle_hung(self, claim: Claim, report: str) -> Outcome:
        """The thread ignores its deadline, and only a restart ends it: the event counts as abandoned."""
        status = await self._ledger.abandon_if_held(claim, report)
        if status is Status.PENDING:
            await self._claims.forget(claim)
        return outcome.failed(claim.attempt, dead=status is Status.DEAD)

    async def settle_interrupted(self, claim: Claim, *, effects_committed: bool | None) -> None:
        """A shutdown has cancelled the attempt: release the event, unless its effects are or may be committed."""
        if effects_committed:
            await self._ledger.kill_if_held(claim, str(TransactionEnded()))
        elif effects_committed is not None:  # else it is left to recovery, once its lease is over
            await self.release(claim)

    async def close(self) -> None:
        """Stop repeating releases. Events that could not be released count as abandoned once their lease is over."""
        for retry in self._retries:
            retry.cancel()
        if self._retries:
            await asyncio.wait(self._retries)

    async def release_unstarted(self, claims: Iterable[Claim]) -> None:
        """Release claims that `unstarted` returned, without a charge. Recovery gets those that cannot be released."""
        await asyncio.gather(*(self._release_once(claim, 0) for claim in claims), return_exceptions=True)

    async def release(self, claim: Claim, *, due_in_seconds: float = 0) -> None:
        """Release without a charge. If Postgres is unreachable, repeat it until it succeeds."""
        try:
            await self._release_once(claim, due_in_seconds)
        except LedgerUnavailable:
            retry = asyncio.create_task(self._release_repeatedly(claim, due_in_seconds))
            self._retries[retry] = claim
            retry.add_done_callback(self._retries.pop)

    async def _release_once(self, claim: Claim, due_in_seconds: float) -> None:
        await self._ledger.release_if_held(claim, due_in_seconds=due_in_seconds)
        await self._claims.forget(claim)

    async def _release_repeatedly(self, claim: Claim, due_in_seconds: float) -> None:
        while True:
            await asyncio.sleep(_RELEASE_RETRY_SECONDS)
            with contextlib.suppress(LedgerUnavailable):
                return await self._release_once(claim, due_in_seconds)


def _names(claim: Claim, handler: Handler) -> dict[str, str | int]:
    """What every log record of an attempt names."""
    return {"event_id": claim.event_id, "type": claim.type, "attempt": claim.attempt, "handler": handler.name}


def effects_committed(result: AttemptResult | None) -> bool | None:
    """What a shutdown assumes if it interrupts the settling of `result`; None: it must leave the row alone."""
    if isinstance(result, Failed | Interrupted):
        return result.effects_committed
    return False if result is None or isinstance(result, NotStarted) else None


def decision(error: Exception) -> Permanent | Retry | None:
    """The `Permanent` or `Retry` that the handler raised, also in an exception group (of an `asyncio.TaskGroup`)."""
    found: Permanent | Retry | None = None
    left: list[BaseException] = [error]
    while left:
        each = left.pop()
        if is_a(each, BaseExceptionGroup):
            left.extend(reversed(vars(BaseExceptionGroup)["exceptions"].__get__(each)))
        elif is_a(each, Permanent):
            return each
        elif is_a(each, Retry) and found is None:
            found = each
    return found


def requested_wait(retry: Retry) -> float | None:
    """The seconds of `Retry(after=...)`; None if a subclass leaves the attribute out, or sets an invalid one."""
    try:
        after = Retry(after=retry.after).after
        return None if after is None else float(after)
    except Exception:  # noqa: BLE001  (a handler's code may run here)
        return None
