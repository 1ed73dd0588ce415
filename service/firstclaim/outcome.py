"""The outcome of a delivery, as a closed set of values. `firstclaim.web.webhook` maps them to HTTP."""

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """Every way that a delivery can end. The set is closed, because metrics and logs use it as labels."""

    PROCESSED = "processed"
    UNHANDLED = "unhandled"
    DUPLICATE = "duplicate"
    DEFERRED = "deferred"
    FAILED = "failed"
    DEAD = "dead"
    UNAVAILABLE = "unavailable"


@dataclass(frozen=True, slots=True)
class Outcome:
    """`action` and `reason` are fields of the answer. `attempt` is None if this delivery dispatched no attempt."""

    kind: Kind
    action: str
    reason: str | None = None
    attempt: int | None = None


def processed(action: str, attempt: int) -> Outcome:
    """Both claims succeeded, and the handler's transaction committed."""
    return Outcome(Kind.PROCESSED, action, None, attempt)


def unhandled(reason: str, attempt: int | None) -> Outcome:
    """The row is `ignored`: no handler takes this event."""
    return Outcome(Kind.UNHANDLED, "ignored", reason, attempt)


def duplicate(event_id: str) -> Outcome:
    """A row exists; whether it is settled was not read. Worded as in the original design: dashboards search for it."""
    return Outcome(Kind.DUPLICATE, "ignored", f"Event {event_id} handled by parallel worker (idempotency lock)")


def settled(event_id: str, state: str) -> Outcome:
    """The ledger has a settled row. `state` completes the sentence, for example "already completed"."""
    return Outcome(Kind.DUPLICATE, "ignored", f"Event {event_id} {state}")


def deferred(reason: str, attempt: int | None = None) -> Outcome:
    """The row is committed, and the event will be dispatched after this answer."""
    return Outcome(Kind.DEFERRED, "deferred", reason, attempt)


def failed(attempt: int, *, dead: bool = False, of: str = "handler") -> Outcome:
    """The attempt failed, and its row is updated: retried later, or `dead`. The caller gets no details.

    `of`: what has failed.
    """
    state = "is dead: replay it" if dead else "will be retried"
    return Outcome(Kind.FAILED, "failed", f"The {of} failed; the event {state}", attempt)


def dead(event_id: str, attempt: int) -> Outcome:
    """No retry will help. The event waits for an operator."""
    return Outcome(Kind.DEAD, "dead", f"Event {event_id} is dead: replay it", attempt)


def unavailable(reason: str) -> Outcome:
    """Nothing is guaranteed, so Stripe should send the event again."""
    return Outcome(Kind.UNAVAILABLE, "unavailable", reason)
