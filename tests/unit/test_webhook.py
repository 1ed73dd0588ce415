"""POST /webhooks/stripe without stores: every answer byte for byte, and what never reaches the pipeline."""

import asyncio
from collections.abc import AsyncIterator, MutableMapping
from typing import Any, cast

import httpx
import orjson
import pytest
from starlette.applications import Starlette
from starlette.routing import Route

from firstclaim import outcome
from firstclaim.event import Delivery
from firstclaim.inbox.pipeline import Pipeline
from firstclaim.outcome import Kind, Outcome
from firstclaim.web.webhook import STATUS, WEBHOOK_PATH, Webhook, refuse_path
from tests.fixtures import SECRET, event_body, signed

BODY_MOST = 4096
BODY = event_body("balance.available", "evt_1")


class FakePipeline:
    """Answers every delivery with one outcome, and remembers what it was handed."""

    def __init__(self, result: Outcome | None = None) -> None:
        self.result = result or outcome.processed("handled", 1)
        self.deliveries: list[Delivery] = []

    async def deliver(self, delivery: Delivery) -> Outcome:
        self.deliveries.append(delivery)
        return self.result


def webhook(pipeline: object) -> Webhook:
    return Webhook(cast(Pipeline, pipeline), [SECRET], 300, BODY_MOST)


async def post(
    pipeline: object,
    content: bytes | AsyncIterator[bytes] = BODY,
    headers: dict[str, str] | list[tuple[str, str]] | None = None,
    *,
    method: str = "POST",
    path: str = WEBHOOK_PATH,
) -> httpx.Response:
    """One request through the routes as the application has them."""
    app = Starlette(
        routes=[Route(WEBHOOK_PATH, webhook(pipeline), methods=["POST"])],
        exception_handlers={404: refuse_path, 405: refuse_path},
    )
    if headers is None:
        headers = signed(content if isinstance(content, bytes) else b"")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as client:
        return await client.request(method, path, content=content, headers=headers)


def shape(response: httpx.Response) -> dict[str, Any]:
    """The answer's content, which has the four fields in this order and no other, whatever happened."""
    assert response.headers["content-type"] == "application/json"
    content: dict[str, Any] = orjson.loads(response.content)
    assert list(content) == ["event_id", "processed", "action", "reason"]
    assert isinstance(content["processed"], bool)
    assert isinstance(content["action"], str)
    return content


# -- outcomes -----------------------------------------------------------------------------------------


def test_every_kind_has_a_status() -> None:
    """The one table from outcomes to HTTP is complete, and `processed` goes with 200 only."""
    assert set(STATUS) == set(Kind)
    assert all(status == 200 for status, processed in STATUS.values() if processed)


@pytest.mark.parametrize(
    ("result", "status", "content"),
    [
        (
            outcome.processed("payment_failure_recorded", 1),
            200,
            b'{"event_id":"evt_1","processed":true,"action":"payment_failure_recorded","reason":null}',
        ),
        (
            outcome.unhandled("Event type balance.available not handled", 1),
            200,
            b'{"event_id":"evt_1","processed":true,"action":"ignored",'
            b'"reason":"Event type balance.available not handled"}',
        ),
        (
            outcome.duplicate("evt_1"),
            200,
            b'{"event_id":"evt_1","processed":false,"action":"ignored",'
            b'"reason":"Event evt_1 handled by parallel worker (idempotency lock)"}',
        ),
        (
            outcome.already("evt_1", "already completed"),
            200,
            b'{"event_id":"evt_1","processed":false,"action":"ignored","reason":"Event evt_1 already completed"}',
        ),
        (
            outcome.deferred("Recorded; still at work on it"),
            202,
            b'{"event_id":"evt_1","processed":false,"action":"deferred","reason":"Recorded; still at work on it"}',
        ),
        (
            outcome.failed(1),
            500,
            b'{"event_id":null,"processed":false,"action":"failed",'
            b'"reason":"The handler failed; the event is tried again"}',
        ),
        (
            outcome.dead("evt_1", 1),
            200,
            b'{"event_id":"evt_1","processed":false,"action":"dead","reason":"Event evt_1 is dead: replay it"}',
        ),
        (
            outcome.unavailable("The ledger cannot be reached"),
            503,
            b'{"event_id":null,"processed":false,"action":"unavailable","reason":"The ledger cannot be reached"}',
        ),
    ],
)
async def test_an_outcome_is_answered(result: Outcome, status: int, content: bytes) -> None:
    """Each outcome, byte for byte as protocol.md has it; errors name no event, a 503 says when to come again."""
    response = await post(FakePipeline(result))
    assert (response.status_code, response.content) == (status, content)
    assert response.headers.get("retry-after") == ("5" if status == 503 else None)
    shape(response)


async def test_the_pipeline_gets_the_very_bytes() -> None:
    """What is stored is what was signed, byte for byte, and the event parsed from it."""
    pipeline = FakePipeline()
    body = b" \r\n" + BODY + b"\n"
    await post(pipeline, body)
    [delivery] = pipeline.deliveries
    assert (delivery.body, delivery.event.id) == (body, "evt_1")


async def test_a_cancelled_delivery_promises_nothing() -> None:
    """The server gives up on its requests when it stops: 503, while the work goes on in a task of its own."""

    class Hangs:
        async def deliver(self, _: Delivery) -> Outcome:
            started.set()
            await asyncio.Event().wait()
            raise AssertionError

    started = asyncio.Event()
    request = asyncio.create_task(post(Hangs()))
    await started.wait()
    request.cancel()
    response = await request
    assert (response.status_code, shape(response)["reason"]) == (503, "Shutting down")


# -- refused ------------------------------------------------------------------------------------------

REJECTED = b'{"event_id":null,"processed":false,"action":"rejected","reason":"%b"}'
SIGNATURE = b"Signature is missing, malformed, outside the tolerance, or does not match"


async def refused(*arguments: Any, **more: Any) -> httpx.Response:
    """The response to a request that must not reach the pipeline."""
    pipeline = FakePipeline()
    response = await post(pipeline, *arguments, **more)
    assert not pipeline.deliveries
    assert (shape(response)["event_id"], shape(response)["processed"]) == (None, False)
    return response


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Stripe-Signature": ""},
        {"Stripe-Signature": "t=1,v1=00"},
        signed(BODY, "whsec_other"),
        signed(BODY + b" "),
        signed(BODY, at=1_000_000_000),
        signed(BODY, at=4_000_000_000),
        [*signed(BODY).items(), *signed(BODY).items()],
    ],
)
async def test_a_bad_signature_is_a_400(headers: Any) -> None:
    """Missing, empty, wrong, of another body, stale, future, given twice: one generic answer, nothing asked."""
    response = await refused(BODY, headers)
    assert (response.status_code, response.content) == (400, REJECTED % SIGNATURE)


async def test_the_signature_comes_before_the_content() -> None:
    """Unsigned garbage learns nothing about what we parse."""
    response = await refused(b"\xff{", {"Stripe-Signature": "t=1,v1=00"})
    assert response.content == REJECTED % SIGNATURE


async def test_signed_garbage_is_a_400() -> None:
    """A right signature over what is no event: refused with a generic reason."""
    response = await refused(b"{")
    assert (response.status_code, response.content) == (400, REJECTED % b"body is not valid JSON")


async def test_the_largest_body_is_taken() -> None:
    """Exactly the cap is not over it, declared or streamed."""
    body = BODY + b" " * (BODY_MOST - len(BODY))
    for content in (body, pieces(body)):
        response = await post(FakePipeline(), content, signed(body))
        assert response.status_code == 200


async def test_a_body_declared_too_large_is_not_read() -> None:
    """By its Content-Length alone it is a 413, and the connection ends: nobody reads the rest."""
    read: list[bytes] = []

    async def body() -> AsyncIterator[bytes]:
        read.append(b"")
        yield b" "

    response = await refused(body(), {"Content-Length": str(BODY_MOST + 1)})
    assert (response.status_code, response.headers["connection"]) == (413, "close")
    assert response.content == REJECTED % b"Body is larger than 4096 bytes"
    assert not read


async def test_a_long_body_is_cut_off() -> None:
    """Without a declared length it is read up to the cap, and no further."""
    sent = 0

    async def long() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(10 * BODY_MOST // 1000):
            sent += 1000
            yield b" " * 1000

    response = await refused(long(), {})
    assert (response.status_code, response.headers["connection"]) == (413, "close")
    assert BODY_MOST < sent <= BODY_MOST + 2000


@pytest.mark.parametrize("declared", [b"-1", b"1e3", b"", b"+5", b"0x10", b"\xb2", b"\xb9\xb3", b"9" * 5000, b"1, 1"])
async def test_an_odd_content_length_is_refused(declared: bytes) -> None:
    """Also what int() would raise for; a server in front of us may be more lenient than ours."""
    status, content = await raw([(b"content-length", declared)], {"type": "http.request", "body": BODY})
    assert (status, content) == (413, REJECTED % b"Body is larger than 4096 bytes")


async def test_a_client_that_hangs_up_early_is_no_error() -> None:
    """A connection lost within the body ends the request quietly: nothing is logged as broken, nothing recorded."""
    pipeline = FakePipeline()
    status, _ = await raw([], {"type": "http.disconnect"}, pipeline)
    assert status == 400
    assert not pipeline.deliveries


async def test_a_stop_during_the_body_is_a_503() -> None:
    """The server gives up on a stalled upload when it stops: the sender is told to come again."""

    async def stalls() -> AsyncIterator[bytes]:
        yield BODY[:10]
        started.set()
        await asyncio.Event().wait()

    started = asyncio.Event()
    request = asyncio.create_task(refused(stalls(), {}))
    await started.wait()
    request.cancel()
    response = await request
    assert (response.status_code, response.headers["retry-after"]) == (503, "5")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", WEBHOOK_PATH, 405), ("PUT", WEBHOOK_PATH, 405), ("POST", "/", 404), ("POST", WEBHOOK_PATH + "s", 404)],
)
async def test_another_place_is_refused_in_the_same_shape(method: str, path: str, status: int) -> None:
    """A wrong path or method is told so in the one shape; 405 keeps its Allow."""
    response = await refused(method=method, path=path)
    assert (response.status_code, shape(response)["action"]) == (status, "rejected")
    assert ("allow" in response.headers) == (status == 405)


async def raw(
    headers: list[tuple[bytes, bytes]], message: dict[str, Any], pipeline: object = None
) -> tuple[int, bytes]:
    """The status and content for a request that no well-behaved client would send."""

    async def receive() -> dict[str, Any]:
        return message

    sent: list[MutableMapping[str, Any]] = []

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    await webhook(pipeline or FakePipeline())({"type": "http", "method": "POST", "headers": headers}, receive, send)
    start, body = sent
    return start["status"], body["body"]


async def pieces(body: bytes) -> AsyncIterator[bytes]:
    """In pieces, so without a Content-Length."""
    for place in range(0, len(body), 1000):
        yield body[place : place + 1000]
