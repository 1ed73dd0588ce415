"""The series of each handler, with its pattern as a label.

Guarantees: the patterns come from the registry, so no sender can create a series. The series of a handler are looked up
once for its pattern: an attempt costs no lookup by labels, which takes ten times as long as counting does.
"""

from functools import cache
from typing import Final, Literal, get_args

from prometheus_client import Counter, Gauge, Histogram

from firstclaim.observability.metrics import REGISTRY, SECONDS

AttemptOutcome = Literal["completed", "failed", "retry", "dead"]
HeldBy = Literal["previously_abandoned", "hung_thread"]
KeyHeldBy = Literal["process", "fleet"]
Limit = Literal["slots", "per_second"]

_attempts = Counter(
    "firstclaim_attempts",
    "Attempts, by the pattern of their handler. Each event of a batch counts. retry: the handler asked for it. "
    "dead: it raised Permanent.",
    ["handler", "outcome"], registry=REGISTRY,
)  # fmt: skip
_seconds = Histogram(
    "firstclaim_handler_seconds",
    "Duration of handlers, by the pattern that they are declared for, and by the outcome of the attempt.",
    ["handler", "outcome"], buckets=SECONDS, registry=REGISTRY,
)  # fmt: skip
# `livesum`: of the processes that are alive. See `metrics.forget_process`.
_slots_in_use = Gauge(
    "firstclaim_slots_in_use", "Handler slots in use, by the pattern of the handler that runs in them.", ["handler"],
    registry=REGISTRY, multiprocess_mode="livesum",
)  # fmt: skip
_slots_held = Gauge(
    "firstclaim_slots_held",
    "Those of the slots in use that an event which was abandoned before holds, or a thread that runs on past its "
    "deadline.",
    ["handler", "by"], registry=REGISTRY, multiprocess_mode="livesum",
)  # fmt: skip
_batch_events = Histogram(
    "firstclaim_batch_events", "Events of a batch, by the pattern of the batch handler.", ["handler"],
    buckets=(1, 2, 4, 8, 16, 32, 64), registry=REGISTRY,
)  # fmt: skip
_batch_event_seconds = Histogram(
    "firstclaim_batch_event_seconds", "Duration of a batch handler, divided by the events of its batch.", ["handler"],
    buckets=(0.0001, 0.00025, 0.0005, *SECONDS), registry=REGISTRY,
)  # fmt: skip
_key_waits = Counter(
    "firstclaim_key_waits",
    "Times that an event waited for its key, by the first pattern of the handler: an event of the same key ran in the "
    "same process, or in another one.",
    ["handler", "held_by"], registry=REGISTRY,
)  # fmt: skip
_limited = Counter(
    "firstclaim_limited_deliveries",
    "Deliveries that were recorded and not dispatched at once because of a limit of their handler (by its first "
    "pattern): all its slots were taken, or its rate was used up.",
    ["handler", "limit"], registry=REGISTRY,
)  # fmt: skip


class HandlerMetrics:
    """The series of the handler that is declared for `pattern`; `batch`: it is a batch handler."""

    __slots__ = ("_batch_event_seconds", "_batch_events", "_seconds", "attempts", "slots_held", "slots_in_use")

    def __init__(self, pattern: str, *, batch: bool) -> None:
        self.attempts: Final[dict[AttemptOutcome, Counter]] = {
            outcome: _attempts.labels(pattern, outcome) for outcome in get_args(AttemptOutcome)
        }
        self._seconds: dict[AttemptOutcome, Histogram] = {
            outcome: _seconds.labels(pattern, outcome) for outcome in get_args(AttemptOutcome)
        }
        self.slots_in_use: Final = _slots_in_use.labels(pattern)
        self.slots_held: Final[dict[HeldBy, Gauge]] = {by: _slots_held.labels(pattern, by) for by in get_args(HeldBy)}
        if batch:
            self._batch_events = _batch_events.labels(pattern)
            self._batch_event_seconds = _batch_event_seconds.labels(pattern)

    def observe(self, outcome: AttemptOutcome, seconds: float) -> None:
        """The handler has taken so long, and this is the outcome of its attempt."""
        self._seconds[outcome].observe(seconds)

    def observe_batch(self, events: int, seconds: float) -> None:
        """The batch handler has taken so long for so many events."""
        self._batch_events.observe(events)
        self._batch_event_seconds.observe(seconds / events)


@cache
def handler_metrics(pattern: str, batch: bool) -> HandlerMetrics:
    """The series of the handler that is declared for `pattern`."""
    return HandlerMetrics(pattern, batch=batch)


class LimitMetrics:
    """The series of the handlers with a key or limits, whose first pattern is `pattern`."""

    __slots__ = ("refused", "waits")

    def __init__(self, pattern: str) -> None:
        self.waits: Final[dict[KeyHeldBy, Counter]] = {by: _key_waits.labels(pattern, by) for by in get_args(KeyHeldBy)}
        self.refused: Final[dict[Limit, Counter]] = {each: _limited.labels(pattern, each) for each in get_args(Limit)}


@cache
def limit_metrics(pattern: str) -> LimitMetrics:
    """The series of the handlers whose first pattern is `pattern`."""
    return LimitMetrics(pattern)
