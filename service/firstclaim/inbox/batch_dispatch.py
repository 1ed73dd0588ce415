"""One batch: a slot, one attempt for all of its events, and the outcome of each.

Guarantees: a batch that fails charges nobody. Its transaction is rolled back, its events get new leases, and each goes
alone, where only its own failure counts. So an event that fails costs the other events of its batch one more run, in
whichever process, and no more: the row of an event that goes alone says so, until it has run. Everything that is not a
failure of the batch is settled event by event, as after an attempt at one event.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import structlog

from firstclaim import outcome
from firstclaim.errors import LedgerUnavailable, Retry
from firstclaim.event import Event
from firstclaim.inbox.attempt import AttemptResult, Committed, CommitUnknown, Failed, Interrupted, effects_committed
from firstclaim.inbox.batch_attempt import BatchAttempt, BatchResult
from firstclaim.inbox.batch_ledger import BatchLedger
from firstclaim.inbox.claim import Claim
from firstclaim.inbox.decisions import decision, failure, requested_wait
from firstclaim.inbox.dispatch import QUEUED, Dispatcher
from firstclaim.inbox.slots import Place
from firstclaim.inbox.statements import GOES_ALONE
from firstclaim.observability import tracing
from firstclaim.observability.frames import failure_report, frames
from firstclaim.observability.redaction import class_name, describe_error, is_a, redacted_error
from firstclaim.outcome import Kind, Outcome
from firstclaim.registry import Handler
from firstclaim.status import Status

log = structlog.get_logger(__name__)


class Member:
    """A claimed event on its way through a batch, and the outcome that somebody waits for."""

    __slots__ = ("alone", "begun", "claim", "ended", "event", "leased_at", "result", "span")

    def __init__(self, claim: Claim, event: Event, loop: asyncio.AbstractEventLoop) -> None:
        self.claim = claim
        self.event = event
        self.leased_at = loop.time()
        self.span = tracing.current()  # of its delivery, or of its recovery
        self.begun = False  # whether its attempt has begun; false again once its batch has failed
        self.alone = False  # its batch has failed, and it has left it: a task of its own settles it
        self.ended = False  # not `result.done()`: a shutdown cancels the task that waits, and the future with it
        self.result: asyncio.Future[Outcome] = loop.create_future()

    def end(self, result: Outcome) -> None:
        """The event has this outcome."""
        self.ended = True
        if not self.result.done():
            self.result.set_result(result)

    def fail(self, error: Exception) -> None:
        """The event's state is unknown, or could not be written."""
        self.ended = True
        if not self.result.done():
            self.result.set_exception(error)
            self.result.exception()  # marks it as retrieved: after the budget nobody may wait for it

    @property
    def processed(self) -> bool:
        """Whether its effects are known to be committed."""
        result = self.result
        return (
            result.done()
            and not result.cancelled()
            and not result.exception()
            and result.result().kind is Kind.PROCESSED
        )


GoAlone = Callable[[Member], object]  # starts what dispatches it by itself


@dataclass(frozen=True, slots=True)
class BatchDispatcher:
    """Runs the batches of one handler, in the slots and with the ledger and the limits of `dispatcher`."""

    handler: Handler
    dispatcher: Dispatcher
    ledger: BatchLedger

    @property
    def lease_seconds(self) -> float:
        """How long a claim lasts."""
        return self.dispatcher.limits.lease_seconds

    async def run(self, members: Sequence[Member], go_alone: GoAlone) -> None:
        """Dispatch them together, and end each, or let it go alone, because the batch has failed.

        Raises nothing but a shutdown's cancellation.
        """
        result: BatchResult | None = None
        try:
            result = await self._attempt(members)
            await self._settle(members, result, go_alone)
        except asyncio.CancelledError:
            end = None if result is None else result.end
            await self._settle_interrupted(members, effects_committed=effects_committed(end))
            raise
        except Exception as error:  # noqa: BLE001  (every task that waits for a member gets it)
            for member in members:
                member.fail(error)

    async def _attempt(self, members: Sequence[Member]) -> BatchResult | None:
        """The result of their attempt; None: there was no slot in time."""
        place = Place(self.dispatcher.slots, for_delivery=True)
        running: asyncio.Future[Any] | None = None
        try:
            waited = asyncio.get_running_loop().time() - members[0].leased_at
            left = self.lease_seconds / 2 - waited  # the second half of a split batch may have no time left
            if left <= 0 or not await place.enter(
                self.handler.metrics, previously_abandoned=False, timeout_seconds=left
            ):
                return None
            for member in members:
                member.begun = True
            with tracing.span("batch", [member.span for member in members], events=len(members)):
                result = await self._attempt_at(members).run()
                if not isinstance(result.end, Committed):
                    name = class_name(result.end.error) if isinstance(result.end, Failed) else type(result.end).__name__
                    tracing.note(error=name)
            if isinstance(result.end, Committed) and result.end.follow_ups_due:
                self.dispatcher.slots.wake()
            running = result.end.running if isinstance(result.end, Failed | Interrupted) else None
            return result
        finally:
            place.release(running)

    def _attempt_at(self, members: Sequence[Member]) -> BatchAttempt:
        own = self.dispatcher
        return BatchAttempt(
            own.connections,
            own.ledger,
            own.watch,
            self.handler,
            own.limits.deadline_of(self.handler),
            own.limits.idle_of(self.handler),
            own.limits.postgres_timeout_seconds,
            own.tasks,
            self.ledger,
            [member.claim for member in members],
            [member.event for member in members],
        )

    # -- settling ---------------------------------------------------------------------------------------

    async def _settle(self, members: Sequence[Member], result: BatchResult | None, go_alone: GoAlone) -> None:
        if result is None:
            await asyncio.gather(*(self.release(member) for member in members))
            return
        held_ids = {claim.event_id for claim in result.held}
        held: list[Member] = []
        for member in members:
            if member.claim.event_id in held_ids:
                held.append(member)
            else:  # it has left the batch
                member.end(outcome.duplicate(member.claim.event_id))
        match result.end:
            case Committed():
                self.handler.metrics.attempts["completed"].inc(len(held))
                for member, action in zip(held, result.actions, strict=True):
                    member.end(outcome.processed(action, member.claim.attempt))
                await self.dispatcher.claims.mark([member.claim for member in held])
            case CommitUnknown() as end:
                await self._settle_unknown(held, end, result.actions, go_alone)
            case Failed() as end:
                await self._settle_failed(held, end, go_alone)
            case Interrupted():
                raise asyncio.CancelledError
            case end:
                await self._settle_each(held, end)

    async def _settle_unknown(
        self, members: Sequence[Member], end: CommitUnknown, actions: Sequence[str], go_alone: GoAlone
    ) -> None:
        """Settle row by row, with the guarded update.

        If the database cannot tell the result of one, recovery gets that row and the rest.

        A COMMIT that has failed (of a deferred constraint, for example) is a failure like any other: each goes alone.
        """
        error: LedgerUnavailable | None = None
        try:
            if not await self.ledger.committed(end.transaction):
                failure = LedgerUnavailable(f"COMMIT failed: {end.error}")
                failed = Failed(failure, effects_committed=False, running=None, hung=False)
                await self._settle_failed(members, failed, go_alone)
                return
        except LedgerUnavailable as unavailable:
            error = unavailable
        for member, action in zip(members, actions, strict=True):
            if error is not None:
                member.fail(error)
                continue
            try:
                settled = await self.dispatcher.settle(member.claim, self.handler, replace(end, action=action))
                member.end(settled)
            except LedgerUnavailable as unavailable:
                error = unavailable
                member.fail(error)
        await self.dispatcher.claims.mark([member.claim for member in members if member.processed])

    async def _settle_each(self, members: Sequence[Member], end: AttemptResult) -> None:
        """Settle each as after an attempt at it alone; at once, because each may wait as long as Postgres is silent."""

        async def settle(member: Member) -> None:
            try:
                member.end(await self.dispatcher.settle(member.claim, self.handler, end))
            except LedgerUnavailable as error:
                member.fail(error)

        await asyncio.gather(*map(settle, members))

    async def _settle_failed(self, members: Sequence[Member], end: Failed, go_alone: GoAlone) -> None:
        self._note_failed(members, end)
        if end.effects_committed is not False:  # committed by the handler, or perhaps: nothing may be tried again
            await self._settle_each(members, end)
            return
        # Nothing is committed, and the backend is known to be out of the transaction: the rows can be locked again.
        if _is_cancelled():
            raise asyncio.CancelledError
        decided = decision(end.error)
        if decided is not None and is_a(decided, Retry):
            await self._postpone(members, decided, end.error)
            return
        members = await self._renewed(members, None if end.conflict else f"{GOES_ALONE}: {redacted_error(end.error)}")
        if end.conflict and len(members) > 2:  # nobody is guilty of it: again, at half the size
            half = len(members) // 2
            await self.run(members[:half], go_alone)
            await self.run(members[half:], go_alone)
            return
        await self.dispatcher.claims.mark([member.claim for member in members])
        for member in members:  # at once: its lease has begun, and the other half of its batch may take longer
            member.claim = replace(member.claim, token="")
            member.alone = True
            go_alone(member)

    async def _renewed(self, members: Sequence[Member], error: str | None) -> list[Member]:
        """Begin their leases anew. Returns those that are still ours. Those that cannot be renewed are released."""
        try:
            ours = await self.ledger.renew_if_held([member.claim for member in members], error)
        except LedgerUnavailable:
            await asyncio.gather(*(self.release(member) for member in members))
            return []
        now = asyncio.get_running_loop().time()
        for member in members:
            member.leased_at, member.begun = now, False
            if member.claim.event_id not in ours:
                member.end(outcome.duplicate(member.claim.event_id))
        return [member for member in members if member.claim.event_id in ours]

    async def _postpone(self, members: Sequence[Member], decided: Retry, error: Exception) -> None:
        """The handler wants the whole batch again later. Nobody is charged, because nobody has failed."""
        self.handler.metrics.attempts["retry"].inc(len(members))
        wait = requested_wait(decided)
        statuses = await self.ledger.postpone_if_held(
            [member.claim for member in members],
            failure_report(error, self.handler.function),
            failure(error, self.handler),
            give_up_seconds=self.handler.options.give_up_seconds,
            due_in_seconds=self.dispatcher.backoff_of(self.handler).after(1) if wait is None else wait,
        )
        moved = [member for member in members if statuses.get(member.claim.event_id) is Status.PENDING]
        await asyncio.gather(*(self.dispatcher.claims.forget(member.claim) for member in moved))
        for member in members:
            is_dead = statuses.get(member.claim.event_id) is Status.DEAD
            member.end(outcome.failed(member.claim.attempt, dead=is_dead))

    async def release(self, member: Member) -> None:
        """Release the event without a charge: it got no slot in time."""
        await self.dispatcher.release(member.claim)
        member.end(outcome.deferred(QUEUED, member.claim.attempt))

    async def _settle_interrupted(self, members: Sequence[Member], *, effects_committed: bool | None) -> None:
        """A shutdown: what has no outcome yet is released, as after an attempt at one event."""
        left = [member for member in members if not member.ended and not member.alone]
        for member in left:
            member.ended = True
        await asyncio.gather(
            *(self.dispatcher.settle_interrupted(each.claim, effects_committed=effects_committed) for each in left),
            return_exceptions=True,
        )

    def _note_failed(self, members: Sequence[Member], result: Failed) -> None:
        log.warning(
            "batch_failed",
            handler=self.handler.name,
            events=len(members),
            error=describe_error(result.error),
            frames=frames(result.error, self.handler.function),
        )
        first = members[0].claim
        self.dispatcher.note_running(first, self.handler, result, f"{first.event_id} and its batch")


def _is_cancelled() -> bool:
    """Whether a shutdown has cancelled this task, although the attempt took no notice while it was ending.

    Nothing may begin then: a shutdown does not cancel what begins after it has cancelled everything.
    """
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
