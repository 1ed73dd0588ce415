"""What a load test sends, and how it counts the answers: without sockets, clocks or locust.

Guarantees: the seed alone determines the sequence of types, copies and repetitions, whatever the answers and their
timing. A repetition is the same bytes as the first delivery. Two runs never share an id, so a run with the seed of
another is not a duplicate of it. Every event that was sent has an entry in the journal, also if nothing was answered.
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

# Concurrent connections of all users together: under the usual limit of 1024 open files.
IN_FLIGHT_MOST = 900

# A repetition comes 1 to 1000 turns after the first delivery, evenly on a logarithmic scale: while the event is still
# being handled, just after that, and long after it.
_LATER_MOST_TURNS = 1000

_NUMBER_DIGITS = 8
_MARK = b"\xff" * _NUMBER_DIGITS  # in no UTF-8, so in no event


@dataclass(frozen=True, slots=True)
class Plan:
    """The parameters of a load test. `deliveries_per_second` 0: as fast as the users can."""

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
        """The prefix of the ids of all events of this run, and of no other run; the event's number follows."""
        return f"evt_load{self.run}"

    def event_id(self, number: int) -> str:
        """The id of the run's event `number`."""
        return f"{self.id_head}{number:0{_NUMBER_DIGITS}}"

    def faults(self) -> Iterator[str]:
        """What is wrong with the plan, one sentence for each fault."""
        try:
            check_url(self.url)
            if "@" in urlsplit(self.url).netloc:
                yield "--url: a user name and a password would appear in the report"
        except ValueError as error:
            yield str(error)
        if not all(map(math.isfinite, (self.deliveries_per_second, self.duration_seconds))):
            yield "--rate and --duration must be finite"
        if unknown := sorted(set(self.types) - set(shipped_types())):
            yield f"--type: no template for {', '.join(unknown)}. Templates: {', '.join(shipped_types())}"
        most = self.users * (self.copies if self.concurrent_percent else 1)
        if most > IN_FLIGHT_MOST:
            yield f"--users times --copies is {most} concurrent connections; at most {IN_FLIGHT_MOST} are possible"


# -- what is sent -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Turn:
    """One step of the sequence: event `number`, in `copies` that are in flight at the same instant."""

    number: int
    event_type: str
    copies: int = 1


class Mix:
    """The sequence of turns, determined by the plan's percentages and seed."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._random = random.Random(plan.seed)  # noqa: S311
        self._turns = self._events = 0
        self._repetitions: list[tuple[int, int, str]] = []  # (turn, number, type), a heap

    def next(self) -> Turn:
        """The next turn: a repetition if one is due, else a new event."""
        self._turns += 1
        if self._repetitions and self._repetitions[0][0] <= self._turns:
            _, number, event_type = heapq.heappop(self._repetitions)
            return Turn(number, event_type)
        number, self._events = self._events, self._events + 1
        event_type = self._random.choice(self._plan.types)
        concurrent, repeated = (self._random.uniform(0, 100) for _ in range(2))
        turns_later = int(_LATER_MOST_TURNS ** self._random.random())
        if repeated < self._plan.duplicates_percent:
            heapq.heappush(self._repetitions, (self._turns + turns_later, number, event_type))
        return Turn(number, event_type, self._plan.copies if concurrent < self._plan.concurrent_percent else 1)


class Bodies:
    """The bytes of each event: always the same for the same number and type."""

    def __init__(self, plan: Plan) -> None:
        self._marked = {each: marked_event(each, plan.id_head, _MARK) for each in plan.types}

    def of(self, turn: Turn) -> bytes:
        """The event's body."""
        return self._marked[turn.event_type].replace(_MARK, b"%0*d" % (_NUMBER_DIGITS, turn.number))


class Pace:
    """When each turn is due, in seconds from the start: at the requested rate, whatever the answers."""

    def __init__(self, deliveries_per_second: float) -> None:
        self._seconds_each = 1 / deliveries_per_second if deliveries_per_second else 0.0
        self._next = 0.0

    def due(self, copies: int, now: float) -> float:
        """When the next turn is due; it takes the time of all its copies. In the past if the users are behind."""
        if not self._seconds_each:
            return now
        due, self._next = self._next, self._next + copies * self._seconds_each
        return due


# -- answers -----------------------------------------------------------------------------------------


class AnswerKind(StrEnum):
    """How a delivery was answered, by the table of answers in docs/."""

    PROCESSED = "processed"
    IGNORED = "ignored"
    UNHANDLED = "unhandled"  # no handler for the type
    DEFERRED = "deferred"
    DEAD = "dead"
    FAILED = "failed"
    UNAVAILABLE = "unavailable"
    REJECTED = "rejected"
    OTHER = "other"  # the answer is not firstclaim's
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
    """The kind of an answer. Status 0: there was none (refused, reset, timed out)."""
    if status == 0:
        return AnswerKind.NO_ANSWER
    action, processed, _ = outcome_of(content)
    if action == "ignored":
        return AnswerKind.UNHANDLED if processed else AnswerKind.IGNORED
    if processed:
        return AnswerKind.PROCESSED
    return _BY_ACTION.get(action or "", AnswerKind.OTHER)


class Observed(IntFlag):
    """What the deliveries of an event have shown."""

    SENT = 1
    ACKNOWLEDGED = 2  # a 2xx: from then on the service is responsible for the event
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
        """Note the answer to a delivery of the event."""
        observed = Observed(self._bytes[number])
        if 200 <= status < 300:
            observed |= Observed.ACKNOWLEDGED
        if kind is AnswerKind.PROCESSED:
            observed |= Observed.PROCESSED_AGAIN if Observed.PROCESSED in observed else Observed.PROCESSED
        self._bytes[number] = observed

    def close(self) -> bytes:
        """The finished journal; `entries` reads it."""
        return bytes(self._bytes)


def entries(journal: bytes) -> Iterator[tuple[int, Observed]]:
    """(number, observations) of every event that was sent."""
    return ((number, Observed(byte)) for number, byte in enumerate(journal) if byte)


@dataclass(frozen=True, slots=True)
class Latencies:
    """Latencies of some deliveries in milliseconds: quantiles, and the slowest."""

    count: int
    p50: float
    p95: float
    p99: float
    slowest: float


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of a run: the deliveries that have ended, by kind of answer."""

    seconds: float
    counts: dict[AnswerKind, int]

    @property
    def deliveries(self) -> int:
        """The number of all deliveries."""
        return sum(self.counts.values())


@dataclass(frozen=True, slots=True)
class Result:
    """The result of a run. `cpu_seconds`: of the generator itself. `errors`: why answers are missing, and how often."""

    seconds: float
    cpu_seconds: float
    total: Latencies
    by_kind: dict[AnswerKind, Latencies]
    errors: dict[str, int]
    journal: bytes = field(repr=False)
