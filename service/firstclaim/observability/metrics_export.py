"""Whether metrics are exported over OTLP: with the extra `firstclaim[otel]`, where a destination is configured.

Guarantees: otherwise nothing of OpenTelemetry's is imported, and nothing is started.
"""

import os
from collections.abc import Callable, Iterable

from prometheus_client.metrics_core import Metric

from firstclaim.observability.metrics import REGISTRY

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT")


def start(read: Callable[[float], Iterable[Metric]]) -> Callable[[], None]:
    """Export this process's counters, and what `read` returns within the seconds that it is given.

    Returns a function that sends the last counts and ends the export.
    """
    if not _wanted():
        return lambda: None
    try:
        from firstclaim.observability.otlp_metrics import MetricsExport
    except ImportError:
        return lambda: None
    return MetricsExport(read, REGISTRY.collect).stop


def _wanted() -> bool:
    exporters = os.environ.get("OTEL_METRICS_EXPORTER") or "otlp"
    disabled = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    return not disabled and "otlp" in exporters.split(",") and any(os.environ.get(name) for name in _ENDPOINTS)
