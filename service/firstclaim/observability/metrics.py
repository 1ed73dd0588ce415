"""The counters of this service, with a closed set of values for every label.

Guarantees: no value from a request becomes a label, so no sender can create a time series. Every series exists from the
start, at zero, so that an alert on its increase notices the first event. Several workers write to files in one folder
(`PROMETHEUS_MULTIPROC_DIR`, which `serve` sets before they start), and each of them reports the sum.
"""

import os
from collections.abc import Iterable
from functools import cache
from typing import Final, Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics
from prometheus_client.multiprocess import MultiProcessCollector

from firstclaim.errors import RejectedKind
from firstclaim.outcome import Kind

disable_created_metrics()  # type: ignore[no-untyped-call]
REGISTRY: Final = CollectorRegistry()
FOLDER: Final = "PROMETHEUS_MULTIPROC_DIR"  # the variable that prometheus-client reads
# From a handler that only writes a row to one that runs into its deadline.
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

StoppedBy = Literal["process", "redis", "ledger"]


def _counters(name: str, help_text: str, label: str, values: Iterable[str]) -> dict[str, Counter]:
    family = Counter(name, help_text, [label], registry=REGISTRY)
    return {value: family.labels(value) for value in values}


deliveries: Final = _counters("firstclaim_deliveries", "Verified deliveries, by outcome.", "outcome", Kind)
rejected: Final = _counters(
    "firstclaim_rejected_requests", "Requests refused without contacting a store.", "kind", get_args(RejectedKind)
)
duplicates: Final = _counters(
    "firstclaim_duplicates", "Duplicates, by what detected them: a copy in this process, Redis, or the ledger.",
    "stopped_by", get_args(StoppedBy),
)  # fmt: skip
recovered: Final = _counters("firstclaim_recovered", "Events dispatched by recovery, by outcome.", "outcome", Kind)
taken_over: Final = _counters(
    "firstclaim_claims_taken_over",
    "Recorded or failed events that were taken over, by what took them over.",
    "by",
    ("delivery", "recovery"),
)
abandoned: Final = Counter(
    "firstclaim_abandoned",
    "Attempts that were counted as abandoned, because their process vanished or froze.",
    registry=REGISTRY,
)
hung_handlers: Final = Counter(
    "firstclaim_hung_handlers", "Sync handlers whose thread ran on past its deadline.", registry=REGISTRY
)
recovery_rounds: Final = _counters(
    "firstclaim_recovery_rounds", "Rounds of recovery, by result.", "result", ("good", "failed")
)
redis_outages: Final = Counter("firstclaim_redis_outages", "Times that Redis became unreachable.", registry=REGISTRY)
_handler_seconds = Histogram(
    "firstclaim_handler_seconds", "Duration of handlers, by the pattern that they are declared for.", ["handler"],
    buckets=_SECONDS, registry=REGISTRY,
)  # fmt: skip

_batch_events = Histogram(
    "firstclaim_batch_events", "Events of a batch, by the pattern of the batch handler.", ["handler"],
    buckets=(1, 2, 4, 8, 16, 32, 64), registry=REGISTRY,
)  # fmt: skip
_batch_event_seconds = Histogram(
    "firstclaim_batch_event_seconds", "Duration of a batch handler, divided by the events of its batch.", ["handler"],
    buckets=(0.0001, 0.00025, 0.0005, *_SECONDS), registry=REGISTRY,
)  # fmt: skip


@cache
def handler_seconds(pattern: str) -> Histogram:
    """The histogram of the handler that is declared for `pattern`. The pattern comes from code, not from a request."""
    return _handler_seconds.labels(pattern)


@cache
def batch_events(pattern: str) -> Histogram:
    """The histogram of the sizes of the batches of this batch handler."""
    return _batch_events.labels(pattern)


@cache
def batch_event_seconds(pattern: str) -> Histogram:
    """The histogram of the seconds that this batch handler takes for one event."""
    return _batch_event_seconds.labels(pattern)


def create_series(pattern: str, *, batch: bool) -> None:
    """Create the series of a handler, so that they exist from the start."""
    handler_seconds(pattern)
    if batch:
        batch_events(pattern)
        batch_event_seconds(pattern)


def collected() -> CollectorRegistry:
    """The registry to report: the sum of all workers, or this process alone."""
    folder = os.environ.get(FOLDER)
    if folder is None:
        return REGISTRY
    registry = CollectorRegistry()
    MultiProcessCollector(registry, folder)  # type: ignore[no-untyped-call]
    return registry


def totals(name: str) -> dict[str, int]:
    """The counters of a family with one label, by the label's value, summed over all workers since their start."""
    samples = [sample for metric in collected().collect() if metric.name == name for sample in metric.samples]
    return {next(iter(each.labels.values())): int(each.value) for each in samples if each.name == f"{name}_total"}
