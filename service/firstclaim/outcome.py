"""The outcome of a delivery, as a closed set of values; `firstclaim.web.webhook` has the one table to HTTP."""

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """Every way a delivery can end. Closed: metrics and logs use these as labels."""

    PROCESSED = "processed"
    UNHANDLED = "unhandled"
    DUPLICATE = "duplicate"
    DEFERRED = "deferred"
    FAILED = "failed"
    DEAD = "dead"
    UNAVAILABLE = "unavailable"


@dataclass(frozen=True, slots=True)
class Outcome:
    """`action` and `reason` are the answer's; `attempt` is None when this delivery dispatched nothing."""

    kind: Kind
    action: str
    reason: str | None = None
    attempt: int | None = None


def processed(action: str, attempt: int) -> Outcome:
    """Both claims won, the handler's transaction committed."""
    return Outcome(Kind.PROCESSED, action, None, attempt)


def unhandled(reason: str, attempt: int | None) -> Outcome:
    """The row says `ignored`: nothing here wants this event."""
    return Outcome(Kind.UNHANDLED, "ignored", reason, attempt)


def duplicate(event_id: str) -> Outcome:
    """A row exists and is owned; the original's words, which dashboards already search for."""
    return Outcome(Kind.DUPLICATE, "ignored", f"Event {event_id} handled by parallel worker (idempotency lock)")


def already(event_id: str, state: str) -> Outcome:
    """The ledger was asked and the row is settled: `state` finishes the sentence."""
    return Outcome(Kind.DUPLICATE, "ignored", f"Event {event_id} {state}")


def deferred(reason: str, attempt: int | None = None) -> Outcome:
    """The row is committed and will be worked on, but not within this answer."""
    return Outcome(Kind.DEFERRED, "deferred", reason, attempt)


def failed(attempt: int) -> Outcome:
    """The attempt failed and its row says so; no details to the caller."""
    return Outcome(Kind.FAILED, "failed", "The handler failed; the event is tried again", attempt)


def dead(event_id: str, attempt: int) -> Outcome:
    """No retry will help; an operator has to look."""
    return Outcome(Kind.DEAD, "dead", f"Event {event_id} is dead: replay it", attempt)


def unavailable(reason: str) -> Outcome:
    """Nothing is promised; Stripe should send it again."""
    return Outcome(Kind.UNAVAILABLE, "unavailable", reason)
