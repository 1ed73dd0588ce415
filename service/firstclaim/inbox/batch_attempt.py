"""One attempt at a batch: one connection, one transaction, one call of a batch handler for all of its events.

Guarantees: those of `firstclaim.inbox.attempt`, for all events together. The transaction locks the rows first, in order
of id, and marks exactly these rows last: the effects of all and the completion marks of all commit together or not at
all. An event whose row does not come back from the lock leaves the batch before the handler is called.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import asyncpg

from firstclaim.errors import LedgerUnavailable
from firstclaim.event import Event
from firstclaim.inbox.attempt import (
    Attempt,
    AttemptResult,
    Interrupted,
    NotStarted,
    TakenOver,
    call_batch_handler,
)
from firstclaim.inbox.batch_ledger import BatchLedger
from firstclaim.inbox.handler_call import HandlerCall
from firstclaim.inbox.ledger import Claim, HandlerTransaction
from firstclaim.postgres.connection import UNAVAILABLE, describe
from firstclaim.postgres.handler_connections import HandlerConnection

# Another transaction was in the way, and neither is at fault: a deadlock, or a serialization failure.
_CONFLICTS = (asyncpg.DeadlockDetectedError.sqlstate, asyncpg.SerializationError.sqlstate)


@dataclass(frozen=True, slots=True)
class BatchResult:
    """The end of the attempt, for the events of `held`. The others were taken over.

    `actions`: one for each of `held`, if they were committed or may be. `conflict`: the attempt failed of a deadlock
    or a serialization failure.
    """

    end: AttemptResult
    held: Sequence[Claim] = ()
    actions: Sequence[str] = ()
    conflict: bool = False


@dataclass(frozen=True, slots=True)
class BatchAttempt(Attempt):
    """One attempt at `claims`, whose events are `events`, in the same order."""

    batch_ledger: BatchLedger
    claims: Sequence[Claim]
    events: Sequence[Event]

    async def run_batch(self) -> BatchResult:
        """Lock the rows, call the handler, mark the rows, commit. Never raises."""
        try:
            return await self._run_batch()
        finally:
            self._timer.close()

    async def _run_batch(self) -> BatchResult:
        try:
            connection = await self.connections.acquire()
            transaction, held_ids = await self._hold_all(connection)
        except (*UNAVAILABLE, LedgerUnavailable) as error:
            return BatchResult(NotStarted(describe(error)), self.claims)
        except asyncio.CancelledError:
            return BatchResult(Interrupted(effects_committed=False, running=None), self.claims)
        if transaction is None:
            await self._give_back(connection, None)
            return BatchResult(TakenOver())
        held = [claim for claim in self.claims if claim.event_id in held_ids]
        events = [event for claim, event in zip(self.claims, self.events, strict=True) if claim.event_id in held_ids]
        call = HandlerCall(self.handler, self.deadline_seconds, self._timer)
        try:
            self.watch.add(transaction, call)
            try:
                attempts = {claim.event_id: claim.attempt for claim in held}
                actions = await call_batch_handler(call, events, attempts, connection, self.deadline_seconds)
            finally:
                self.watch.remove(transaction)
            mark = partial(self.batch_ledger.complete_if_held, connection, held, transaction, actions)
            end = await self._complete(connection, transaction, "", mark)
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001  (whatever a handler raises is its failure)
            conflict = _is_conflict(error) or _is_conflict(connection.sql_error)
            return BatchResult(await self._not_committed(error, call, connection, transaction), held, conflict=conflict)
        await self._give_back(connection, transaction)
        return BatchResult(end, held, actions)

    async def _hold_all(self, connection: HandlerConnection) -> tuple[HandlerTransaction | None, set[str]]:
        try:
            with self._timer.limit(self.postgres_timeout_seconds, connection.terminate):
                return await self.batch_ledger.hold(connection, self.claims)
        except BaseException as error:
            await connection.discard(error)
            raise


def _is_conflict(error: BaseException | None) -> bool:
    return isinstance(error, asyncpg.PostgresError) and error.sqlstate in _CONFLICTS
