"""What the ledger says of events that wait for recovery."""

from dataclasses import dataclass
from datetime import datetime

from firstclaim.status import Status

Queue = tuple[str, bool]  # the events of a type and a mode (livemode)


@dataclass(frozen=True, slots=True)
class DueEvent:
    """An event that waits for recovery."""

    event_id: str
    queue: Queue
    due_at: datetime


@dataclass(frozen=True, slots=True)
class ReturnedEvent:
    """An abandoned event that is due again, or dead: the abandoned attempt, its process, and how often by now."""

    event_id: str
    type: str
    attempt: int
    process: str | None
    status: Status
    times: int
