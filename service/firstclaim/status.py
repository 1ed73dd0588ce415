"""The states of an event. docs/explanation/states.md draws the transitions between them."""

from enum import StrEnum


class Status(StrEnum):
    """The status column of the ledger."""

    PENDING = "pending"  # recorded, and not being dispatched
    PROCESSING = "processing"  # claimed by a process, which may have vanished
    COMPLETED = "completed"  # the handler's effects are committed
    IGNORED = "ignored"  # no handler for the type; a later deploy can replay it
    FAILED = "failed"  # retried at due_at
    DEAD = "dead"  # needs an operator


TAKEABLE = (Status.PENDING, Status.FAILED)
UNFINISHED = (Status.PENDING, Status.PROCESSING, Status.FAILED)
