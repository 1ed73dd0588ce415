"""The metrics of `/metrics` over OTLP, for collectors that do not scrape (extra `firstclaim[otel]`).

Guarantees: names, labels and values are those of `/metrics`, read from the same series: an event is counted once, and
the export costs no delivery anything. Each process exports what it has counted itself, as an instance of the service
(`service.instance.id`), and a backend adds that up. The export has a thread of its own, so that an unreachable
collector delays nothing.

Only `firstclaim.observability.metrics_export` imports this module, once a destination is configured: the import takes
a third of a second.
"""

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby, pairwise
from typing import Final

import structlog
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.sdk.metrics import export as otel
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from prometheus_client.metrics_core import Metric
from prometheus_client.samples import Sample

from firstclaim.observability.redaction import describe_error
from firstclaim.observability.tracing import resource

log = structlog.get_logger(__name__)

_CUMULATIVE: Final = otel.AggregationTemporality.CUMULATIVE
_DEFAULT_INTERVAL_MILLISECONDS: Final = 60_000.0  # OpenTelemetry's


class MetricsExport:
    """A thread that exports what `read` returns, at the interval of OpenTelemetry's variables.

    `read` gets the timeout in seconds, and may raise. `counted` is read at the end, when nothing else can be read.
    """

    def __init__(self, read: Callable[[float], Iterable[Metric]], counted: Callable[[], Iterable[Metric]]) -> None:
        self._read = read
        self._counted = counted
        self._exporter = OTLPMetricExporter()
        self._resource = resource()
        self._scope = InstrumentationScope("firstclaim")
        self._interval_seconds = _interval_milliseconds() / 1000
        self._started_at = time.time_ns()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="metrics-export")
        self._thread.start()

    def stop(self) -> None:
        """Send the last counts, and end. May take as long as the collector does."""
        self._stopped.set()
        self._thread.join()
        self._exporter.shutdown()

    def _run(self) -> None:
        while not self._stopped.wait(self._interval_seconds):
            try:
                families = [*self._counted(), *self._read(self._interval_seconds)]
            except Exception as error:  # noqa: BLE001  (the next reading may succeed)
                log.debug("metrics_not_read", error=describe_error(error))
                families = [*self._counted()]
            self._export(families)
        self._export(self._counted())

    def _export(self, families: Iterable[Metric]) -> None:
        metrics = list(converted(families, self._started_at, time.time_ns()))
        scope = otel.ScopeMetrics(self._scope, metrics, "")
        self._exporter.export(otel.MetricsData([otel.ResourceMetrics(self._resource, [scope], "")]))


def converted(families: Iterable[Metric], started_at: int, now: int) -> Iterator[otel.Metric]:
    """The same metrics as OpenTelemetry's; times in nanoseconds since 1970. A counter keeps the name in `/metrics`."""
    for family in families:
        data: otel.Sum | otel.Gauge | otel.Histogram
        if family.type == "histogram":
            data = otel.Histogram(list(_histograms(family.samples, started_at, now)), _CUMULATIVE)
            yield otel.Metric(family.name, family.documentation, "", data)
            continue
        points = [
            otel.NumberDataPoint(dict(each.labels), started_at, now, float(each.value)) for each in family.samples
        ]
        data = otel.Sum(points, _CUMULATIVE, is_monotonic=True) if family.type == "counter" else otel.Gauge(points)
        yield otel.Metric(family.name + "_total" * (family.type == "counter"), family.documentation, "", data)


def _histograms(samples: Sequence[Sample], started_at: int, now: int) -> Iterator[otel.HistogramDataPoint]:
    """A point for each set of labels. The counts of Prometheus' buckets contain those of the buckets below."""

    def labels(sample: Sample) -> dict[str, str]:
        return {name: value for name, value in sample.labels.items() if name != "le"}

    for attributes, group in groupby(samples, labels):
        of_name: dict[str, list[Sample]] = {}
        for sample in group:
            of_name.setdefault(sample.name.rpartition("_")[2], []).append(sample)
        within = [round(sample.value) for sample in of_name["bucket"]]
        yield otel.HistogramDataPoint(
            attributes,
            started_at,
            now,
            count=within[-1],
            sum=of_name["sum"][0].value,
            bucket_counts=[after - before for before, after in pairwise([0, *within])],
            explicit_bounds=[float(sample.labels["le"]) for sample in of_name["bucket"][:-1]],
            min=None,  # type: ignore[arg-type]  # optional in OTLP, and Prometheus does not keep them
            max=None,  # type: ignore[arg-type]
        )


def _interval_milliseconds() -> float:
    try:
        interval = float(os.environ.get("OTEL_METRIC_EXPORT_INTERVAL") or _DEFAULT_INTERVAL_MILLISECONDS)
    except ValueError:
        return _DEFAULT_INTERVAL_MILLISECONDS
    return interval if interval > 0 else _DEFAULT_INTERVAL_MILLISECONDS
