"""The counters of this service, except those of its handlers, with a closed set of values for every label.

Guarantees: no value from a request becomes a label, so no sender can create a time series. Every series exists from the
start, at zero, so that an alert on its increase notices the first event. Several workers write to files in one folder
(`PROMETHEUS_MULTIPROC_DIR`, which `serve` sets before they start), and each of them reports the sum.
"""

import os
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Final, Literal, get_args

from prometheus_client import CollectorRegistry, Counter, disable_created_metrics
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from firstclaim.errors import RejectedKind
from firstclaim.outcome import Kind

disable_created_metrics()  # type: ignore[no-untyped-call]
REGISTRY: Final = CollectorRegistry()
FOLDER: Final = "PROMETHEUS_MULTIPROC_DIR"  # the variable that prometheus-client reads
# From a handler that only writes a row to one that runs into its deadline.
SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

StoppedBy = Literal["process", "redis", "ledger"]
Verification = Literal["verified", "signature_refused"]


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
_endpoint_requests = Counter(
    "firstclaim_endpoint_requests",
    "Requests to an endpoint, by its name (-: without a name): verified, or refused because of their signature.",
    ["endpoint", "result"], registry=REGISTRY,
)  # fmt: skip
redis_outages: Final = Counter("firstclaim_redis_outages", "Times that Redis became unreachable.", registry=REGISTRY)


@cache
def endpoint_requests(name: str | None) -> Mapping[Verification, Counter]:
    """The series of an endpoint, None: the one without a name. They exist once this was called: before it serves."""
    return {each: _endpoint_requests.labels(name or "-", each) for each in get_args(Verification)}


def collected() -> CollectorRegistry:
    """The registry to report: the sum of all workers, or this process alone."""
    folder = os.environ.get(FOLDER)
    if folder is None:
        return REGISTRY
    registry = CollectorRegistry()
    MultiProcessCollector(registry, folder)  # type: ignore[no-untyped-call]
    return registry


def forget_process(pid: int) -> None:
    """A worker has ended: what it had in use is in use no more. What it has counted stays counted."""
    if os.environ.get(FOLDER) is not None:
        mark_process_dead(pid)  # type: ignore[no-untyped-call]


def own(counter: Counter) -> int:
    """What this process has counted, also where several write to one folder."""
    return int(next(iter(counter.collect())).samples[0].value)


def totals(name: str) -> dict[str, int]:
    """The counters of a family with one label, by the label's value, summed over all workers since their start."""
    samples = [sample for metric in collected().collect() if metric.name == name for sample in metric.samples]
    return {next(iter(each.labels.values())): int(each.value) for each in samples if each.name == f"{name}_total"}


def endpoint_totals(*, this_process: bool = False) -> dict[str, dict[str, int]]:
    """The requests to each endpoint (`-`: without a name), by result, summed over all workers since their start."""
    found: dict[str, dict[str, int]] = {}
    for metric in _endpoint_requests.collect() if this_process else collected().collect():
        for sample in metric.samples:
            if sample.name == "firstclaim_endpoint_requests_total":
                found.setdefault(sample.labels["endpoint"], {})[sample.labels["result"]] = int(sample.value)
    return found
