"""The invariants, checked by one pure function over everything that a run has left behind.

    I1  every 2xx has its row, at that instant and at the end
    I2  committed effects per event: 1 if completed, else 0
    I3  at most one holder per event can commit: attempts rise, none is given or started twice, the last commits
    I4  when the faults stop, every row settles, or is dead with its budget spent
    I5  no handler starts before its own process has taken the lock and then the ledger's claim of that attempt
    I6  `processed: true` -> completed or ignored at that instant; `ignored` -> a row existed at that instant
    I7  a marker of the current epoch -> a row exists
    I8  nothing that a build with a handler acknowledged is `ignored`, neither at that instant nor at the end
    OUTSIDE  calls to other systems: at least one per completed event, and only by attempts that started

A process can be frozen between an action and the line that records it. So lines are compared as intervals: an order
is violated only if one action had ended before the other began.

A run that observed nothing proves nothing: `check` raises `Vacuous`. A completed event whose handler's start was not
recorded violates I5.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, permutations
from typing import Final, NamedTuple

from firstclaim.status import Status
from tests.acceptance.harness import Row
from tests.chaos.history import ABANDONED_MOST, Delivery, Unseen
from tests.chaos.trace import BATCH_END, BATCH_HOLD, BATCH_START, CLAIM, HOLD, LOCK, OUTSIDE, START, Line

_SETTLED: Final = (Status.COMPLETED, Status.IGNORED, Status.DEAD)
_KILLED_AT_ONCE: Final = ("Permanent: ", "rule broken: ", "its payload ")  # no retry can help


class Vacuous(AssertionError):
    """The run observed nothing that could be checked."""


@dataclass(frozen=True, slots=True)
class Violation:
    """An invariant that does not hold for an event."""

    invariant: str
    event_id: str
    what: str

    def __str__(self) -> str:
        return f"{self.invariant} {self.event_id}: {self.what}"


class Effect(NamedTuple):
    """One committed effect of an event, and the attempt that wrote it."""

    event_id: str
    attempt: int


@dataclass(frozen=True, slots=True)
class Evidence:
    """Everything that a run has left behind. `given_up`: ids of rows that settled after their give_up_at."""

    deliveries: Sequence[Delivery]
    rows: Mapping[str, Row]
    effects: Sequence[Effect]
    lines: Sequence[Line]
    markers: Mapping[str, str]
    epoch: str | None
    given_up: Collection[str] = ()
    waived: Collection[str] = ()  # events for which I2 does not hold: their handler broke its rule
    abandoned_most: int = ABANDONED_MOST


def check(evidence: Evidence) -> list[Violation]:
    """All violations, in the order of the invariants. Raises `Vacuous` when there is nothing to check."""
    if not any(delivery.promised and isinstance(delivery.seen, Row) for delivery in evidence.deliveries):
        raise Vacuous("no delivery was answered with a 2xx and found in the ledger: this run proves nothing")
    by_event = _Lines.by_event(evidence.lines)
    return [
        *_promises(evidence),
        *_effects(evidence),
        *_holders(evidence, by_event),
        *_settled(evidence),
        *_claims(evidence, by_event),
        *_answers(evidence),
        *_markers(evidence),
        *_builds(evidence),
        *_outside(evidence, by_event),
    ]


@dataclass(slots=True)
class _Lines:
    """The lines of the trace about one event."""

    all: list[Line] = field(default_factory=list)

    @classmethod
    def by_event(cls, lines: Iterable[Line]) -> Mapping[str, "_Lines"]:
        found: defaultdict[str, _Lines] = defaultdict(cls)
        for line in sorted(lines, key=lambda line: line.at):
            found[line.event_id].all.append(line)
        return found

    def of(self, *whats: str) -> list[Line]:
        return [line for line in self.all if line.what in whats]


# -- I1, I6: the answers --------------------------------------------------------------------------------


def _promises(evidence: Evidence) -> Iterator[Violation]:
    for delivery in evidence.deliveries:
        if not delivery.promised:
            continue
        if delivery.seen is Unseen.NO_ROW:
            yield Violation(
                "I1", delivery.event_id, f"answered {delivery.result}, and at that instant there was no row"
            )
        elif delivery.event_id not in evidence.rows:
            yield Violation("I1", delivery.event_id, f"answered {delivery.result}, and there is no row")


def _answers(evidence: Evidence) -> Iterator[Violation]:
    for delivery in evidence.deliveries:
        if delivery.result is None or delivery.seen is Unseen.NOT_READ:
            continue
        status, processed, action = delivery.result
        seen = delivery.seen.status if isinstance(delivery.seen, Row) else None
        if processed and (status != 200 or seen not in (Status.COMPLETED, Status.IGNORED)):
            yield Violation("I6", delivery.event_id, f"answered {delivery.result}, and its row was {seen}")
        elif action == "ignored" and seen is None:
            yield Violation("I6", delivery.event_id, f"answered {delivery.result} before there was a row")


# -- I2, I4: the ledger and the effects ---------------------------------------------------------------


def _effects(evidence: Evidence) -> Iterator[Violation]:
    counted = Counter(effect.event_id for effect in evidence.effects)
    for event_id in sorted((evidence.rows.keys() | counted.keys()) - set(evidence.waived)):
        row = evidence.rows.get(event_id)
        due = 1 if row is not None and row.status is Status.COMPLETED else 0
        if counted[event_id] != due:
            state = "there is no row" if row is None else f"it is {row.status}"
            yield Violation("I2", event_id, f"{counted[event_id]} committed effects, and {state}")


def _settled(evidence: Evidence) -> Iterator[Violation]:
    for event_id, row in evidence.rows.items():
        if row.status not in _SETTLED:
            yield Violation("I4", event_id, f"still {row.status}, due in {row.due_in_seconds:.1f} s")
        elif row.status is Status.DEAD and not _budget_spent(evidence, event_id, row):
            yield Violation("I4", event_id, f"dead before its time: {row}")


def _budget_spent(evidence: Evidence, event_id: str, row: Row) -> bool:
    return (
        row.abandoned >= evidence.abandoned_most
        or event_id in evidence.given_up
        or (row.last_error or "").startswith(_KILLED_AT_ONCE)
    )


# -- I3: one holder -----------------------------------------------------------------------------------


def _holders(evidence: Evidence, by_event: Mapping[str, _Lines]) -> Iterator[Violation]:
    for event_id, lines in by_event.items():
        for what in (CLAIM, HOLD, START):
            yield from _rising(event_id, what, lines)
        yield from _alone_after_its_batch(event_id, lines)
        yield from _fenced(event_id, lines, evidence.rows.get(event_id))
    yield from _never_falling(evidence)
    for effect in evidence.effects:
        row = evidence.rows.get(effect.event_id)
        if row is not None and row.status is Status.COMPLETED and row.attempt != effect.attempt:
            yield Violation("I3", effect.event_id, f"attempt {effect.attempt} committed, the row says {row.attempt}")


def _rising(event_id: str, what: str, lines: _Lines) -> Iterator[Violation]:
    found = lines.of(what)
    for attempt, times in Counter(line.attempt for line in found).items():
        if times > 1:
            yield Violation("I3", event_id, f"attempt {attempt}: {times} times {what}")
    if what in _IN_BATCHES:  # in any number of batches: each half of one that met a deadlock is one again
        found = lines.of(what, _IN_BATCHES[what])
    for lower, higher in permutations(found, 2):
        if lower.attempt < higher.attempt and higher.at < lower.began:
            yield Violation("I3", event_id, f"{what} of attempt {higher.attempt} before {lower.attempt}")


_IN_BATCHES = {HOLD: BATCH_HOLD, START: BATCH_START}


def _alone_after_its_batch(event_id: str, lines: _Lines) -> Iterator[Violation]:
    """An attempt that goes alone, because its batch has failed, begins after the handler has left the batch."""
    ended = Counter(line.attempt for line in lines.of(BATCH_END))
    begun = Counter(line.attempt for line in lines.of(BATCH_START))
    over = {line.attempt: line.at for line in lines.of(BATCH_END)}
    for line in lines.of(START):
        if begun[line.attempt] > ended[line.attempt] or over.get(line.attempt, 0) > line.at:
            yield Violation("I3", event_id, f"attempt {line.attempt} went alone while its batch ran")


def _fenced(event_id: str, lines: _Lines, row: Row | None) -> Iterator[Violation]:
    held = {(line.pid, line.attempt) for line in lines.of(HOLD, BATCH_HOLD)}
    for line in lines.of(START, BATCH_START):
        if (line.pid, line.attempt) not in held:
            yield Violation("I3", event_id, f"attempt {line.attempt} started without the lock on its row")
    last = max((line.attempt for line in lines.of(CLAIM)), default=0)
    if row is not None and row.attempt < last:
        yield Violation("I3", event_id, f"attempt {last} was given, and the row says {row.attempt}")


def _never_falling(evidence: Evidence) -> Iterator[Violation]:
    """The attempt, as the run read it from the ledger, never falls. Reads that overlap have no order."""
    looks: defaultdict[str, list[tuple[int, int, Row]]] = defaultdict(list)
    for delivery in evidence.deliveries:
        if isinstance(delivery.seen, Row):
            looks[delivery.event_id].append((delivery.answered_at, delivery.seen_at, delivery.seen))
    for event_id, seen in looks.items():
        for (_, over, one), (begun, _, other) in pairwise(sorted(seen, key=lambda look: look[1])):
            if over < begun and other.attempt < one.attempt:
                yield Violation("I3", event_id, f"its attempt fell from {one.attempt} to {other.attempt}")


# -- I5: both claims ----------------------------------------------------------------------------------


def _claims(evidence: Evidence, by_event: Mapping[str, _Lines]) -> Iterator[Violation]:
    for event_id, lines in by_event.items():
        locks: Counter[int] = Counter()
        claimed: set[tuple[int, int]] = set()
        for line in lines.all:
            if line.what == LOCK:
                locks[line.pid] += 1
            elif line.what == CLAIM:
                claimed.add((line.pid, line.attempt))
                locks[line.pid] -= 1  # a lock serves for one claim
                if locks[line.pid] < 0:
                    yield Violation("I5", event_id, f"process {line.pid} claimed attempt {line.attempt} without a lock")
            elif line.what in (START, BATCH_START) and (line.pid, line.attempt) not in claimed:
                yield Violation("I5", event_id, f"process {line.pid} started attempt {line.attempt}, not its claim")
    for event_id, row in evidence.rows.items():
        lines = by_event.get(event_id, _Lines())
        started = {line.attempt for line in lines.of(START, BATCH_START)}
        if row.status is Status.COMPLETED and row.attempt not in started:
            yield Violation("I5", event_id, f"completed by attempt {row.attempt}, whose start was not recorded")


# -- I7, I8, and the outside --------------------------------------------------------------------------


def _markers(evidence: Evidence) -> Iterator[Violation]:
    for event_id, value in evidence.markers.items():
        if value == f"recorded:{evidence.epoch}" and event_id not in evidence.rows:
            yield Violation("I7", event_id, "a marker of the current epoch, and there is no row")


def _builds(evidence: Evidence) -> Iterator[Violation]:
    for delivery in evidence.deliveries:
        if not (delivery.promised and delivery.wanted):
            continue
        last = evidence.rows.get(delivery.event_id)
        for seen, when in ((delivery.seen, "at that instant"), (last, "at the end")):
            if isinstance(seen, Row) and seen.status is Status.IGNORED:
                said = f"{delivery.service} has a handler for it and answered {delivery.result}"
                yield Violation("I8", delivery.event_id, f"{said}, and {when} it was ignored")


def _outside(evidence: Evidence, by_event: Mapping[str, _Lines]) -> Iterator[Violation]:
    for event_id, lines in by_event.items():
        started = {(line.pid, line.attempt) for line in lines.of(START, BATCH_START)}
        for line in lines.of(OUTSIDE):
            if (line.pid, line.attempt) not in started:
                yield Violation("OUTSIDE", event_id, f"called by attempt {line.attempt}, which did not start")
            if line.key != event_id:
                yield Violation("OUTSIDE", event_id, f"called under another key: {line.key!r}")
    for event_id, row in evidence.rows.items():
        called = {line.attempt for line in by_event[event_id].of(OUTSIDE)} if event_id in by_event else set()
        if row.status is Status.COMPLETED and row.attempt not in called and event_id not in evidence.waived:
            yield Violation("OUTSIDE", event_id, f"completed by attempt {row.attempt}, which did not call outside")
