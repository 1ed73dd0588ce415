"""One attempt at a batch: one connection, one transaction, one call of a batch handler for all of its events.

Guarantees: those of `firstclaim.inbox.attempt`, for all events together. The transaction locks the rows first, in order
of id, and marks exactly these rows last: the effects of all and the completion marks of all commit together or not at
all. An event whose row does not come back from the lock leaves the batch before the handler is called.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from firstclaim.event import Event
from firstclaim.follow_up import Outbox
from firstclaim.inbox.attempt import Attempt, AttemptResult, Committed, CommitUnknown, Mark, TakenOver
from firstclaim.inbox.batch_ledger import BatchLedger
from firstclaim.inbox.calls import call_batch_handler
from firstclaim.inbox.claim import Claim, HandlerTransaction
from firstclaim.inbox.handler_call import HandlerCall
from firstclaim.postgres.handler_connections import HandlerConnection


@dataclass(frozen=True, slots=True)
class BatchResult:
    """The end of the attempt, for the events of `held`. The others were taken over.

    `actions`: one for each of `held`, if they were committed or may be.
    """

    end: AttemptResult
    held: Sequence[Claim] = ()
    actions: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class BatchAttempt(Attempt):
    """One attempt at `claims`, whose events are `events`, in the same order."""

    batch_ledger: BatchLedger
    claims: Sequence[Claim]
    events: Sequence[Event]

    async def run(self) -> BatchResult:
        """Lock the rows, call the handler, mark the rows, commit. Never raises."""
        held: Sequence[Claim] = self.claims  # as long as it is not known which of them are
        actions: list[str] = []

        async def hold(connection: HandlerConnection) -> HandlerTransaction | None:
            nonlocal held
            transaction, held_ids = await self.batch_ledger.hold(
                connection, self.claims, idle_seconds=self.idle_seconds
            )
            held = [claim for claim in self.claims if claim.event_id in held_ids]
            return transaction

        async def work(
            call: HandlerCall, connection: HandlerConnection, transaction: HandlerTransaction
        ) -> tuple[str, Mark, Outbox]:
            attempts = {claim.event_id: claim.attempt for claim in held}
            # The row of one of several handlers has another id than its event.
            pairs = [pair for pair in zip(self.claims, self.events, strict=True) if pair[0].event_id in attempts]
            outbox = Outbox(self.tasks, {event.id: claim.event_id for claim, event in pairs})
            actions.extend(
                await call_batch_handler(
                    call,
                    [event for _, event in pairs],
                    {event.id: claim.attempt for claim, event in pairs},
                    connection,
                    self.deadline_seconds,
                    outbox,
                )
            )
            return "", partial(self.batch_ledger.complete_if_held, connection, held, transaction, actions), outbox

        end = await self._run(hold, work)
        if isinstance(end, TakenOver):
            return BatchResult(end)
        return BatchResult(end, held, actions if isinstance(end, Committed | CommitUnknown) else ())
