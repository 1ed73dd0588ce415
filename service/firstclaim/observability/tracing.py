"""Traces of deliveries, through OpenTelemetry (extra `firstclaim[otel]`).

Guarantees: without the package, or if no exporter is configured, a span costs one function call. Otherwise spans are
exported to where OpenTelemetry's own variables point (`OTEL_EXPORTER_OTLP_ENDPOINT` and related ones). A span holds the
event's id and type, the attempt, the outcome and the class of an error: no payload, no message, no secret.
"""

import os
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final, TypeAlias

try:
    from opentelemetry import propagate, trace
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError:
    _available = False
else:
    _available = True
    _FORMAT: Final = TraceContextTextMapPropagator()  # whichever format the environment asks for in headers

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_NOTHING: Final = nullcontext()
_tracer: "trace.Tracer | None" = None  # set by `start` if spans are exported: a span that is not costs just as much

Value = str | int | None
Span: TypeAlias = Any  # OpenTelemetry's, where it is installed


def current() -> Span | None:
    """The current span, to link to or to go on in; None if spans are not exported."""
    return None if _tracer is None else trace.get_current_span()


def within(parent: Span | None) -> AbstractContextManager[object]:
    """Go on in a span that `current` has returned, while the block runs: work that another task does for it."""
    if parent is None:
        return _NOTHING
    return trace.use_span(parent, record_exception=False, set_status_on_exception=False)


def traceparent() -> str | None:
    """The current span as the header of that name writes it, for the ledger; None if the span is not exported."""
    if _tracer is None or not trace.get_current_span().get_span_context().trace_flags.sampled:
        return None
    carrier: dict[str, str] = {}
    _FORMAT.inject(carrier)
    return carrier["traceparent"]


def recorded_by(traceparent: str | None) -> Span | None:
    """The span of a `traceparent`, to link to; None if there is none, or spans are not exported."""
    if _tracer is None or traceparent is None:
        return None
    span = trace.get_current_span(_FORMAT.extract({"traceparent": traceparent}, Context()))
    return span if span.get_span_context().is_valid else None


def span(name: str, links: Iterable[Span | None] = (), **attributes: Value) -> AbstractContextManager[object]:
    """Open a child of the current span while the block runs. Attributes that are None are left out.

    `links`: spans that this one belongs to as well, and which are not its parents.
    """
    if _tracer is None:
        return _NOTHING
    return _tracer.start_as_current_span(
        f"firstclaim.{name}",
        links=[trace.Link(each.get_span_context()) for each in links if each is not None],
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
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor as Batched

    provider = TracerProvider(resource=resource(), shutdown_on_exit=False)
    provider.add_span_processor(Batched(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    _tracer = trace.get_tracer("firstclaim")
    return provider.shutdown


def resource() -> Any:
    """This process, as OpenTelemetry's `Resource`: the service's name, and the instance (`host:pid`)."""
    from opentelemetry.sdk.resources import SERVICE_INSTANCE_ID, SERVICE_NAME, Resource

    defaults = {} if os.environ.get("OTEL_SERVICE_NAME") else {SERVICE_NAME: "firstclaim"}
    if SERVICE_INSTANCE_ID not in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", ""):
        defaults[SERVICE_INSTANCE_ID] = f"{socket.gethostname()}:{os.getpid()}"
    return Resource.create(defaults)


def _named(attributes: Mapping[str, Value]) -> dict[str, str | int]:
    return {f"firstclaim.{name}": value for name, value in attributes.items() if value is not None}
