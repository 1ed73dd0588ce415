"""POST /webhooks/stripe without stores: every answer byte for byte, and which requests never reach the pipeline."""

import asyncio
from collections.abc import AsyncIterator, MutableMapping
from functools import partial
from typing import Any, cast

import httpx
import orjson
import pytest
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.types import ASGIApp

from firstclaim import outcome
from firstclaim.event import Delivery
from firstclaim.inbox.pipeline import Pipeline
from firstclaim.outcome import Kind, Outcome
from firstclaim.web.answers import STATUS
from firstclaim.web.application import Application, refuse_path
from firstclaim.web.webhook import WEBHOOK_PATH, Webhook
from tests.fixtures import SECRET, event_body, signed

MAX_BODY_BYTES = 4096
BODY = event_body("balance.available", "evt_1")
REFUSE_PATH = partial(refuse_path, WEBHOOK_PATH)


class FakePipeline:
    """Returns the same outcome for every delivery, and keeps the deliveries."""

    def __init__(self, result: Outcome | None = None) -> None:
        self.result = result or outcome.processed("handled", 1)
        self.deliveries: list[Delivery] = []

    async def deliver(self, delivery: Delivery) -> Outcome:
        self.deliveries.append(delivery)
        return self.result


def webhook(pipeline: object) -> Webhook:
    return Webhook(cast(Pipeline, pipeline), [SECRET], 300, MAX_BODY_BYTES)


async def post(
    pipeline: object,
    content: bytes | AsyncIterator[bytes] = BODY,
    headers: dict[str, str] | list[tuple[str, str]] | None = None,
    *,
    method: str = "POST",
    path: str = WEBHOOK_PATH,
) -> httpx.Response:
    """One request through the same routes as the application's."""
    app = Starlette(
        routes=[Route(WEBHOOK_PATH, webhook(pipeline), methods=["POST"])],
        exception_handlers={404: REFUSE_PATH, 405: REFUSE_PATH},
    )
    if headers is None:
        headers = signed(content if isinstance(content, bytes) else b"")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as client:
        return await client.request(method, path, content=content, headers=headers)


def shape(response: httpx.Response) -> dict[str, Any]:
    """The answer's content. Fails unless it has exactly the four fields, in this order."""
    assert response.headers["content-type"] == "application/json"
    content: dict[str, Any] = orjson.loads(response.content)
    assert list(content) == ["event_id", "processed", "action", "reason"]
    assert isinstance(content["processed"], bool)
    assert isinstance(content["action"], str)
    return content


# -- outcomes -----------------------------------------------------------------------------------------


def test_every_kind_has_a_status() -> None:
    """`STATUS` has every kind of outcome, and only a 200 says `processed`."""
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
            outcome.settled("evt_1", "already completed"),
            200,
            b'{"event_id":"evt_1","processed":false,"action":"ignored","reason":"Event evt_1 already completed"}',
        ),
        (
            outcome.deferred("Recorded; still being processed"),
            202,
            b'{"event_id":"evt_1","processed":false,"action":"deferred","reason":"Recorded; still being processed"}',
        ),
        (
            outcome.failed(1),
            500,
            b'{"event_id":null,"processed":false,"action":"failed",'
            b'"reason":"The handler failed; the event will be retried"}',
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
    """Each outcome has its answer, byte for byte; errors name no event, and a 503 has a Retry-After."""
    response = await post(FakePipeline(result))
    assert (response.status_code, response.content) == (status, content)
    assert response.headers.get("retry-after") == ("5" if status == 503 else None)
    shape(response)


async def test_the_pipeline_gets_the_signed_bytes() -> None:
    """The pipeline gets the body as it was signed, byte for byte, and the event that was parsed from it."""
    pipeline = FakePipeline()
    body = b" \r\n" + BODY + b"\n"
    await post(pipeline, body)
    [delivery] = pipeline.deliveries
    assert (delivery.body, delivery.event.id) == (body, "evt_1")


async def test_a_delivery_is_plain_asgi(monkeypatch: pytest.MonkeyPatch) -> None:
    """A delivery makes no request, response or headers of Starlette's, and no task; its answer is two messages."""
    for name in ("requests.HTTPConnection", "responses.Response", "datastructures.Headers", "datastructures.URL"):
        monkeypatch.setattr(f"starlette.{name}.__init__", unexpected)
    application = Application({None: webhook(FakePipeline(outcome.duplicate("evt_1")))}, [], None)
    headers = [(name.lower().encode(), value.encode()) for name, value in signed(BODY).items()]
    loop = asyncio.get_running_loop()
    loop.set_task_factory(unexpected)
    try:
        status, content = await raw(headers, {"type": "http.request", "body": BODY}, application)
    finally:
        loop.set_task_factory(None)
    assert (status, orjson.loads(content)["reason"]) == (200, outcome.duplicate("evt_1").reason)


def unexpected(*_: object, **__: object) -> Any:
    """What a delivery must not make."""
    raise AssertionError


async def test_a_cancelled_delivery_is_a_503() -> None:
    """A delivery that the server cancels at shutdown is answered with 503, and its work continues in its own task."""

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


# -- rejections ---------------------------------------------------------------------------------------

REJECTED = b'{"event_id":null,"processed":false,"action":"rejected","reason":"%b"}'
SIGNATURE = b"Signature is missing, malformed, outside the tolerance, or does not match"


async def refused(*arguments: Any, **more: Any) -> httpx.Response:
    """The response to a request. Fails if the request reaches the pipeline."""
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
    """Every kind of bad signature gets the same generic answer, and does not reach the pipeline."""
    response = await refused(BODY, headers)
    assert (response.status_code, response.content) == (400, REJECTED % SIGNATURE)


async def test_the_signature_comes_before_the_content() -> None:
    """The sender of an unsigned body learns nothing about how it would be parsed."""
    response = await refused(b"\xff{", {"Stripe-Signature": "t=1,v1=00"})
    assert response.content == REJECTED % SIGNATURE


async def test_signed_garbage_is_a_400() -> None:
    """A valid signature over a body that is not an event is refused with a generic reason."""
    response = await refused(b"{")
    assert (response.status_code, response.content) == (400, REJECTED % b"body is not valid JSON")


async def test_a_body_of_the_maximum_size_is_accepted() -> None:
    """A body of exactly the maximum size is accepted, with or without a Content-Length."""
    body = BODY + b" " * (MAX_BODY_BYTES - len(BODY))
    for content in (body, pieces(body)):
        response = await post(FakePipeline(), content, signed(body))
        assert response.status_code == 200


async def test_a_body_declared_too_large_is_not_read() -> None:
    """A too large Content-Length is a 413 before the body is read, and the connection is closed."""
    read: list[bytes] = []

    async def body() -> AsyncIterator[bytes]:
        read.append(b"")
        yield b" "

    response = await refused(body(), {"Content-Length": str(MAX_BODY_BYTES + 1)})
    assert (response.status_code, response.headers["connection"]) == (413, "close")
    assert response.content == REJECTED % b"Body is larger than 4096 bytes"
    assert not read


async def test_a_long_body_is_cut_off() -> None:
    """A body without a Content-Length is read up to the maximum size, and no further."""
    sent = 0

    async def long() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(10 * MAX_BODY_BYTES // 1000):
            sent += 1000
            yield b" " * 1000

    response = await refused(long(), {})
    assert (response.status_code, response.headers["connection"]) == (413, "close")
    assert MAX_BODY_BYTES < sent <= MAX_BODY_BYTES + 2000


async def test_a_body_that_the_pipeline_refuses_is_a_400() -> None:
    """A body with an id that is no valid event, and whose event is not recorded, gets the reason of the pipeline."""

    class Refuses:
        async def deliver(self, given: Delivery) -> Outcome:
            given.parse()
            raise AssertionError

    response = await post(Refuses(), event_body(id="evt_1", created="yesterday"))
    reason = rb"\"created\" must be unix seconds or an ISO 8601 time"
    assert (response.status_code, response.content) == (400, REJECTED % reason)


@pytest.mark.parametrize("declared", [b"-1", b"1e3", b"", b"+5", b"0x10", b"\xb2", b"\xb9\xb3", b"9" * 5000, b"1, 1"])
async def test_an_odd_content_length_is_refused(declared: bytes) -> None:
    """A malformed Content-Length is a 413, also where int() would raise: a proxy in front of us may let it pass."""
    status, content = await raw([(b"content-length", declared)], {"type": "http.request", "body": BODY})
    assert (status, content) == (413, REJECTED % b"Body is larger than 4096 bytes")


async def test_a_client_that_disconnects_early_is_no_error() -> None:
    """A connection lost within the body ends the request without an error, and nothing is recorded."""
    pipeline = FakePipeline()
    status, _ = await raw([], {"type": "http.disconnect"}, webhook(pipeline))
    assert status == 400
    assert not pipeline.deliveries


async def test_a_shutdown_during_the_body_is_a_503() -> None:
    """A stalled upload that the server cancels at shutdown is answered with 503 and a Retry-After."""

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
async def test_a_wrong_path_or_method_is_rejected(method: str, path: str, status: int) -> None:
    """A wrong path or method gets the same JSON fields as every rejection, and a 405 keeps its header Allow."""
    response = await refused(method=method, path=path)
    assert (response.status_code, shape(response)["action"]) == (status, "rejected")
    assert ("allow" in response.headers) == (status == 405)


async def raw(
    headers: list[tuple[bytes, bytes]], message: dict[str, Any], application: ASGIApp | None = None
) -> tuple[int, bytes]:
    """The status and content of the answer to a request that no client would send, or whose server is watched."""

    async def receive() -> dict[str, Any]:
        return message

    sent: list[MutableMapping[str, Any]] = []

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": WEBHOOK_PATH, "headers": headers}
    await (application or webhook(FakePipeline()))(scope, receive, send)
    start, body = sent
    return start["status"], body["body"]


async def pieces(body: bytes) -> AsyncIterator[bytes]:
    """The body in pieces, and therefore without a Content-Length."""
    for place in range(0, len(body), 1000):
        yield body[place : place + 1000]
