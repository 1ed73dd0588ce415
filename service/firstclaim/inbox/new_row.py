"""Inserting events into the ledger: a row and its body for each, many in one statement."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from firstclaim.event import Delivery
from firstclaim.inbox import statements
from firstclaim.inbox.kept_headers import kept_headers
from firstclaim.observability import tracing
from firstclaim.postgres.connection import PinnedConnection
from firstclaim.status import Status


@dataclass(frozen=True, slots=True)
class NewRow:
    """A delivery to be inserted, and the state that its row gets.

    `traceparent`: the span in which it is made, for recovery's spans to link to.
    """

    delivery: Delivery
    status: Status
    attempt: int
    due_in_seconds: float
    traceparent: str | None = field(default_factory=tracing.traceparent)

    @property
    def event_id(self) -> str:
        """The id of the delivered event."""
        return self.delivery.event.id


async def insert(
    connection: PinnedConnection,
    rows: Iterable[NewRow],
    *,
    patience_seconds: float,
    give_up_seconds: float,
    process: str | None = None,
) -> set[str]:
    """Insert rows and their bodies in one statement; returns the ids that were new.

    `patience_seconds`: how long it waits for a row of the same id that is not committed yet. `process`: the process
    that claims the rows that are claimed.
    """
    events = [(row.delivery.event, row) for row in rows]
    inserted = await statements.INSERT.fetch(
        connection,
        patience_ms=str(round(patience_seconds * 1000)),
        event_ids=[event.id for event, _ in events],
        types=[event.type for event, _ in events],
        accounts=[event.account for event, _ in events],
        livemodes=[event.livemode for event, _ in events],
        api_versions=[event.api_version for event, _ in events],
        object_ids=[event.object_id for event, _ in events],
        created_ats=[event.created for event, _ in events],
        statuses=[row.status for _, row in events],
        attempts=[row.attempt for _, row in events],
        due_ins=[row.due_in_seconds for _, row in events],
        bodies=[row.delivery.body for _, row in events],
        traceparents=[row.traceparent for _, row in events],
        headers=[kept_headers(row.delivery.headers) for _, row in events],
        endpoints=[event.endpoint for event, _ in events],
        process=process,
        give_up_in=give_up_seconds,
    )
    return {row["event_id"] for row in inserted}
