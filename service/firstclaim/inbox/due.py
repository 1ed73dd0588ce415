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


@dataclass(frozen=True, slots=True)
class Survey:
    """What recovery needs to know of a ledger: one statement, which is all of a round that finds nothing to do."""

    epoch: str | None
    overdue: bool  # there are claims past their lease
    waiting: list[Queue]  # those that have pending and failed events
    abandoned: list[Queue]  # the same of those that were abandoned before
    paused: list[str]  # the patterns of the types that operators have paused
