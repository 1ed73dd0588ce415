"""The metrics that are read at the time of the scrape: the slots, the health checks, and the state of the ledger.

Guarantees: a value that could not be read from the ledger is left out, never reported as zero. The values of a label
are a closed set: the checks, the statuses, and the patterns of this process's handlers. All events without a handler in
this process are one number.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from firstclaim.inbox.pauses import Pauses
from firstclaim.inbox.routes import Routes
from firstclaim.operations.queries import Backlog, Gaps
from firstclaim.status import Status
from firstclaim.web.health import Health


@dataclass(frozen=True, slots=True)
class Unfinished:
    """The unfinished events, and for how many seconds the oldest due event of each type and mode has been due."""

    backlog: Backlog
    oldest_due: Mapping[tuple[str, bool], float]


@dataclass(frozen=True, slots=True)
class LedgerReading:
    """What the ledger says. `unfinished` and `gaps` are None, and a status is not in `counts`, if it cannot be read."""

    unfinished: Unfinished | None
    counts: Mapping[Status, int] = field(default_factory=dict)
    gaps: Gaps | None = None


class Gauges(Collector):
    """One reading. `slots`: those of all workers."""

    def __init__(
        self, slots: int, up: Mapping[str, Health], routes: Routes, pauses: Pauses, ledger: LedgerReading
    ) -> None:
        self._slots = slots
        self._up = up
        self._routes = routes
        self._pauses = pauses
        self._ledger = ledger

    def collect(self) -> Iterator[Metric]:
        """All families."""
        yield _gauge("firstclaim_handler_slots", "Handlers that can run at once, in all workers.", self._slots)
        up = {check: float(health is Health.OK) for check, health in self._up.items()}
        yield _labelled("firstclaim_up", "1 if the health check of /readyz passes, else 0.", "part", up)
        yield _labelled(
            "firstclaim_handler_paused",
            "1 if an operator has paused all or some types of a handler, by its pattern, else 0.",
            "handler",
            {each.pattern: float(self._pauses.touch(each.pattern)) for each in self._routes.registry},
        )
        if (unfinished := self._ledger.unfinished) is not None:
            yield from _backlog(unfinished.backlog)
            yield from self._oldest_due(unfinished.oldest_due)
        if self._ledger.counts:
            counts = {str(status): number for status, number in self._ledger.counts.items()}
            yield _labelled("firstclaim_events", "Events in the ledger.", "status", counts)
        if (gaps := self._ledger.gaps) is not None:
            yield from _gaps(gaps)

    def _oldest_due(self, by_queue: Mapping[tuple[str, bool], float]) -> Iterator[Metric]:
        unwanted = 0.0
        seconds = dict.fromkeys((handler.pattern for handler in self._routes.registry), 0.0)
        for queue, due_seconds in by_queue.items():
            if self._pauses.cover(queue[0]):
                continue
            if (handler := self._routes.handler_of(*queue)) is None:
                unwanted = max(unwanted, due_seconds)
            else:
                seconds[handler.pattern] = max(seconds[handler.pattern], due_seconds)
        yield _labelled(
            "firstclaim_handler_oldest_due_seconds",
            "How long the oldest due event of a handler has been due, by its pattern; 0 if none is due. Paused types "
            "do not count.",
            "handler",
            seconds,
        )
        yield _gauge(
            "firstclaim_unwanted_due_seconds",
            "How long the oldest due event has been due for which this process has no handler; 0 if none is due.",
            unwanted,
        )


def _backlog(backlog: Backlog) -> Iterator[Metric]:
    yield _gauge("firstclaim_due_events", "Events that are due and not yet taken over.", backlog.due)
    yield _gauge(
        "firstclaim_oldest_due_seconds",
        "How long the oldest due event has been due; 0 if none is due.",
        backlog.oldest_due_seconds or 0,
    )
    yield _gauge(
        "firstclaim_past_their_lease",
        "Claims past their lease that recovery has not yet marked as abandoned.",
        backlog.past_their_lease,
    )


def _gaps(gaps: Gaps) -> Iterator[Metric]:
    if gaps.open_seconds is not None:
        yield _gauge(
            "firstclaim_last_event_seconds", "How long ago the last new event was recorded.", gaps.open_seconds
        )
    if gaps.usual_seconds is not None:
        yield _gauge(
            "firstclaim_usual_gap_seconds",
            "The time between two new events that one in a hundred of the last 1,000 exceeds; from 100 events on.",
            gaps.usual_seconds,
        )


def _gauge(name: str, help_text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, help_text, value=value)


def _labelled(name: str, help_text: str, label: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(name, help_text, labels=[label])
    for label_value, value in values.items():
        family.add_metric([label_value], value)
    return family
