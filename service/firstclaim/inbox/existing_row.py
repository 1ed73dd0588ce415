"""Reads events from the ledger for an answer that depends on them, so the read waits for replication."""

from collections.abc import Sequence
from dataclasses import dataclass

from firstclaim import outcome
from firstclaim.errors import LedgerUnavailable
from firstclaim.inbox import statements
from firstclaim.outcome import Outcome
from firstclaim.postgres.connection import PinnedConnection
from firstclaim.postgres.one_round_trip import NOT_REPLICATED
from firstclaim.status import Status

_SETTLED = {
    Status.COMPLETED: "already completed",
    Status.IGNORED: "already recorded as ignored",
    Status.DEAD: "is dead: replay it",
}


@dataclass(frozen=True, slots=True)
class ExistingRow:
    """A row that existed before the delivery."""

    status: Status
    attempt: int
    epoch: str | None

    def answer(self, event_id: str) -> Outcome:
        """The outcome of a duplicate of this event: it names the state if the row is settled."""
        state = _SETTLED.get(self.status)
        return outcome.duplicate(event_id) if state is None else outcome.settled(event_id, state)


async def find(connection: PinnedConnection, event_ids: Sequence[str]) -> dict[str, ExistingRow]:
    """The rows that the ledger has of these events, by id, once they are as well replicated as a new commit.

    Raises `LedgerUnavailable` if that is not known.
    """
    warnings = connection.warnings
    rows = await statements.FIND.fetch(connection, event_ids=event_ids)
    if connection.warnings != warnings:
        raise LedgerUnavailable(NOT_REPLICATED)
    return {row["event_id"]: ExistingRow(Status(row["status"]), row["attempt"], connection.epoch) for row in rows}
