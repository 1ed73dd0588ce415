"""The spans and the metrics of real processes, as an OTLP collector receives them."""

import asyncio
import gzip
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httptools
import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from opentelemetry.proto.trace.v1.trace_pb2 import Status as SpanStatus

from firstclaim.status import Status
from tests.acceptance.harness import (
    DEAD,
    DEFERRED,
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
from tests.acceptance.test_metrics import scraped
from tests.fixtures import signed
from tests.proxy import Mode, before_redis

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


Series = tuple[str, ...]  # the name, and the values of the labels


@dataclass(slots=True)
class Collector:
    """Receives the exported spans and metrics."""

    port: int = 0
    spans: list[Span] = field(default_factory=list)
    metrics: dict[str, dict[Series, float]] = field(default_factory=dict)  # the last ones, by instance
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
            if request.path == b"/v1/metrics":
                self.receive_metrics(ExportMetricsServiceRequest.FromString(body))
            else:
                self.receive_spans(ExportTraceServiceRequest.FromString(body))
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        writer.close()

    def receive_spans(self, request: ExportTraceServiceRequest) -> None:
        for resource in request.resource_spans:
            self.services.add(attributes(resource.resource)["service.name"])
            self.spans += [span for scope in resource.scope_spans for span in scope.spans]

    def receive_metrics(self, request: ExportMetricsServiceRequest) -> None:
        for resource in request.resource_metrics:
            about = attributes(resource.resource)
            assert about["service.name"] == "firstclaim"
            received = self.metrics.setdefault(about["service.instance.id"], {})
            for metric in (metric for scope in resource.scope_metrics for metric in scope.metrics):
                received.update(values(metric))

    async def of(self, event_id: str, wanted: int) -> dict[str, Span]:
        """The spans of that event's trace by name, once there are `wanted` of them."""

        async def found() -> list[Span]:
            about = [span for span in self.spans if text(span).get("event_id") == event_id]
            return [span for span in self.spans if about and span.trace_id == about[-1].trace_id]

        spans = await eventually(found, lambda spans: len(spans) == wanted)
        return {span.name.removeprefix("firstclaim."): span for span in spans}


def attributes(of: Resource) -> dict[str, str]:
    """Those of a resource that are strings."""
    return {each.key: each.value.string_value for each in of.attributes}


def values(metric: Metric) -> dict[Series, float]:
    """The value of each series as `/metrics` names it. A histogram has its count, its sum and its buckets."""
    found: dict[Series, float] = {}
    for histogram in metric.histogram.data_points:
        labels = [each.value.string_value for each in histogram.attributes]
        found[f"{metric.name}_count", *labels] = histogram.count
        found[f"{metric.name}_sum", *labels] = histogram.sum
        bounds = [*map(str, histogram.explicit_bounds), "+Inf"]
        for number, bound in enumerate(bounds):
            found[f"{metric.name}_bucket", *labels, bound] = sum(histogram.bucket_counts[: number + 1])
    for point in [*metric.sum.data_points, *metric.gauge.data_points]:
        found[metric.name, *(each.value.string_value for each in point.attributes)] = point.as_double
    assert not metric.sum.data_points or (metric.sum.is_monotonic and metric.name.endswith("_total"))
    return found


class _Request:
    """Callbacks for httptools."""

    def __init__(self) -> None:
        self.path = b""
        self.body = b""
        self.complete = False

    def on_url(self, url: bytes) -> None:
        self.path = url

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
    """A failed attempt is marked with the error's class only. Recovery's trace links to that of the delivery."""
    async with collecting() as collector:
        service = await sandbox.service(exporting(collector.port)).start()
        event = sample("fail", until=1)
        assert (await sandbox.deliver(service, event)).result == FAILED
        await sandbox.settled(event)
        assert await service.stop() == 0
    failed, good = [span for span in collector.spans if span.name == "firstclaim.attempt"]
    assert (failed.status.code, failed.status.message) == (SpanStatus.STATUS_CODE_ERROR, "RuntimeError")
    assert good.status.code == SpanStatus.STATUS_CODE_UNSET
    [recovered] = [span for span in collector.spans if span.name == "firstclaim.recovered"]
    assert (good.trace_id, good.parent_span_id) == (recovered.trace_id, recovered.span_id)
    assert text(recovered) == {"event_id": event.id, "attempt": "2", "outcome": "processed"}
    assert recovered.trace_id != failed.trace_id
    assert [link.trace_id for link in recovered.links] == [failed.trace_id]
    [claimed] = [span for span in collector.spans if span.name == "firstclaim.claim"]
    assert [link.span_id for link in recovered.links] == [claimed.span_id]
    assert b"invoice.payment_failed" in collector.raw
    assert b"metadata" not in collector.raw
    assert b"told to fail" not in collector.raw


@pytest.mark.parametrize("sampled", [True, False])
async def test_another_process_links_to_the_delivery(sandbox: Sandbox, sampled: bool) -> None:
    """What one process records and another one dispatches has a link to the delivery's trace, if that was sampled."""
    event = sample()
    async with collecting() as collector, before_redis(sandbox.redis_url) as (redis, redis_url):
        first = await sandbox.service(exporting(collector.port) | {"REDIS_URL": redis_url}).start()
        redis.switch(Mode.REFUSE)
        headers = signed(event.body) | {"traceparent": f"00-{TRACE}-{PARENT}-0{int(sampled)}"}
        assert (await post(first.url, event.body, list(headers.items()))).result == DEFERRED
        assert await first.stop() == 0
        second = await sandbox.service(exporting(collector.port)).start()
        await sandbox.settled(event, Status.COMPLETED)
        assert await second.stop() == 0
    [recovered] = [span for span in collector.spans if span.name == "firstclaim.recovered"]
    assert [link.trace_id.hex() for link in recovered.links] == ([TRACE] if sampled else [])


async def test_an_untraced_delivery_leaves_no_trace_in_the_ledger(sandbox: Sandbox) -> None:
    """Without a destination for spans, nothing is written to the ledger, whatever the header says."""
    service = await sandbox.service().start()
    event = sample()
    headers = signed(event.body) | {"traceparent": f"00-{TRACE}-{PARENT}-01"}
    assert (await post(service.url, event.body, list(headers.items()))).result == PROCESSED
    [row] = await sandbox.fetch("SELECT traceparent FROM firstclaim.stripe_event_payloads")
    assert row["traceparent"] is None


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
    assert (collector.spans, collector.metrics) == ([], {})


# -- metrics --------------------------------------------------------------------------------------------------

QUICK_EXPORT: Overrides = {"OTEL_METRIC_EXPORT_INTERVAL": "100"}


async def test_the_metrics_are_those_of_a_scrape(sandbox: Sandbox) -> None:
    """Every series of `/metrics` is exported with its name, its labels and its value."""
    async with collecting() as collector:
        service = await sandbox.service(exporting(collector.port) | QUICK_EXPORT).start()
        assert (await sandbox.deliver(service, sample())).result == PROCESSED
        assert (await sandbox.deliver(service, sample("permanent"))).result == DEAD

        async def exported() -> dict[Series, float]:
            return next(iter(collector.metrics.values()), {})

        dead = ("firstclaim_attempts_total", "invoice.payment_failed", "dead")
        last = ("firstclaim_last_event_seconds",)  # read again when its cache expires: 20 times as long as a read took
        seen = await eventually(exported, lambda series: series.get(dead) == 1 and last in series, seconds=90)
        assert still(seen) == still(await scraped(service))
        assert seen["firstclaim_handler_seconds_count", "invoice.payment_failed", "completed"] == 1


def still(series: dict[Series, float]) -> dict[Series, float]:
    """The series, with the values of those that do not move by themselves. The order of labels means nothing."""
    moving = re.compile(r"recovery_rounds|last_event_seconds|^firstclaim_events$")
    return {(key[0], *sorted(key[1:])): 0 if moving.search(key[0]) else value for key, value in series.items()}


async def test_each_worker_exports_its_own_counts(sandbox: Sandbox) -> None:
    """The workers are instances, whose counts and slots add up; what they count last is sent when they stop."""
    async with collecting() as collector:
        service = await sandbox.service(exporting(collector.port), workers=2).start()
        for _ in range(20):
            assert (await sandbox.deliver(service, sample())).result == PROCESSED
        assert await service.stop() == 0
    counts = [series["firstclaim_deliveries_total", "processed"] for series in collector.metrics.values()]
    assert (len(counts), sum(counts)) == (2, 20)


async def test_metrics_can_be_left_out(sandbox: Sandbox) -> None:
    """With OpenTelemetry's variable for it, spans are exported and metrics are not."""
    async with collecting() as collector:
        none: Overrides = {"OTEL_METRICS_EXPORTER": "none"}
        service = await sandbox.service(exporting(collector.port) | QUICK_EXPORT | none).start()
        assert (await sandbox.deliver(service, sample())).result == PROCESSED
        assert await service.stop() == 0
    assert collector.spans
    assert collector.metrics == {}
