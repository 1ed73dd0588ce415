"""Traces of deliveries, through OpenTelemetry (extra `firstclaim[otel]`).

Guarantees: without the package, or if no exporter is configured, a span costs one function call. Otherwise spans are
exported to where OpenTelemetry's own variables point (`OTEL_EXPORTER_OTLP_ENDPOINT` and related ones). A span holds the
event's id and type, the attempt, the outcome and the class of an error: no payload, no message, no secret.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final, TypeAlias

try:
    from opentelemetry import propagate, trace
except ImportError:
    _available = False
else:
    _available = True

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_NOTHING: Final = nullcontext()
_tracer: "trace.Tracer | None" = None  # set by `start` if spans are exported: a span that is not costs just as much

Value = str | int | None
Link: TypeAlias = Any  # OpenTelemetry's, where it is installed


def link() -> Link | None:
    """The current span, for another one to link to; None if spans are not exported."""
    return None if _tracer is None else trace.Link(trace.get_current_span().get_span_context())


def span(name: str, links: Iterable[Link | None] = (), **attributes: Value) -> AbstractContextManager[object]:
    """Open a child of the current span while the block runs. Attributes that are None are left out.

    `links`: spans that this one belongs to as well, and which are not its parents.
    """
    if _tracer is None:
        return _NOTHING
    return _tracer.start_as_current_span(
        f"firstclaim.{name}",
        links=[each for each in links if each is not None],
        attributes=_named(attributes),
        record_exception=False,  # the message may quote the payload
        set_status_on_exception=False,
    )


def delivery_span(headers: Sequence[tuple[bytes, bytes]]) -> AbstractContextManager[object]:
    """The span of a delivery. It is a child of the span that `headers` name, if a proxy in front of us started one.

    `headers` are those of ASGI, with names in lower case. Of several with one name, the first counts.
    """
    if _tracer is None:
        return _NOTHING
    carrier = {name.decode("latin-1"): value.decode("latin-1") for name, value in reversed(headers)}
    return _tracer.start_as_current_span(
        "firstclaim.delivery",
        propagate.extract(carrier),
        trace.SpanKind.SERVER,
        record_exception=False,
        set_status_on_exception=False,
    )


def note(*, error: str | None = None, **attributes: Value) -> None:
    """Add attributes to the current span. `error` is the name of a class, and marks the span as failed."""
    if _tracer is None:
        return
    current = trace.get_current_span()
    current.set_attributes(_named(attributes))
    if error is not None:
        current.set_status(trace.StatusCode.ERROR, error)


def start() -> Callable[[], None]:
    """Start to export spans, if the environment configures a destination.

    Returns a function that stops the export and sends the last spans. Changes nothing if a tracer provider is already
    configured, for example by `opentelemetry-instrument`.
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

    defaults = {} if os.environ.get("OTEL_SERVICE_NAME") else {SERVICE_NAME: "firstclaim"}
    provider = TracerProvider(resource=Resource.create(defaults), shutdown_on_exit=False)
    provider.add_span_processor(Batched(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    _tracer = trace.get_tracer("firstclaim")
    return provider.shutdown


def _named(attributes: Mapping[str, Value]) -> dict[str, str | int]:
    return {f"firstclaim.{name}": value for name, value in attributes.items() if value is not None}
