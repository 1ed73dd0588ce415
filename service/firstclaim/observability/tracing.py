"""Spans over an event's path, by OpenTelemetry (extra `firstclaim[otel]`).

Guarantees: without the package, or where spans go nowhere, a span costs a call. Else they are exported
where OpenTelemetry's own variables say (`OTEL_EXPORTER_OTLP_ENDPOINT` and its kin; without it nowhere). A span holds
the event's id and type, the attempt, the outcome and an error's class: no payload, no message, no secret.
"""

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Final

try:
    from opentelemetry import propagate, trace
except ImportError:
    _available = False
else:
    _available = True

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_NOTHING: Final = nullcontext()
_tracer: "trace.Tracer | None" = None  # from `start` on, if spans go anywhere: one that goes nowhere costs as much

Value = str | int | None


def span(name: str, **attributes: Value) -> AbstractContextManager[object]:
    """A child of the span that is open, for as long as the block runs; attributes that are None are left out."""
    if _tracer is None:
        return _NOTHING
    return _tracer.start_as_current_span(
        f"firstclaim.{name}",
        attributes=_told(attributes),
        record_exception=False,  # its message may hold what a payload held
        set_status_on_exception=False,
    )


def delivery_span(headers: Mapping[str, str]) -> AbstractContextManager[object]:
    """The span of a delivery, a child of the one that `headers` name, if a proxy before us has begun one."""
    if _tracer is None:
        return _NOTHING
    return _tracer.start_as_current_span(
        "firstclaim.delivery",
        propagate.extract(headers),
        trace.SpanKind.SERVER,
        record_exception=False,
        set_status_on_exception=False,
    )


def note(*, error: str | None = None, **attributes: Value) -> None:
    """Say more of the span that is open; `error` is a class's name, and marks it as failed."""
    if _tracer is None:
        return
    current = trace.get_current_span()
    current.set_attributes(_told(attributes))
    if error is not None:
        current.set_status(trace.StatusCode.ERROR, error)


def start() -> Callable[[], None]:
    """Export spans from now on, if the environment says where to; returns what ends it and sends the last ones.

    Leaves alone what is configured already, by `opentelemetry-instrument` for one.
    """
    global _tracer
    if not _available:
        return lambda: None
    if not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        _tracer = trace.get_tracer("firstclaim")
        return lambda: None
    if not any(os.environ.get(name) for name in _ENDPOINTS):
        return lambda: None
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor as Batched

    named = {} if os.environ.get("OTEL_SERVICE_NAME") else {SERVICE_NAME: "firstclaim"}
    provider = TracerProvider(resource=Resource.create(named), shutdown_on_exit=False)
    provider.add_span_processor(Batched(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    _tracer = trace.get_tracer("firstclaim")
    return provider.shutdown


def _told(attributes: Mapping[str, Value]) -> dict[str, str | int]:
    return {f"firstclaim.{name}": value for name, value in attributes.items() if value is not None}
