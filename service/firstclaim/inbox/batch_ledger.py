"""The ledger's part in a batch: rows are locked, marked, kept and put off together, by event id and attempt.

Guarantees: those of `firstclaim.inbox.ledger`, for many events at once. Each method names what it changed, because a
process that has taken over one event of a batch has not taken over the others.
"""

from collections.abc import Mapping, Sequence

from firstclaim.errors import HandlerRuleBroken
from firstclaim.inbox import batch_statements
from firstclaim.inbox.claim import Claim, HandlerTransaction
from firstclaim.inbox.ledger import Ledger
from firstclaim.inbox.statements import NOT_MARKED
from firstclaim.observability.failure import Failure, failure_columns
from firstclaim.postgres.handler_connections import HandlerConnection
from firstclaim.postgres.one_round_trip import NotCommitted
from firstclaim.postgres.statement import Statement
from firstclaim.status import Status

_SHORT_MARK = "rule broken: the handler has changed the ledger's rows of its own events"


class BatchLedger:
    """The statements for many claims; `hold` and `complete_if_held` on a handler's own connection."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    async def hold(
        self, connection: HandlerConnection, claims: Sequence[Claim], *, idle_seconds: float | None = None
    ) -> tuple[HandlerTransaction | None, set[str]]:
        """Begin the handler's transaction, and lock the claimed rows. Returns also the ids of those that are held.

        None in place of the transaction if none of them is: all were taken over. Raises as `HandlerConnection.begin`.
        """
        rows = await connection.begin(
            batch_statements.HOLD_ALL,
            **_pairs(claims),
            timeout_ms=self._ledger.timeout_ms(idle_seconds),
            synchronous_commit=connection.synchronous_commit,
        )
        return HandlerTransaction(*rows[0][:4]) if rows else None, {row["event_id"] for row in rows}

    async def complete_if_held(
        self,
        connection: HandlerConnection,
        claims: Sequence[Claim],
        transaction: HandlerTransaction,
        actions: Sequence[str],
    ) -> bool:
        """Write the completion marks, one of `actions` for each claim, and commit what `hold` began.

        False: none fits, and nothing is committed. Raises as `HandlerConnection.commit` does, and `HandlerRuleBroken`
        if only some fit: then nothing is committed either.
        """
        try:
            await connection.commit(
                batch_statements.COMPLETE_ALL,
                **_pairs(claims),
                actions=list(actions),
                number=len(claims),
                xid=transaction.xid,
                synchronous_commit=connection.synchronous_commit,
            )
        except NotCommitted as error:
            if isinstance(error.reason, NOT_MARKED):
                return False
            if isinstance(error.reason, batch_statements.SOME_NOT_MARKED):
                raise HandlerRuleBroken(_SHORT_MARK) from error
            raise
        return True

    async def committed(self, transaction: HandlerTransaction) -> bool:
        """Whether a COMMIT whose result is unknown has succeeded, as `Ledger.committed` says it.

        False also if the server cannot know it after a crash: then the guarded statements show which rows are ours.
        """
        self._ledger.connect_anew()
        return await self._ledger.committed(transaction)

    async def renew_if_held(self, claims: Sequence[Claim], error: str | None) -> set[str]:
        """Begin the leases anew. Returns the ids of the events that are ours still.

        `error`: why each of them goes alone from now on, in whichever process; None: they may enter a batch again.
        """
        return set(await self._settle(batch_statements.RENEW, claims, lease=self._ledger.lease_seconds, error=error))

    async def postpone_if_held(
        self,
        claims: Sequence[Claim],
        error: str,
        failure: Failure | None = None,
        *,
        due_in_seconds: float,
        give_up_seconds: float | None = None,
    ) -> dict[str, Status]:
        """Make the events due later, without a charge. Returns the statuses of those that were ours.

        `give_up_seconds`: that of the handler, if it has its own.
        """
        return await self._settle(
            batch_statements.POSTPONE,
            claims,
            due_in=due_in_seconds,
            give_up_later=self._ledger.later(give_up_seconds),
            error=error,
            **failure_columns(failure),
        )

    async def _settle(self, statement: Statement, claims: Sequence[Claim], **values: object) -> dict[str, Status]:
        """Change the rows that we hold. Those that were returned as abandoned meanwhile are taken back first."""
        changed = await self._change(statement, claims, **values)
        if missing := [claim for claim in claims if claim.event_id not in changed]:
            taken_back = [claim for claim in missing if await self._ledger.take_back(claim)]
            changed |= await self._change(statement, taken_back, **values) if taken_back else {}
        return changed

    async def _change(self, statement: Statement, claims: Sequence[Claim], **values: object) -> dict[str, Status]:
        rows = await self._ledger.run(statement, **_pairs(claims), **values)
        return {row["event_id"]: Status(row["status"]) for row in rows}


def _pairs(claims: Sequence[Claim]) -> Mapping[str, object]:
    return {"event_ids": [claim.event_id for claim in claims], "attempts": [claim.attempt for claim in claims]}
