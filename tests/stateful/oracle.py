"""A reference model of each event, and the invariants that must hold after every step.

Guarantees: no I/O. `broken` compares the promises and the actions of handlers with one look at both stores, and names
each invariant of the fault matrix that does not hold. `expected` returns the outcome of a delivery without a fault.
Neither depends on how the service works.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum

from firstclaim.event import Delivery
from firstclaim.outcome import Kind, Outcome
from firstclaim.status import TAKEABLE, UNFINISHED, Status

PROMISES = frozenset([Kind.PROCESSED, Kind.UNHANDLED, Kind.DUPLICATE, Kind.DEFERRED, Kind.DEAD])  # answered with 2xx
SETTLED = frozenset([Status.COMPLETED, Status.IGNORED, Status.DEAD])


class Plan(Enum):
    """What a handler does after its effect."""

    WORK = "work"
    HOLD = "hold"  # until the test ends it
    FAIL = "fail"
    RETRY = "retry"
    PERMANENT = "permanent"
    SWALLOW = "swallow"  # an SQL error of its own
    COMMIT = "commit"  # by itself, against the rule


# What a dispatched delivery comes to, and what its row says then.
ENDINGS: Mapping[Plan, tuple[Kind, Status]] = {
    Plan.WORK: (Kind.PROCESSED, Status.COMPLETED),
    Plan.FAIL: (Kind.FAILED, Status.FAILED),
    Plan.RETRY: (Kind.FAILED, Status.FAILED),
    Plan.PERMANENT: (Kind.DEAD, Status.DEAD),
    Plan.SWALLOW: (Kind.FAILED, Status.FAILED),
    Plan.COMMIT: (Kind.FAILED, Status.DEAD),
}


@dataclass(slots=True)
class Story:
    """The model's view of one event."""

    delivery: Delivery
    wanted_by: frozenset[int]  # the processes that have a handler for its type: each may be another build
    promised: Kind | None = None  # by the first answer with a 2xx
    acknowledged: bool = False  # with a 2xx, by a process that has a handler for it
    completed: bool = False
    attempt: int = 0  # the highest seen so far
    replays: int = 0
    started: set[int] = field(default_factory=set)  # attempts whose handler was called with this event alone
    batched: set[int] = field(default_factory=set)  # attempts whose handler was called with others beside it
    rogue: set[int] = field(default_factory=set)  # attempts whose handler committed by itself: without I2
    permanent: set[int] = field(default_factory=set)  # attempts whose handler raised Permanent


@dataclass(frozen=True, slots=True)
class Row:
    """The ledger's row. `effects`: the attempts whose effects are committed."""

    status: Status
    attempt: int
    failures: int
    abandoned: int
    given_up: bool  # settled after give_up_at
    effects: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Key:
    """The event's key in Redis."""

    value: bytes
    ttl_ms: int

    @property
    def claimed(self) -> bool:
        return self.value.startswith(b"claimed:")

    def marks(self, epoch: str | None) -> bool:
        """Whether it is the marker of this epoch."""
        return epoch is not None and self.value == f"recorded:{epoch}".encode()


@dataclass(frozen=True, slots=True)
class Seen:
    """Both stores at a moment when nothing happens. `stray`: effects of events without a row."""

    rows: Mapping[str, Row]
    keys: Mapping[str, Key]
    epoch: str | None
    stray: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Limits:
    """The settings of the service that have a visible effect."""

    lock_ttl_seconds: float
    marker_ttl_seconds: float
    abandoned_most: int


# -- invariants --------------------------------------------------------------------------------------


def broken(stories: Mapping[str, Story], seen: Seen, limits: Limits) -> list[str]:
    """Every invariant that does not hold, in words. The stories are updated with what was seen."""
    violations = [f"I2: an effect of {event_id}, which has no row" for event_id in seen.stray]
    for event_id, story in stories.items():
        row, key = seen.rows.get(event_id), seen.keys.get(event_id)
        found = [*(_of_row(story, row, limits) if row else _of_no_row(story)), *_of_key(row, key, seen, limits)]
        violations += [f"{each}: {event_id} {story.promised=} {row} {key}" for each in found]
        if row is not None:
            story.attempt = row.attempt
            story.completed = row.status is Status.COMPLETED
    return violations


def _of_no_row(story: Story) -> Iterator[str]:
    if story.promised is not None:
        yield "I1: promised, and there is no row"
    if story.started or story.batched:
        yield "I5: a handler was started, and there is no row"


def _of_row(story: Story, row: Row, limits: Limits) -> list[str]:
    completed = row.status is Status.COMPLETED
    ran = story.started | story.batched
    orderly = [attempt for attempt in row.effects if attempt not in story.rogue]
    wrong = {
        "I2: not one effect, of the attempt that completed it, or none": orderly != [row.attempt] * completed,
        "I2: an attempt's effect twice": len(set(row.effects)) != len(row.effects),
        "I2: completed before, and not any more": story.completed and not completed,
        f"I3: attempt fell from {story.attempt}": row.attempt < story.attempt,
        "I3: an attempt was started that the ledger never gave": row.attempt < max(ran, default=0),
        "I8: ignored, although a process with a handler for it has acknowledged it": row.status is Status.IGNORED
        and story.acknowledged,
        "I4: dead, and its budget is not spent": row.status is Status.DEAD and not _may_be_dead(story, row, limits),
        "I5: completed, and its handler was not called": completed and row.attempt not in ran,
        "more failures and abandonments than attempts": row.failures + row.abandoned > row.attempt,
    }
    return [words for words, so in wrong.items() if so]


def _may_be_dead(story: Story, row: Row, limits: Limits) -> bool:
    given_up = row.given_up or row.abandoned >= limits.abandoned_most
    return given_up or row.attempt in story.rogue or row.attempt in story.permanent


def _of_key(row: Row | None, key: Key | None, seen: Seen, limits: Limits) -> Iterator[str]:
    if key is None:
        return
    if key.marks(seen.epoch) and row is None:
        yield "I7: a marker of the current epoch, and there is no row"
    life = limits.lock_ttl_seconds if key.claimed else limits.marker_ttl_seconds
    if not 0 <= key.ttl_ms <= life * 1000:
        yield "a key that lives longer than its kind may"


def dishonest(
    story: Story, outcome: Outcome, row: Row | None, *, wanted: bool = True, replayed: bool = False
) -> str | None:
    """I1 and I6: what is wrong with an answer, given the row right after it. The story is updated with the promise.

    `wanted`: the process that answered has a handler for the event. `replayed`: an operator replayed the event
    between the delivery and its answer, which may then be out of date.
    """
    if outcome.kind in PROMISES and story.promised is None:
        story.promised = outcome.kind
    story.acknowledged |= wanted and outcome.kind in PROMISES
    if outcome.kind is Kind.UNAVAILABLE:
        return None
    if row is None:
        return "I1: answered, and there is no row"
    says = {
        Kind.PROCESSED: row.status is Status.COMPLETED and row.attempt == outcome.attempt,
        Kind.UNHANDLED: row.status is Status.IGNORED or row.attempt > 1,  # another build took it over right away
        Kind.DEAD: row.status is Status.DEAD,
    }
    superseded = replayed and outcome.kind is not Kind.PROCESSED
    return (
        None
        if superseded or says.get(outcome.kind, True)
        else f"I6: answered {outcome.kind}, and the row says otherwise"
    )


# -- the outcome of a delivery ------------------------------------------------------------------------


def expected(
    wanted: bool, row: Row | None, key: Key | None, *, epoch: str | None, plan: Plan, capacity: bool
) -> tuple[Kind | None, Status | None]:
    """The answer and the row's status, if both stores are reachable and nothing else works on this event.

    `wanted`: the process has a handler for the event. `epoch` is the one that the process knows. `capacity`: a handler
    could start at once. No answer: the handler is held. No status: the row does not change.
    """
    if key is not None and key.marks(epoch):
        return Kind.DUPLICATE, None
    locked = key is not None and key.claimed
    if not wanted:
        if row is None:
            return (Kind.UNAVAILABLE, None) if locked else (Kind.UNHANDLED, Status.IGNORED)
        return Kind.DEFERRED if row.status in UNFINISHED else Kind.DUPLICATE, None
    if locked:
        if row is None:
            return Kind.DUPLICATE, Status.PENDING
        return Kind.UNAVAILABLE if row.status is Status.IGNORED else Kind.DUPLICATE, None
    if row is not None and row.status not in (*TAKEABLE, Status.IGNORED):
        return Kind.DUPLICATE, None
    if not capacity:
        return Kind.DEFERRED, Status.PENDING
    if plan is Plan.HOLD:
        return None, Status.PROCESSING
    return ENDINGS[plan]
