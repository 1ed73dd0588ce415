"""The spans of a real process, as an OTLP collector receives them."""

import asyncio
import gzip
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httptools
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from tests.acceptance.harness import (
    FAILED,
    IGNORED,
    PROCESSED,
    PYTHON_PATH,
    Overrides,
    Sandbox,
    eventually,
    post,
    sample,
)
from tests.fixtures import signed

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@dataclass(slots=True)
class Collector:
    """Receives the exported spans."""

    port: int = 0
    spans: list[Span] = field(default_factory=list)
    services: set[str] = field(default_factory=set)
    raw: bytes = b""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = _Request()
        parser = httptools.HttpRequestParser(request)
        while not request.complete and (chunk := await reader.read(65_536)):
            parser.feed_data(chunk)
        if request.complete:
            body = gzip.decompress(request.body) if request.body[:2] == b"\x1f\x8b" else request.body
            self.raw += body
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                self.services |= {a.value.string_value for a in resource.resource.attributes if a.key == "service.name"}
                self.spans += [span for scope in resource.scope_spans for span in scope.spans]
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        writer.close()

    async def of(self, event_id: str, wanted: int) -> dict[str, Span]:
        """The spans of that event's trace by name, once there are `wanted` of them."""

        async def found() -> list[Span]:
            about = [span for span in self.spans if text(span).get("event_id") == event_id]
            return [span for span in self.spans if about and span.trace_id == about[-1].trace_id]

        spans = await eventually(found, lambda spans: len(spans) == wanted)
        return {span.name.removeprefix("firstclaim."): span for span in spans}


class _Request:
    """Callbacks for httptools."""

    def __init__(self) -> None:
        self.body = b""
        self.complete = False

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.complete = True


def text(span: Span) -> dict[str, str]:
    """The span's attributes."""
    return {
        each.key.removeprefix("firstclaim."): each.value.string_value or str(each.value.int_value)
        for each in span.attributes
    }


@asynccontextmanager
async def collecting() -> AsyncIterator[Collector]:
    """A collector on a port of its own."""
    collector = Collector()
    server = await asyncio.start_server(collector.serve, "127.0.0.1", 0)
    collector.port = server.sockets[0].getsockname()[1]
    async with server:
        yield collector


def exporting(port: int) -> Overrides:
    """Settings that export spans to this port, with a short batch delay."""
    return {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}", "OTEL_BSP_SCHEDULE_DELAY": "50"}


async def test_the_path_of_a_delivery_is_a_trace(sandbox: Sandbox) -> None:
    """Lock, claim, attempt and handler are spans below the proxy's span; a duplicate's trace has only the lock."""
    async with collecting() as collector:
        service = await sandbox.service(exporting(collector.port)).start()
        event = sample()
        headers = signed(event.body) | {"traceparent": f"00-{TRACE}-{PARENT}-01"}
        assert (await post(service.url, event.body, list(headers.items()))).result == PROCESSED
        spans = await collector.of(event.id, 5)
        assert spans.keys() == {"delivery", "lock", "claim", "attempt", "handler"}
        assert {span.trace_id.hex() for span in spans.values()} == {TRACE}
        parents = {name: span.parent_span_id for name, span in spans.items()}
        delivery, attempt = spans["delivery"].span_id, spans["attempt"].span_id
        assert parents == {
            "delivery": bytes.fromhex(PARENT),
            "lock": delivery,
            "claim": delivery,
            "attempt": delivery,
            "handler": attempt,
        }
        assert text(spans["delivery"]) == {
            "event_id": event.id,
            "type": "invoice.payment_failed",
            "outcome": "processed",
            "attempt": "1",
        }
        assert text(spans["handler"]) == {"handler": "invoice.payment_failed"}
        assert (await sandbox.deliver(service, event)).result == IGNORED
        assert collector.services == {"firstclaim"}
        assert await service.stop() == 0
        about = [span for span in collector.spans if text(span).get("outcome") == "duplicate"]
        assert [len([s for s in collector.spans if s.trace_id == span.trace_id]) for span in about] == [2]


async def test_a_span_has_only_the_class_of_an_error(sandbox: Sandbox) -> None:
    """A failed attempt is marked with the error's class only, and recovery's attempt has a trace of its own."""
    async with collecting() as collector:
        service = await sandbox.service(exporting(collector.port)).start()
        event = sample("fail", until=1)
        assert (await sandbox.deliver(service, event)).result == FAILED
        await sandbox.settled(event)
        assert await service.stop() == 0
    failed, good = [span for span in collector.spans if span.name == "firstclaim.attempt"]
    assert (failed.status.code, failed.status.message) == (Status.STATUS_CODE_ERROR, "RuntimeError")
    assert good.status.code == Status.STATUS_CODE_UNSET
    [recovered] = [span for span in collector.spans if span.name == "firstclaim.recovered"]
    assert (good.trace_id, good.parent_span_id) == (recovered.trace_id, recovered.span_id)
    assert text(recovered) == {"event_id": event.id, "attempt": "2", "outcome": "processed"}
    assert b"invoice.payment_failed" in collector.raw
    assert b"metadata" not in collector.raw
    assert b"told to fail" not in collector.raw


async def test_an_unreachable_collector_delays_nothing(sandbox: Sandbox, unused_tcp_port: int) -> None:
    """With an unreachable collector, deliveries are processed as usual, and the shutdown does not wait for it."""
    service = await sandbox.service(exporting(unused_tcp_port)).start()
    assert (await sandbox.deliver(service, sample())).result == PROCESSED
    async with asyncio.timeout(10):
        assert await service.stop() == 0


async def test_without_the_package_there_are_no_spans(sandbox: Sandbox) -> None:
    """Without the package OpenTelemetry the service works as usual, even if its variables are set."""
    (sandbox.folder / "opentelemetry.py").write_text("raise ImportError('not installed')\n")
    async with collecting() as collector:
        path: Overrides = {"PYTHONPATH": f"{sandbox.folder}:{PYTHON_PATH}"}
        service = await sandbox.service(exporting(collector.port) | path).start()
        assert (await sandbox.deliver(service, sample())).result == PROCESSED
        assert await service.stop() == 0
    assert collector.spans == []
