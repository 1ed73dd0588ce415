"""The states of an event: the one enum of them. The README draws the edges between them."""

from enum import StrEnum


class Status(StrEnum):
    """The status column of the ledger."""

    PENDING = "pending"  # recorded, nobody is dispatching
    PROCESSING = "processing"  # claimed: somebody holds it, or vanished
    COMPLETED = "completed"  # the handler's effects are committed
    IGNORED = "ignored"  # no handler for the type; a later deploy can replay it
    FAILED = "failed"  # tried again at due_at
    DEAD = "dead"  # needs an operator


TAKEABLE = (Status.PENDING, Status.FAILED)
UNFINISHED = (Status.PENDING, Status.PROCESSING, Status.FAILED)
