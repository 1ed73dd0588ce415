"""What comes before the webhook: raw sockets against the server's own protocol, over real TCP."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import orjson
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from service.web import door
from service.web.door import Door
from service.web.health import livez

GET = b"GET /livez HTTP/1.1\r\nHost: x\r\n"


async def _echo_length(request: Request) -> Response:
    return Response(str(len(await request.body())))


@asynccontextmanager
async def _served() -> AsyncIterator[int]:
    """The port of a server that speaks through the door."""
    app = Starlette(routes=[Route("/livez", livez), Route("/length", _echo_length, methods=["POST"])])
    config = uvicorn.Config(app, port=0, http=Door, ws="none", lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    config.load()
    server.lifespan = config.lifespan_class(config)
    await server.startup()
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        await server.shutdown()


async def _say(port: int, *chunks: bytes) -> bytes:
    """Send the chunks and read until the server closes, five seconds at most."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for chunk in chunks:
            writer.write(chunk)
        async with asyncio.timeout(5):
            return await reader.read()
    finally:
        writer.close()


def _refusal(answer: bytes) -> tuple[int, str]:
    """Status and reason; fails unless the body has the one JSON shape and the connection is to be closed."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"connection: close" in head
    fields = orjson.loads(body)
    reason = fields.pop("reason")
    assert fields == {"event_id": None, "processed": False, "action": "rejected"}
    return int(head.split(b" ")[1]), reason


async def test_a_request_passes() -> None:
    """An ordinary request, and a second one on its connection, are answered as ever."""
    async with _served() as port:
        answer = await _say(port, GET + b"\r\n", GET + b"Connection: close\r\n\r\n")
    assert answer.count(b"HTTP/1.1 200 OK") == 2


async def test_a_head_in_pieces_and_a_large_body_pass() -> None:
    """Only the head is counted: it may come byte by byte, and the body behind it may be larger than any head."""
    head = b"POST /length HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 300000\r\n\r\n"
    async with _served() as port:
        answer = await _say(port, *(bytes([byte]) for byte in head), b"x" * 300_000)
    assert answer.endswith(b"\r\n\r\n300000")


@pytest.mark.parametrize("size", [door.HEAD_MOST_BYTES, 1_000_000])
async def test_a_head_too_large_is_refused(size: int) -> None:
    """One byte over the cap or a megabyte, in one header: 431, and the connection is closed."""
    async with _served() as port:
        try:
            answer = await _say(port, GET + b"X: " + b"a" * size + b"\r\n\r\n")
        except ConnectionError:  # closed while we were still sending
            assert size == 1_000_000
            return
    assert _refusal(answer) == (431, "Headers are too large")


@pytest.mark.parametrize("sent", [b"", b"GET /li", GET], ids=["nothing", "half a line", "half a head"])
async def test_a_slow_head_is_refused(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket that never finishes its head, or never begins, is told so and closed."""
    monkeypatch.setattr(door, "HEAD_SECONDS", 0.05)
    async with _served() as port:
        assert _refusal(await _say(port, sent)) == (408, "Headers took too long to arrive")


async def test_a_later_head_has_its_deadline_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Having sent one request buys no time for the next."""
    monkeypatch.setattr(door, "HEAD_SECONDS", 0.2)
    async with _served() as port:
        answer = await _say(port, GET + b"\r\n", b"GET /livez")
    assert answer.count(b"HTTP/1.1 200 OK") == 1
    assert _refusal(answer[answer.index(b"HTTP/1.1 408") :])[0] == 408


@pytest.mark.parametrize(
    "sent",
    [
        b"nonsense\r\n\r\n",
        b"POST /length HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /length HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"POST /length HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
    ],
    ids=["no HTTP", "two framings", "two lengths", "negative length"],
)
async def test_what_cannot_be_framed_is_refused(sent: bytes) -> None:
    """What has no one meaning is answered 400 in the one shape, and nothing behind it is read."""
    async with _served() as port:
        assert _refusal(await _say(port, sent)) == (400, "Malformed HTTP request")
