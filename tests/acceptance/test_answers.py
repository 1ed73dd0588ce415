"""What the endpoint refuses, and how: one shape of answer, a generic reason, and no row for anything refused."""

import asyncio
import time
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import httpx
import orjson
import pytest
import pytest_asyncio

from tests.acceptance.harness import REJECTED, Ground, Service, post, raw_request
from tests.fixtures import event_body, signed

MEBIBYTE = 1024 * 1024


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(shared_ground: Ground) -> Service:
    """One service for the whole module."""
    return await shared_ground.service().start()


@pytest_asyncio.fixture(autouse=True)
async def no_row_is_written(shared_ground: Ground) -> AsyncIterator[None]:
    """Nothing that is sent here may leave a row behind."""
    yield
    assert await shared_ground.rows() == 0


def without(name: str) -> bytes:
    """An event that lacks a field."""
    event = orjson.loads(event_body())
    del event[name]
    return orjson.dumps(event)


BODY = event_body()
GOOD = signed(BODY)["Stripe-Signature"]
NOW = int(time.time())


@pytest.mark.parametrize(
    "signature",
    [
        pytest.param(None, id="missing"),
        pytest.param("", id="empty"),
        pytest.param("nonsense", id="malformed"),
        pytest.param(signed(BODY, secret="whsec_another")["Stripe-Signature"], id="another secret"),
        pytest.param(signed(BODY, at=NOW - 3600)["Stripe-Signature"], id="stale"),
        pytest.param(signed(BODY, at=NOW + 3600)["Stripe-Signature"], id="future"),
        pytest.param(signed(BODY + b" ")["Stripe-Signature"], id="another body"),
        pytest.param(GOOD.replace("v1=", "v0="), id="only v0"),
        pytest.param(GOOD + ",v1=00" * 40, id="too many"),
        pytest.param(GOOD + ",v1=\u00e9", id="not ASCII"),
    ],
)
async def test_a_bad_signature_is_rejected(signature: str | None, service: Service) -> None:
    """Whatever is wrong with a signature, the answer is one generic 400."""
    answer = await post(service.url, BODY, [] if signature is None else [("Stripe-Signature", signature)])
    assert answer.said == REJECTED
    assert answer.content["event_id"] is None
    assert answer.reason == "Signature is missing, malformed, outside the tolerance, or does not match"


async def test_two_signature_headers_are_rejected(service: Service) -> None:
    """Exactly one header: a second one, even if the first is good, could have been read by somebody else."""
    answer = await post(service.url, BODY, [("Stripe-Signature", GOOD), ("Stripe-Signature", GOOD)])
    assert answer.said == REJECTED


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"not json", id="not JSON"),
        pytest.param(b"[]", id="no object"),
        pytest.param(b"\xef\xbb\xbf{}", id="byte order mark"),
        pytest.param(b'{"id": "\xff"}', id="not UTF-8"),
        pytest.param(b"[" * 100_000, id="deep"),
        pytest.param(event_body(object="charge"), id="no event"),
        pytest.param(without("id"), id="no id"),
        pytest.param(without("type"), id="no type"),
        pytest.param(without("created"), id="no created"),
        pytest.param(event_body(livemode="yes"), id="livemode is no boolean"),
        pytest.param(event_body(created="yesterday"), id="created is no instant"),
        pytest.param(event_body(data={"object": "in_1"}), id="data.object is no object"),
        pytest.param(event_body().replace(b'"evt_', b'"evt\\u0000_', 1), id="NUL in the id"),
        pytest.param(event_body().replace(b'"evt_', b'"evt\\ud800_', 1), id="lone surrogate in the id"),
        pytest.param(event_body().replace(b'"evt_', b'"' + b"x" * 300 + b"evt_", 1), id="long id"),
        pytest.param(event_body().replace(b'"livemode":false', b'"livemode":NaN', 1), id="NaN"),
    ],
)
async def test_signed_content_that_is_no_event_is_rejected(body: bytes, service: Service) -> None:
    """A good signature over anything but an event is a 400 that repeats none of it."""
    answer = await post(service.url, body)
    assert answer.said == REJECTED
    assert answer.content["event_id"] is None
    assert "evt" not in (answer.reason or "")


async def test_a_body_over_the_cap_is_refused(service: Service) -> None:
    """One byte over 1 MiB: 413, its sender gets to read that, and the connection is closed."""
    answer = await post(service.url, b" " * (MEBIBYTE + 1))
    assert (answer.status, answer.content["action"]) == (413, "rejected")
    assert answer.headers["connection"] == "close"


async def test_a_body_far_over_the_cap_is_not_read(service: Service) -> None:
    """A Content-Length of 100 GB: 413 before a byte of it was sent."""
    head = f"POST {urlsplit(service.url).path} HTTP/1.1\r\nHost: x\r\nContent-Length: {100 * 1024**3}\r\n\r\n"
    answer = await raw_request(service.url, head.encode())
    assert (answer.status, answer.content["action"]) == (413, "rejected")


async def test_chunks_over_the_cap_are_refused(service: Service) -> None:
    """Chunks without a declared length: 413 once they are more than 1 MiB."""
    head = f"POST {urlsplit(service.url).path} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunk = b"10000\r\n" + b" " * 65_536 + b"\r\n"
    answer = await raw_request(service.url, head.encode() + chunk * 16 + b"1\r\n \r\n0\r\n\r\n")
    assert (answer.status, answer.content["action"]) == (413, "rejected")


async def test_a_body_at_the_cap_is_read(service: Service) -> None:
    """Exactly 1 MiB is read to its end: the cap is not a byte tighter than it says."""
    answer = await post(service.url, b" " * (MEBIBYTE - 2) + b"[]")
    assert answer.said == REJECTED
    assert "body is not an event" in (answer.reason or "")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/webhooks/stripe", 405),
        ("PUT", "/webhooks/stripe", 405),
        ("POST", "/webhooks/stripe/", 404),  # no redirect: to Stripe it would be a failed delivery
        ("POST", "/webhooks/Stripe", 404),
        ("POST", "/", 404),
        ("POST", "/readyz", 405),
    ],
)
async def test_other_paths_and_methods_are_refused(method: str, path: str, status: int, service: Service) -> None:
    """Any other path is 404, any other method 405, neither redirects, and both have the one shape of answer."""
    response = await service.request(method, path, BODY if method != "GET" else b"")
    assert response.status_code == status
    assert response.json()["action"] == "rejected"
    assert "location" not in response.headers
    if path == "/webhooks/stripe":
        assert response.headers["allow"] == "POST"


async def test_a_connection_survives_a_rejection(service: Service) -> None:
    """After a 400 the same connection takes the next delivery: Stripe keeps its connections."""
    async with httpx.AsyncClient(trust_env=False, verify=False, limits=httpx.Limits(max_connections=1)) as client:  # noqa: S501
        for _ in range(3):
            response = await client.post(service.url, content=b"{}", headers=signed(b"{}"))
            assert response.status_code == 400
            assert "connection" not in response.headers


async def test_pipelined_garbage_does_not_harm_the_service(service: Service) -> None:
    """Bytes that are no HTTP end their own connection and nobody else's."""
    for garbage in (b"\x16\x03\x01\x02\x00\x01\x00", b"GET\r\n\r\n", b"POST / HTTP/1.1\r\nContent-Length: x\r\n\r\n"):
        parts = urlsplit(service.url)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        writer.write(garbage)
        async with asyncio.timeout(10):
            assert (await reader.read()).startswith(b"HTTP/1.1 400")
        writer.close()
        await writer.wait_closed()
    assert (await service.parts())[0] == 200
