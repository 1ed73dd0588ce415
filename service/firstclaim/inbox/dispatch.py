"""Dispatch: a claimed event gets a slot and one attempt, and the result is recorded in the ledger.

Guarantees: the result of an attempt is recorded once, guarded by the attempt's number. A handler that committed by
itself is detected, however its attempt ended, and is not retried automatically. A claim that gets no slot within half
of its lease, or that a shutdown interrupts, is released without a charge.
"""

import asyncio
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, Final, assert_never

import structlog

from firstclaim import outcome
from firstclaim.backoff import Backoff
from firstclaim.errors import LedgerUnavailable, Pause, Permanent, Retry
from firstclaim.event import Event
from firstclaim.inbox.attempt import (
    AttemptResult,
    Committed,
    CommitUnknown,
    Failed,
    Interrupted,
    KeyTaken,
    NotStarted,
    Postponed,
    TakenOver,
    effects_committed,
    outcome_of,
)
from firstclaim.inbox.batch_ledger import BatchLedger
from firstclaim.inbox.claim import Claim
from firstclaim.inbox.claims import Claims
from firstclaim.inbox.decisions import decision, failure, requested_wait
from firstclaim.inbox.dispatch_limits import DispatchLimits
from firstclaim.inbox.fresh import FetchObject, with_fresh_object
from firstclaim.inbox.keys import Turn
from firstclaim.inbox.ledger import Ledger
from firstclaim.inbox.pauses import TYPE_PAUSED, pause_for_handler
from firstclaim.inbox.releases import Releases
from firstclaim.inbox.single_attempt import SingleAttempt
from firstclaim.inbox.slots import Place, Slots
from firstclaim.inbox.transaction_watch import TransactionEnded, TransactionWatch
from firstclaim.observability import metrics, tracing
from firstclaim.observability.failure import Failure
from firstclaim.observability.frames import failure_report, frames
from firstclaim.observability.handler_metrics import AttemptOutcome
from firstclaim.observability.redaction import class_name, describe_error, is_a
from firstclaim.outcome import Kind, Outcome
from firstclaim.postgres.handler_connections import HandlerConnections
from firstclaim.registry import Handler
from firstclaim.status import Status

log = structlog.get_logger(__name__)

QUEUED = "Recorded; dispatched when a handler slot is free"
_POSTPONED = "Recorded; dispatched when Stripe's API takes requests again"
KEY_IS_TAKEN = "Recorded; dispatched when no other event of its key is being handled"
_COUNTED: Final[Mapping[Kind, AttemptOutcome]] = {Kind.PROCESSED: "completed", Kind.FAILED: "failed"}


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
        tasks: Collection[str],
        fetch: FetchObject | None = None,
    ) -> None:
        """`fetch`: for handlers with `fresh=True`."""
        self.connections = connections
        self.ledger = ledger
        self.claims = claims
        self.slots = slots
        self.watch = watch
        self.backoff = backoff
        self.limits = limits
        self.tasks = tasks  # the names that a handler may enqueue
        self._fetch = fetch
        self.releases = Releases(ledger, claims)
        self._waiting: dict[tuple[str, int], Claim] = {}

    @property
    def unstarted(self) -> list[Claim]:
        """The claims whose attempt has not begun."""
        return [*self._waiting.values(), *self.releases.waiting]

    async def run(
        self,
        claim: Claim,
        event: Event,
        handler: Handler,
        place: Place,
        *,
        waited_seconds: float = 0,
        turn: Turn | None = None,
    ) -> Outcome:
        """Dispatch a claimed event, and release `place`. `waited_seconds`: how long it has been claimed.

        `turn`: of an event that has a key. If another process has the key, it is noted there, and the event released.

        Raises `LedgerUnavailable` if the event's state is unknown or cannot be written.
        """
        result: AttemptResult | None = None
        self._waiting[claim.event_id, claim.attempt] = claim
        try:
            try:
                if not await place.enter(
                    handler.metrics,
                    previously_abandoned=claim.abandoned > 0,
                    timeout_seconds=self.limits.lease_seconds / 2 - waited_seconds,
                ):  # the next process with a free slot takes it
                    await self.release(claim)
                    return outcome.deferred(QUEUED, claim.attempt)
                key = None if turn is None else turn.number
                if not handler.fresh or self._fetch is None:
                    del self._waiting[claim.event_id, claim.attempt]
                    result = await self._attempt(claim, event, handler, key)
                else:
                    result = await self._attempt_fresh(self._fetch, claim, event, handler, key)
            finally:
                place.release(result.running if isinstance(result, Failed | Interrupted) else None)
            if isinstance(result, KeyTaken) and turn is not None:
                return await self._miss(claim, turn)
            return await self.settle(claim, handler, result)
        except asyncio.CancelledError:
            # A shutdown: during the attempt, or while the claim waited for its slot or its result was being settled.
            await self.settle_interrupted(claim, effects_committed=effects_committed(result))
            raise
        finally:
            self._waiting.pop((claim.event_id, claim.attempt), None)

    async def _miss(self, claim: Claim, turn: Turn) -> Outcome:
        """The event waits for its key. Nobody is charged: its handler was not called."""
        turn.missed = True
        await self.release(claim, due_in_seconds=turn.due_in_seconds)
        return outcome.deferred(KEY_IS_TAKEN, claim.attempt)

    async def fail(self, claim: Claim, handler: Handler, error: Exception) -> Outcome:
        """Settle a claim whose attempt could not begin, because a function of the handler's author raised `error`."""
        failed = Failed(error, effects_committed=False, running=None, hung=False)
        self._note_failed(claim, handler, failed)
        return await self.settle(claim, handler, failed)

    def backoff_of(self, handler: Handler) -> Backoff:
        """When a failed event of this handler is due again."""
        return handler.options.backoff or self.backoff

    async def _attempt_fresh(
        self, fetch: FetchObject, claim: Claim, event: Event, handler: Handler, key: int | None
    ) -> AttemptResult:
        """Fetch the event's object, then attempt. Until it is there, the attempt has not begun."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        with tracing.span("fetch"):
            fetched = await with_fresh_object(fetch, event, self.limits.fetch_seconds)
        del self._waiting[claim.event_id, claim.attempt]
        if isinstance(fetched, Event):
            return await self._attempt(claim, fetched, handler, key, spent_seconds=loop.time() - began)
        if isinstance(fetched, Failed):
            self._note_failed(claim, handler, fetched)
        return fetched

    async def _attempt(
        self, claim: Claim, event: Event, handler: Handler, key: int | None, *, spent_seconds: float = 0
    ) -> AttemptResult:
        attempt = SingleAttempt(
            self.connections,
            self.ledger,
            self.watch,
            handler,
            self.limits.deadline_of(handler) - spent_seconds,
            self.limits.idle_of(handler),
            self.limits.postgres_timeout_seconds,
            self.tasks,
            claim,
            event,
            key,
        )
        with tracing.span("attempt", attempt=claim.attempt):
            result = await attempt.run()
            if isinstance(result, Committed) and result.follow_ups_due:
                self.slots.wake()
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
            loop.call_later(self.limits.deadline_of(handler), self._note_hung, claim, handler, result.running, name)

    def _note_hung(self, claim: Claim, handler: Handler, running: asyncio.Future[Any], name: str) -> None:
        if not running.done():
            self.slots.hang(name, running)
            metrics.hung_handlers.inc()
            held = handler.metrics.slots_held["hung_thread"]
            held.inc()
            running.add_done_callback(lambda _: held.dec())
            log.error("handler_hung", **_names(claim, handler))

    async def settle(self, claim: Claim, handler: Handler, result: AttemptResult) -> Outcome:
        """Count the attempt, and record its result in the ledger."""
        _count(handler, outcome_of(result))
        match result:
            case Committed(action):
                return outcome.processed(action, claim.attempt)
            case TakenOver() | KeyTaken():
                return outcome.duplicate(claim.event_id)
            case NotStarted(error):
                # For example, the server takes no more connections. If the event stayed claimed, it would count as
                # abandoned, and be dead after eight times. If it were due now, it would be tried again at once.
                await self.release(claim, due_in_seconds=self.backoff.first_seconds)
                raise LedgerUnavailable(error)
            case Postponed(error):
                return await self._postpone(claim, handler, error, _POSTPONED)
            case CommitUnknown():
                settled = await self._settle_unknown(claim, handler, result)
                _count(handler, _COUNTED.get(settled.kind))
                return settled
            case Failed(error, hung=True, effects_committed=False):
                return await self._settle_hung(claim, handler, error)
            case Failed(error, effects_committed):
                return await self._settle_failed(claim, handler, error, effects_committed)
            case Interrupted():  # `run` settles it, as it does if the shutdown interrupts `run` itself
                raise asyncio.CancelledError
            case _:
                assert_never(result)

    async def _settle_unknown(self, claim: Claim, handler: Handler, result: CommitUnknown) -> Outcome:
        """COMMIT was not confirmed. The guarded update waits for the old backend, unlike a read."""
        error = f"COMMIT failed: {result.error}"
        self.ledger.connect_anew()
        if await self.ledger.committed(result.transaction):
            # Together with the mark; or by the handler itself, before it, and then the row is not marked.
            ended = TransactionEnded()
            if await self.ledger.kill_if_held(claim, str(ended), failure(ended, handler)) is not None:
                return outcome.failed(claim.attempt, dead=True)
        elif status := await self._fail(claim, handler, error):
            log.warning("ledger_unavailable", event_id=claim.event_id, type=claim.type, error=error)
            await self.claims.forget(claim)
            return outcome.failed(claim.attempt, dead=status is Status.DEAD, of="ledger")
        row = await self.ledger.find(claim.event_id)
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
            ended = replace(failure(error, handler), error_class=TransactionEnded.__name__)
            await self.ledger.kill_if_held(claim, report, ended)
            return outcome.failed(claim.attempt, dead=True)
        report, of = failure_report(error, handler.function), failure(error, handler)
        decided = decision(error)
        if decided is not None and is_a(decided, Permanent):
            await self.ledger.kill_if_held(claim, report, of)
            return outcome.dead(claim.event_id, claim.attempt)
        if decided is not None and is_a(decided, Pause):
            if await pause_for_handler(self.ledger, claim, handler.name):
                log.error("paused_by_handler", **_names(claim, handler), error=describe_error(error))
            return await self._postpone(claim, handler, error, TYPE_PAUSED)
        wait = requested_wait(decided) if decided is not None and is_a(decided, Retry) else None
        status = await self._fail(claim, handler, report, of, wait)
        if status is Status.FAILED:
            await self.claims.forget(claim)
        return outcome.failed(claim.attempt, dead=status is Status.DEAD)

    async def _fail(
        self, claim: Claim, handler: Handler, report: str, of: Failure | None = None, wait: float | None = None
    ) -> Status | None:
        """The attempt failed; it is due again in `wait` seconds, None: by the handler's backoff."""
        seconds = self.backoff_of(handler).after(claim.failures + 1) if wait is None else wait
        own = handler.options.give_up_seconds
        return await self.ledger.fail_if_held(claim, report, of, due_in_seconds=seconds, give_up_seconds=own)

    async def _postpone(self, claim: Claim, handler: Handler, error: Exception, answer: str) -> Outcome:
        """Nobody has failed: due at the time that was named, or after a backoff, without a charge."""
        wait = requested_wait(error) if is_a(error, Retry) else None
        statuses = await BatchLedger(self.ledger).postpone_if_held(
            [claim],
            failure_report(error, handler.function),
            failure(error, handler),
            due_in_seconds=self.backoff_of(handler).after(claim.failures + 1) if wait is None else wait,
            give_up_seconds=handler.options.give_up_seconds,
        )
        status = statuses.get(claim.event_id)
        if status is Status.DEAD:
            return outcome.dead(claim.event_id, claim.attempt)
        if status is not None:
            await self.claims.forget(claim)
        return outcome.deferred(answer, claim.attempt)

    async def _settle_hung(self, claim: Claim, handler: Handler, error: Exception) -> Outcome:
        """The thread ignores its deadline, and only a restart ends it: the event counts as abandoned."""
        report = failure_report(error, handler.function)
        status = await self.ledger.abandon_if_held(claim, report, failure(error, handler))
        if status is Status.PENDING:
            await self.claims.forget(claim)
        return outcome.failed(claim.attempt, dead=status is Status.DEAD)

    async def settle_interrupted(self, claim: Claim, *, effects_committed: bool | None) -> None:
        """A shutdown has cancelled the attempt: release the event, unless its effects are or may be committed."""
        if effects_committed:
            await self.ledger.kill_if_held(claim, str(TransactionEnded()))
        elif effects_committed is not None:  # else it is left to recovery, once its lease is over
            await self.release(claim)

    async def release(self, claim: Claim, *, due_in_seconds: float = 0) -> None:
        """Release without a charge. If Postgres is unreachable, repeat it until it succeeds."""
        await self.releases.release(claim, due_in_seconds=due_in_seconds)


def _count(handler: Handler, counted: AttemptOutcome | None) -> None:
    if counted is not None:
        handler.metrics.attempts[counted].inc()


def _names(claim: Claim, handler: Handler) -> dict[str, str | int]:
    """The fields that every log record of an attempt has."""
    return {"event_id": claim.event_id, "type": claim.type, "attempt": claim.attempt, "handler": handler.name}
