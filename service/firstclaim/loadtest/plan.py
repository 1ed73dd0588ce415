"""What a load test sends and how it counts what comes back: no socket, no clock and no locust in here.

Guarantees: the seed alone decides the sequence of types, copies and repetitions, whatever the answers and
their timing; a repetition is the same bytes as the first delivery; the ids of two runs never meet, so a run
with the seed of another is no duplicate of it; every event that was sent has an entry in the journal, also if
nobody answered.
"""

import heapq
import math
import random
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntFlag, StrEnum
from urllib.parse import urlsplit

from firstclaim.sending.client import check_url, outcome_of
from firstclaim.sending.events import marked_event, shipped_types

# Connections at once, of all users together: under the usual limit of 1024 open files.
IN_FLIGHT_MOST = 900

# A repetition comes 1 to 1000 turns after the first delivery, as often near as far: while that is still being
# handled, just after it, and long after it.
_LATER_MOST_TURNS = 1000

_NUMBER_DIGITS = 8
_MARK = b"\xff" * _NUMBER_DIGITS  # in no UTF-8, so in no event


@dataclass(frozen=True, slots=True)
class Plan:
    """A load test as it was asked for; `deliveries_per_second` 0 is as fast as the users can."""

    url: str
    secret: str = field(repr=False)
    types: tuple[str, ...]
    users: int
    deliveries_per_second: float
    duration_seconds: float
    duplicates_percent: float
    concurrent_percent: float
    copies: int
    seed: int
    html: str | None = None
    run: str = field(default_factory=lambda: secrets.token_hex(4))

    @property
    def id_head(self) -> str:
        """What the ids of all events of this run, and of no other, begin with; their number follows."""
        return f"evt_load{self.run}"

    def event_id(self, number: int) -> str:
        """The id of the run's event `number`."""
        return f"{self.id_head}{number:0{_NUMBER_DIGITS}}"

    def faults(self) -> Iterator[str]:
        """What cannot be done about it, a sentence each."""
        try:
            check_url(self.url)
            if "@" in urlsplit(self.url).netloc:
                yield "--url: a user name and a password would stand in the report"
        except ValueError as error:
            yield str(error)
        if not all(map(math.isfinite, (self.deliveries_per_second, self.duration_seconds))):
            yield "--rate and --duration must be finite"
        if unknown := sorted(set(self.types) - set(shipped_types())):
            yield f"--type: no template for {', '.join(unknown)}; there are: {', '.join(shipped_types())}"
        most = self.users * (self.copies if self.concurrent_percent else 1)
        if most > IN_FLIGHT_MOST:
            yield f"--users times --copies is {most} connections at once; at most {IN_FLIGHT_MOST} are possible"


# -- what is sent -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Turn:
    """What a user sends next: event `number` in `copies`, all in flight at the same instant."""

    number: int
    event_type: str
    copies: int = 1


class Mix:
    """The sequence of turns that a plan's percentages and seed stand for."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._random = random.Random(plan.seed)  # noqa: S311
        self._turns = self._events = 0
        self._later: list[tuple[int, int, str]] = []  # (turn, number, type), a heap

    def next(self) -> Turn:
        """The next turn: a repetition that is due, else a new event."""
        self._turns += 1
        if self._later and self._later[0][0] <= self._turns:
            _, number, event_type = heapq.heappop(self._later)
            return Turn(number, event_type)
        number, self._events = self._events, self._events + 1
        event_type = self._random.choice(self._plan.types)
        at_once, again = (self._random.uniform(0, 100) for _ in range(2))
        turns_later = int(_LATER_MOST_TURNS ** self._random.random())
        if again < self._plan.duplicates_percent:
            heapq.heappush(self._later, (self._turns + turns_later, number, event_type))
        return Turn(number, event_type, self._plan.copies if at_once < self._plan.concurrent_percent else 1)


class Bodies:
    """The bytes of each event, always the same for the same number and type."""

    def __init__(self, plan: Plan) -> None:
        self._marked = {each: marked_event(each, plan.id_head, _MARK) for each in plan.types}

    def of(self, turn: Turn) -> bytes:
        """The event's body."""
        return self._marked[turn.event_type].replace(_MARK, b"%0*d" % (_NUMBER_DIGITS, turn.number))


class Pace:
    """When each turn is due, in seconds from the start: at the rate that was asked for, whatever the answers."""

    def __init__(self, deliveries_per_second: float) -> None:
        self._seconds_each = 1 / deliveries_per_second if deliveries_per_second else 0.0
        self._next = 0.0

    def due(self, copies: int, now: float) -> float:
        """The instant for the next turn, which takes the time of all its copies; past, if the users are behind."""
        if not self._seconds_each:
            return now
        due, self._next = self._next, self._next + copies * self._seconds_each
        return due


# -- what comes back ----------------------------------------------------------------------------------


class AnswerKind(StrEnum):
    """What a delivery was told, by the README's table of answers."""

    PROCESSED = "processed"
    IGNORED = "ignored"
    UNHANDLED = "unhandled"  # no handler for the type
    DEFERRED = "deferred"
    DEAD = "dead"
    FAILED = "failed"
    UNAVAILABLE = "unavailable"
    REJECTED = "rejected"
    OTHER = "other"  # something else than firstclaim answered
    NO_ANSWER = "no answer"


_BY_ACTION = {
    each.value: each
    for each in (
        AnswerKind.DEFERRED,
        AnswerKind.DEAD,
        AnswerKind.FAILED,
        AnswerKind.UNAVAILABLE,
        AnswerKind.REJECTED,
    )
}


def kind_of(status: int, content: bytes) -> AnswerKind:
    """What an answer says; status 0 stands for none (refused, reset, timed out)."""
    if status == 0:
        return AnswerKind.NO_ANSWER
    action, processed = outcome_of(content)
    if action == "ignored":
        return AnswerKind.UNHANDLED if processed else AnswerKind.IGNORED
    if processed:
        return AnswerKind.PROCESSED
    return _BY_ACTION.get(action or "", AnswerKind.OTHER)


class Observed(IntFlag):
    """What is remembered of an event."""

    SENT = 1
    ACKNOWLEDGED = 2  # a 2xx: from then on the service answers for it
    PROCESSED = 4
    PROCESSED_AGAIN = 8


class Journal:
    """One byte for each event, by its number."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def sent(self, number: int) -> None:
        """A delivery of the event is about to begin."""
        self._bytes.extend(bytes(max(0, number + 1 - len(self._bytes))))
        self._bytes[number] |= Observed.SENT

    def answered(self, number: int, status: int, kind: AnswerKind) -> None:
        """What a delivery of the event was told."""
        noted = Observed(self._bytes[number])
        if 200 <= status < 300:
            noted |= Observed.ACKNOWLEDGED
        if kind is AnswerKind.PROCESSED:
            noted |= Observed.PROCESSED_AGAIN if Observed.PROCESSED in noted else Observed.PROCESSED
        self._bytes[number] = noted

    def close(self) -> bytes:
        """The finished journal; `entries` reads it."""
        return bytes(self._bytes)


def entries(journal: bytes) -> Iterator[tuple[int, Observed]]:
    """(number, what was noted) of every event that was sent."""
    return ((number, Observed(byte)) for number, byte in enumerate(journal) if byte)


@dataclass(frozen=True, slots=True)
class Latencies:
    """Some deliveries' latencies in milliseconds: quantiles, and the slowest."""

    count: int
    p50: float
    p95: float
    p99: float
    slowest: float


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is: deliveries that are over, by what they were told."""

    seconds: float
    counts: dict[AnswerKind, int]

    @property
    def deliveries(self) -> int:
        """All of them."""
        return sum(self.counts.values())


@dataclass(frozen=True, slots=True)
class Result:
    """What a run saw. `cpu_seconds` is what the generator itself used, `errors` why there was no answer, how often."""

    seconds: float
    cpu_seconds: float
    total: Latencies
    by_kind: dict[AnswerKind, Latencies]
    errors: dict[str, int]
    journal: bytes = field(repr=False)
