"""One attempt at an event: one connection, one transaction, one call of its handler.

Guarantees: those of `firstclaim.inbox.attempt`. An event of a batch handler that goes alone gets a list of one.
"""

from dataclasses import dataclass
from functools import partial

from firstclaim.event import Event
from firstclaim.follow_up import Outbox
from firstclaim.inbox.attempt import Attempt, AttemptResult, Mark
from firstclaim.inbox.calls import call_batch_handler, call_handler, call_task
from firstclaim.inbox.claim import Claim, HandlerTransaction
from firstclaim.inbox.handler_call import HandlerCall
from firstclaim.inbox.task_event import TaskEvent
from firstclaim.postgres.handler_connections import HandlerConnection


@dataclass(frozen=True, slots=True)
class SingleAttempt(Attempt):
    """One attempt at `claim`, whose event is `event`. `key`: the number of the advisory lock that its key has."""

    claim: Claim
    event: Event
    key: int | None = None

    async def run(self) -> AttemptResult:
        """Lock the row, call the handler, mark the row, commit. Never raises."""
        return await self._run(self._hold, self._work)

    async def _hold(self, connection: HandlerConnection) -> HandlerTransaction | None:
        return await self.ledger.hold(connection, self.claim, idle_seconds=self.idle_seconds, key=self.key)

    async def _work(
        self, call: HandlerCall, connection: HandlerConnection, transaction: HandlerTransaction
    ) -> tuple[str, Mark, Outbox]:
        outbox = Outbox(self.tasks, {self.event.id: self.claim.event_id})
        action = await self._call(call, connection, outbox)
        return action, partial(self.ledger.complete_if_held, connection, self.claim, transaction, action), outbox

    async def _call(self, call: HandlerCall, connection: HandlerConnection, outbox: Outbox) -> str:
        event, attempt, seconds = self.event, self.claim.attempt, self.deadline_seconds
        if self.handler.batch:
            return (await call_batch_handler(call, [event], {event.id: attempt}, connection, seconds, outbox))[0]
        if isinstance(event, TaskEvent):
            return await call_task(call, event, attempt, connection, seconds, outbox)
        return await call_handler(call, event, attempt, self.claim.body or b"", connection, seconds, outbox)
