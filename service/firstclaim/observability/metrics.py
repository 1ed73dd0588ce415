"""What this service counts: one table of metrics, the values of every label known beforehand.

Guarantees: nothing that a request holds ever becomes a label, so that nobody outside can create a time series; every
series is there from the start, at zero, so that an alert on its increase sees the first one. Several workers count
into files of one folder (`PROMETHEUS_MULTIPROC_DIR`, set by `serve` before they start), and any of them tells the sum.
"""

import os
from collections.abc import Iterable
from typing import Final, Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics
from prometheus_client.multiprocess import MultiProcessCollector

from firstclaim.errors import RejectedKind
from firstclaim.outcome import Kind

disable_created_metrics()  # type: ignore[no-untyped-call]
REGISTRY: Final = CollectorRegistry()
FOLDER: Final = "PROMETHEUS_MULTIPROC_DIR"  # prometheus-client's own variable
# From a handler that only writes a row to one that is as slow as a deadline allows.
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

StoppedBy = Literal["process", "redis", "ledger"]


def _counters(name: str, help_text: str, label: str, values: Iterable[str]) -> dict[str, Counter]:
    family = Counter(name, help_text, [label], registry=REGISTRY)
    return {value: family.labels(value) for value in values}


deliveries: Final = _counters(
    "firstclaim_deliveries", "Deliveries that were verified, by what came of them.", "outcome", Kind
)
rejected: Final = _counters(
    "firstclaim_rejected_requests", "Requests refused before anything was asked.", "kind", get_args(RejectedKind)
)
duplicates: Final = _counters(
    "firstclaim_duplicates", "Duplicates, by what told them: a copy under way here, Redis, or the ledger.",
    "stopped_by", get_args(StoppedBy),
)  # fmt: skip
recovered: Final = _counters(
    "firstclaim_recovered", "Events dispatched by recovery, by what came of them.", "outcome", Kind
)
taken_over: Final = _counters(
    "firstclaim_claims_taken_over", "Claims of what was recorded or had failed before.", "by", ("delivery", "recovery")
)
abandoned: Final = Counter("firstclaim_abandoned", "Claims whose process vanished or froze.", registry=REGISTRY)
recovery_rounds: Final = _counters("firstclaim_recovery_rounds", "Rounds of recovery.", "result", ("good", "failed"))
redis_outages: Final = Counter("firstclaim_redis_outages", "Times that Redis went away.", registry=REGISTRY)
_handler_seconds = Histogram(
    "firstclaim_handler_seconds", "How long handlers ran, by the pattern that they are declared for.", ["handler"],
    buckets=_SECONDS, registry=REGISTRY,
)  # fmt: skip


def handler_seconds(pattern: str) -> Histogram:
    """Of the handler that is declared for `pattern`: code, not something that a request says."""
    return _handler_seconds.labels(pattern)


def collected() -> CollectorRegistry:
    """What to tell: all workers' counts, or this one process'."""
    folder = os.environ.get(FOLDER)
    if folder is None:
        return REGISTRY
    registry = CollectorRegistry()
    MultiProcessCollector(registry, folder)  # type: ignore[no-untyped-call]
    return registry


def totals(name: str) -> dict[str, int]:
    """What the counters of a family that has one label have come to, over all workers, since they were started."""
    samples = [sample for metric in collected().collect() if metric.name == name for sample in metric.samples]
    return {next(iter(each.labels.values())): int(each.value) for each in samples if each.name == f"{name}_total"}
