"""The server's HTTP protocol, tested with raw connections over real TCP."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import orjson
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from firstclaim.inbox.slots import Slots
from firstclaim.server import protocol
from firstclaim.server.connection_limiter import ConnectionLimiter
from firstclaim.server.protocol import HttpProtocol
from firstclaim.web import answers
from firstclaim.web.answers import WHOLE_ANSWER, Answer
from firstclaim.web.health import Liveness
from tests.raw_connection import RawConnection

GET = b"GET /livez HTTP/1.1\r\nHost: x\r\n"
POST = b"POST /headers HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
ROOMY = (1000, 10**8)
_HEADERS = ((b"content-length", b"2"), (b"retry-after", b"5"))


@dataclass
class Served:
    """A running server that uses our protocol."""

    server: uvicorn.Server
    gate: asyncio.Event = field(default_factory=asyncio.Event)  # `/held` waits for it
    held: int = 0
    connections: list[RawConnection] = field(default_factory=list)

    @property
    def port(self) -> int:
        port: int = self.server.servers[0].sockets[0].getsockname()[1]
        return port

    @property
    def sockets(self) -> int:
        """The number of open sockets."""
        return len(self.server.server_state.connections)

    @property
    def tasks(self) -> int:
        """The number of requests in progress."""
        return len(self.server.server_state.tasks)

    @property
    def answered(self) -> int:
        """The number of answered requests."""
        return self.server.server_state.total_requests

    async def connect(self, *chunks: bytes) -> RawConnection:
        """A connection to the server, on which the chunks were sent."""
        connection = await RawConnection.open(self.port, *chunks)
        self.connections.append(connection)
        return connection

    async def hold(self, _request: Request) -> Response:
        self.held += 1
        await self.gate.wait()
        return Response("held")


async def _headers(request: Request) -> Response:
    try:
        body = await request.body()
    except ClientDisconnect:
        return Response(status_code=400)
    return Response(orjson.dumps([len(body), dict(request.headers)]))


async def _large(_request: Request) -> Response:
    return Response(b"x" * 60_000)


async def _larger_than_buffers(_request: Request) -> Response:
    return Response(b"x" * 400_000)


@asynccontextmanager
async def _served(
    max_connections: int = ROOMY[0], max_bytes: int = ROOMY[1], body_seconds: float = 60
) -> AsyncIterator[Served]:
    app = Starlette(routes=[Route("/livez", Liveness(Slots(1)).report), Route("/headers", _headers, methods=["POST"])])
    protocol = cast(
        type[asyncio.Protocol], partial(HttpProtocol, ConnectionLimiter(max_connections, max_bytes), body_seconds)
    )
    config = uvicorn.Config(app, port=0, http=protocol, ws="none", lifespan="off", log_config=None)
    served = Served(uvicorn.Server(config))
    app.add_route("/held", served.hold, methods=["GET", "POST"])
    app.add_route("/large", _large)
    app.router.routes.append(Route("/whole", Answer(202, b"{}", _HEADERS)))
    app.router.routes.append(Route("/last", Answer(202, b"{}", (*_HEADERS, (b"connection", b"close")))))
    app.router.routes.append(Route("/large-whole", Answer(200, b"x" * 60_000, ((b"content-length", b"60000"),))))
    app.add_route("/larger-than-buffers", _larger_than_buffers)
    config.load()
    served.server.lifespan = config.lifespan_class(config)
    await served.server.startup()
    try:
        yield served
    finally:
        served.gate.set()
        for connection in served.connections:
            connection.abort()
        await served.server.shutdown()


async def _exchange(served: Served, *chunks: bytes) -> bytes:
    """Send the chunks, and read until the server closes."""
    return await (await served.connect(*chunks)).rest()


async def _refusal(served: Served, *chunks: bytes) -> tuple[int, str]:
    return await (await served.connect(*chunks)).refusal()


async def _until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not holds():  # noqa: ASYNC110  (no event to wait for)
            await asyncio.sleep(0.005)


async def _until_cut(send: Callable[[], Awaitable[None]]) -> None:
    """Send again and again, until the server has closed the connection."""
    async with asyncio.timeout(10):
        with suppress(ConnectionError):
            while True:
                await send()
                await asyncio.sleep(0.01)


TOO_LARGE = (431, "Headers are too large")
TOO_SLOW = (408, "Headers took too long to arrive")
BODY_TOO_SLOW = (408, "Body took too long to arrive")
MALFORMED = (400, "Malformed HTTP request")
OVERLOADED = (503, "Too many connections")


# -- accepted requests --------------------------------------------------------------------------------


async def test_a_request_passes() -> None:
    """An ordinary request, and a second one on the same connection, are answered."""
    async with _served() as served:
        connection = await served.connect(GET + b"\r\n")
        assert (await connection.reply()).status == 200
        await connection.send(b"\r\n" + GET + b"Connection: close\r\n\r\n")  # an empty line before it is allowed
        assert (await connection.rest()).startswith(b"HTTP/1.1 200 OK")


async def test_a_head_in_pieces_and_a_large_body_pass() -> None:
    """The limit counts only the head: it may come byte by byte, and a larger body may follow it."""
    head = POST + b"Content-Length: 300000\r\n\r\n"
    async with _served() as served:
        answer = await _exchange(served, *(bytes([byte]) for byte in head), b"x" * 300_000)
    assert b"\r\n\r\n[300000," in answer


async def test_a_large_body_in_small_chunks_passes() -> None:
    """Chunk framing may add up to more than the limit of a head, because it is not counted as a head."""
    async with _served() as served:
        answer = await _exchange(served, CHUNKED, *[b"1\r\nx\r\n" * 1000] * 20, b"0\r\n\r\n")
    assert b"\r\n\r\n[20000," in answer


class _Recorder:
    """A transport that notes what is written to it."""

    def __init__(self, transport: asyncio.Transport, written: list[bytes]) -> None:
        self._transport, self._written = transport, written

    def write(self, data: bytes) -> None:
        self._written.append(data)
        self._transport.write(data)

    def __getattr__(self, name: str) -> object:
        return getattr(self._transport, name)


@pytest.mark.parametrize("last", [b"\r\n", b"Connection: close\r\n\r\n"])
async def test_an_answer_is_sent_in_one_piece(last: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Head and body take one write, and so one system call and one packet."""
    written: list[bytes] = []
    made = HttpProtocol.connection_made
    monkeypatch.setattr(
        HttpProtocol,
        "connection_made",
        lambda given, transport: made(given, cast(asyncio.Transport, _Recorder(transport, written))),
    )
    async with _served() as served:
        reply = await (await served.connect(GET + last)).reply()
    [sent] = written
    assert sent.startswith(b"HTTP/1.1 200 OK\r\n")
    assert sent.endswith(reply.body)


@pytest.mark.parametrize("extension", [WHOLE_ANSWER, "of another server"])
@pytest.mark.parametrize("path", ["whole", "last"])
@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("asked", [b"", b"Connection: close\r\n", b"Connection: keep-alive\r\n"])
async def test_a_whole_answer_is_that_of_two_messages(
    monkeypatch: pytest.MonkeyPatch, extension: str, path: str, version: str, asked: bytes
) -> None:
    """An answer that is sent in one step has the same headers, and closes the connection in the same cases."""
    monkeypatch.setattr(answers, "WHOLE_ANSWER", extension)
    kept = path == "whole" and version == "1.1" and b"close" not in asked
    async with _served() as served:
        served.server.server_state.default_headers = [(b"date", b"now")]
        connection = await served.connect(f"GET /{path} HTTP/{version}\r\n".encode() + asked + b"\r\n")
        reply = await connection.reply()
        assert (reply.status, reply.body) == (202, b"{}")
        lines = [b"http/1.1 202 accepted", b"date: now", b"content-length: 2", b"retry-after: 5"]
        assert reply.head.rstrip().split(b"\r\n") == [*lines, *([] if kept else [b"connection: close"])]
        assert served.answered == 1
        if kept:
            await connection.send(b"GET /livez HTTP/1.1\r\n\r\n")
            assert (await connection.reply()).status == 200
        else:
            assert await connection.rest() == b""


async def test_an_answer_without_a_body_is_sent() -> None:
    """The head that answers HEAD is not kept back for a body: neither on an open connection nor on one that closes."""
    head = b"HEAD /livez HTTP/1.1\r\nHost: x\r\n"
    async with _served() as served:
        connection = await served.connect(head + b"\r\n")
        assert (await connection.head()).startswith(b"http/1.1 200 ok\r\n")
        await connection.send(head + b"Connection: close\r\n\r\n")
        last = await connection.rest()
    assert last.startswith(b"HTTP/1.1 200 OK\r\n")
    assert last.endswith(b"\r\n\r\n")


async def test_a_client_that_waits_to_send_its_body_is_told_to() -> None:
    """`100 Continue` is no answer that a body follows: it is sent at once."""
    async with _served() as served:
        connection = await served.connect(POST + b"Expect: 100-continue\r\nContent-Length: 3\r\n\r\n")
        assert await connection.head() == b"http/1.1 100 continue\r\n\r\n"
        await connection.send(b"abc")
        assert (await connection.reply()).body.startswith(b"[3,")


# -- the head -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [protocol.MAX_HEAD_BYTES, 8_000_000])
async def test_a_head_too_large_is_refused(size: int) -> None:
    """A header just over the limit or of eight megabytes is answered with 431, and its sender can read the answer."""
    async with _served() as served:
        assert await _refusal(served, GET + b"X: " + b"a" * size + b"\r\n\r\n") == TOO_LARGE


async def test_separators_of_headers_are_counted() -> None:
    """10,000 headers of one letter are refused: the separators between names and values count towards the limit."""
    async with _served() as served:
        assert await _refusal(served, GET + b"a:\r\n" * 10_000 + b"\r\n") == TOO_LARGE


@pytest.mark.parametrize("sent", [b"", b"GET /li", GET, b"\r\n"], ids=["nothing", "half a line", "half a head", "CRLF"])
async def test_a_slow_head_is_refused(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that does not complete its head, or sends nothing, is answered with 408 and closed."""
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.05)
    async with _served() as served:
        assert await _refusal(served, sent) == TOO_SLOW


@pytest.mark.parametrize("sent", [b"GET /livez", b"\r\n"], ids=["half a line", "CRLF"])
async def test_a_later_head_has_its_deadline_too(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second request on a connection has the same deadline as the first, also if only an empty line arrives."""
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.2)
    async with _served() as served:
        connection = await served.connect(GET + b"\r\n")
        await connection.reply()
        await connection.send(sent)
        assert await connection.refusal() == TOO_SLOW


async def test_endless_empty_lines_are_refused() -> None:
    """Empty lines before a request are skipped, but refused once they exceed the size of a head."""
    async with _served() as served:
        assert await _refusal(served, b"\r\n" * protocol.MAX_HEAD_BYTES) == TOO_LARGE


# -- framing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sent",
    [
        b"nonsense\r\n\r\n",
        POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n",
        POST + b"Content-Length: -5\r\n\r\n",
        CHUNKED + b"zz\r\n",
    ],
    ids=["no HTTP", "two framings", "two lengths", "negative length", "bad chunk"],
)
async def test_ambiguous_framing_is_refused(sent: bytes) -> None:
    """A request without one clear meaning is answered with a 400 rejection, and nothing behind it is read."""
    async with _served() as served:
        assert await _refusal(served, sent) == MALFORMED


@pytest.mark.parametrize("target", [b"/livez#x", b"/livez?a#b", b"http://x/livez#"])
async def test_a_fragment_in_the_target_is_refused(target: bytes) -> None:
    """A request target has no fragment: the path in front of one would be served, past a proxy's rule for it."""
    async with _served() as served:
        assert await _refusal(served, GET.replace(b"/livez", target) + b"\r\n") == MALFORMED


async def test_a_refused_body_ends_for_its_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    """When a body turns malformed, the application stops waiting for it, although the connection is still open."""
    monkeypatch.setattr(protocol, "LINGER_SECONDS", 60)
    async with _served() as served:
        connection = await served.connect(CHUNKED)
        await _until(lambda: served.tasks == 1)
        await connection.send(b"zz\r\n")
        assert await connection.refusal() == MALFORMED
        await _until(lambda: served.tasks == 0)
        assert served.sockets == 1


async def test_trailers_are_no_headers() -> None:
    """Trailers do not appear among the headers, even if the whole request arrives in one piece."""
    async with _served() as served:
        answer = await _exchange(served, CHUNKED + b"1\r\na\r\n0\r\nStripe-Signature: t=1,v1=00\r\n\r\n")
    assert b"stripe-signature" not in answer
    assert b"\r\n\r\n[1," in answer


@pytest.mark.parametrize("start", [b"1;x=", b"1\r\na\r\n0\r\nX: ", b"0\r\n"], ids=["extension", "trailer", "trailers"])
async def test_chunk_extensions_and_trailers_are_bounded(start: bytes) -> None:
    """Endless chunk extensions and endless trailers are refused with the same limit as a head."""
    filling = b"X: y\r\n" if start.endswith(b"\n") else b"aaaaaa"
    async with _served() as served:
        assert await _refusal(served, CHUNKED, start, *[filling * 10_000] * 20) == TOO_LARGE


async def test_an_upgrade_is_declined() -> None:
    """An upgrade without a body is served as a plain request; one with a body is refused, as its body would be lost."""
    upgrade = b"Connection: Upgrade\r\nUpgrade: h2c\r\n"
    async with _served() as served:
        assert (await _exchange(served, GET + upgrade + b"\r\n")).startswith(b"HTTP/1.1 200 OK")
        sent = POST.replace(b"Connection: close\r\n", upgrade) + b"Content-Length: 5\r\n\r\n"
        assert await _refusal(served, sent, b"hello") == (400, "Protocol upgrades are not supported")


# -- the body's deadline ------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [b"", b"4\r\nhalf\r\n"], ids=["nothing", "half of it"])
async def test_a_slow_body_is_refused(body: bytes) -> None:
    """A body that misses its deadline is answered with 408, and the application stops waiting for it."""
    async with _served(body_seconds=0.05) as served:
        assert await _refusal(served, CHUNKED + body) == BODY_TOO_SLOW
        await _until(lambda: served.tasks == 0)


async def test_a_drip_does_not_extend_the_deadline() -> None:
    """The deadline is for the whole body, and does not start again with each byte."""
    async with _served(body_seconds=0.2) as served:
        connection = await served.connect(CHUNKED)
        await _until_cut(lambda: connection.send(b"1\r\nx\r\n"))
        await _until(lambda: served.tasks == 0)


async def test_the_bodys_deadline_ends_with_the_body() -> None:
    """Once the body is complete, its deadline affects neither a longer running request nor the next request."""
    async with _served(body_seconds=0.2) as served:
        connection = await served.connect(b"POST /held HTTP/1.1\r\nContent-Length: 2\r\n\r\n", b"x")
        await _until(lambda: served.held == 1)
        await connection.send(b"x")
        assert await _refusal(served, CHUNKED) == BODY_TOO_SLOW  # the deadline has passed by now
        served.gate.set()
        assert (await connection.reply()).body == b"held"
        await connection.send(GET + b"\r\n")
        assert (await connection.reply()).status == 200


# -- one request at a time ----------------------------------------------------------------------------


@pytest.mark.parametrize("behind", [GET + b"\r\n", GET, b"nonsense\r\n\r\n", b"\0" * 1_000_000])
async def test_nothing_behind_an_unanswered_request_is_read(behind: bytes) -> None:
    """A second request, half of one or garbage is not read: the first request's answer is the connection's last."""
    async with _served() as served:
        connection = await served.connect(b"GET /held HTTP/1.1\r\nHost: x\r\n\r\n" + behind)
        await _until(lambda: served.held == 1)
        await connection.send(GET + b"\r\n")
        served.gate.set()
        assert (await connection.reply()).body == b"held"
        assert await connection.rest() == b""


@pytest.mark.parametrize("behind", [b"", GET, b"nonsense\r\n\r\n"], ids=["nothing", "half a request", "no HTTP"])
async def test_a_client_that_half_closes_gets_its_answer(behind: bytes) -> None:
    """A client that ends its side after a complete request reads the answer, and then the end of the connection."""
    async with _served() as served:
        connection = await served.connect(b"POST /held HTTP/1.1\r\nContent-Length: 1\r\n\r\nx" + behind)
        await _until(lambda: served.held == 1)
        [handled] = served.server.server_state.connections
        assert isinstance(handled, HttpProtocol)
        connection.end()
        await _until(lambda: handled._ignoring_input or handled.transport.is_closing())
        served.gate.set()
        answer = await connection.rest()
        assert answer.endswith(b"\r\n\r\nheld")
        assert behind or b"\r\nconnection: close\r\n" in answer
        await _until(lambda: served.sockets == 0)


@pytest.mark.parametrize("sent", [b"", GET, CHUNKED + b"1\r\n", GET + b"\r\n"], ids=["nothing", "head", "body", "all"])
async def test_without_an_unanswered_request_a_half_closed_connection_ends(sent: bytes) -> None:
    """A client that ends its side before its request is complete, or after it was answered, is not waited for."""
    async with _served() as served:
        connection = await served.connect(sent)
        if sent.endswith(b"\r\n\r\n"):
            await connection.reply()
        connection.end()
        await connection.rest()
        await _until(lambda: (served.sockets, served.tasks) == (0, 0))


async def test_pipelined_requests_are_not_queued() -> None:
    """200,000 requests sent at once cost the service no more than the first one."""
    async with _served() as served:
        connection = await served.connect(*[b"GET /held HTTP/1.1\r\n\r\n" * 10_000] * 20)
        await _until(lambda: served.held == 1)
        [handled] = served.server.server_state.connections
        assert isinstance(handled, HttpProtocol)
        assert not handled.pipeline
        served.gate.set()
        assert (await connection.rest()).count(b"HTTP/1.1") == 1
        assert served.held == 1


async def test_who_still_sends_gets_to_read_the_answer() -> None:
    """If the body still arrives when the connection closes, it is received and discarded, and nothing is reset."""
    sent = b"POST /nowhere HTTP/1.1\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    async with _served() as served:
        connection = await served.connect(sent)
        await _until(lambda: served.answered == 1)
        await connection.send(*[b"10000\r\n" + b" " * 65_536 + b"\r\n"] * 64)
        assert (await connection.reply()).status == 404
        assert await connection.rest() == b""


async def test_an_answer_before_the_bodys_end_is_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that goes on sending an unwanted body gets the 404, and is disconnected a short time later."""
    monkeypatch.setattr(protocol, "LINGER_SECONDS", 0.2)
    async with _served() as served:
        connection = await served.connect(b"POST /nowhere HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n")
        assert (await connection.reply()).status == 404
        await _until_cut(lambda: connection.send(b"1\r\na\r\n"))
        await _until(lambda: served.sockets == 0)


# -- clients that do not read -------------------------------------------------------------------------


@contextmanager
def _deaf_client(served: Served) -> Iterator[Callable[[bytes], Awaitable[None]]]:
    """A client with minimal buffers that never reads. Yields its function to send."""
    [listener] = served.server.servers[0].sockets
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2048)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.connect(("127.0.0.1", served.port))
        client.setblocking(False)
        yield partial(asyncio.get_running_loop().sock_sendall, client)


@pytest.mark.parametrize("path", ["large", "large-whole"])
async def test_a_client_that_reads_nothing_is_disconnected(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """A client that sends requests and reads no answer is disconnected, and no task waits for it.

    Until then it is sent as many answers as the buffer holds, which are two of these, however they are sent.
    """
    monkeypatch.setattr(protocol, "UNREAD_SECONDS", 0.2)
    async with _served() as served:
        with _deaf_client(served) as send:
            await _until_cut(lambda: send(f"GET /{path} HTTP/1.1\r\n\r\n".encode()))
        await _until(lambda: (served.sockets, served.tasks) == (0, 0))
        assert served.answered == 2


@pytest.mark.parametrize(
    ("check", "connection"), [("_check_reading", b""), ("_check_lingering", b"Connection: close\r\n")]
)
async def test_a_large_answer_is_read_to_its_end(
    monkeypatch: pytest.MonkeyPatch, check: str, connection: bytes
) -> None:
    """An answer that no buffer has room for arrives whole, the last one too, if the client pauses at each check."""
    monkeypatch.setattr(protocol, "UNREAD_SECONDS", 0.02)
    monkeypatch.setattr(protocol, "LINGER_SECONDS", 0.02)
    checks = asyncio.Semaphore(0)
    checking = getattr(HttpProtocol, check)

    def checked(connection: HttpProtocol, *unread: int) -> None:
        checking(connection, *unread)
        checks.release()

    monkeypatch.setattr(HttpProtocol, check, checked)
    async with _served() as served:
        [listener] = served.server.servers[0].sockets
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2048)
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            client.connect(("127.0.0.1", served.port))
            client.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(client, b"GET /larger-than-buffers HTTP/1.1\r\n" + connection + b"\r\n")
            answer = await loop.sock_recv(client, 4096)
            head, _, body = answer.partition(b"\r\n\r\n")
            [length] = [int(line[16:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length: ")]
            received, left = len(body), 5
            while received < length:
                if left:
                    left -= 1
                    await checks.acquire()
                piece = await loop.sock_recv(client, 16_384)
                assert piece, f"cut after {received} of {length} bytes"
                received += len(piece)
        await _until(lambda: (served.sockets, served.tasks) == (0, 0))


async def test_a_last_answer_is_not_waited_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """A closing connection whose last answer is not read is aborted after a short time."""
    monkeypatch.setattr(protocol, "LINGER_SECONDS", 0.2)
    async with _served() as served:
        with _deaf_client(served) as send:
            await send(b"GET /large HTTP/1.1\r\nConnection: close\r\n\r\n")
            await _until(lambda: served.answered == 1)
            await _until(lambda: served.sockets == 0)


async def test_an_evicted_client_that_does_not_read_is_aborted(monkeypatch: pytest.MonkeyPatch) -> None:
    """An idle connection with an unread answer is evicted like any other, and aborted after a short time."""
    monkeypatch.setattr(protocol, "LINGER_SECONDS", 0.2)
    async with _served(max_connections=1) as served:
        with _deaf_client(served) as send:
            await send(b"GET /large HTTP/1.1\r\n\r\n")
            await _until(lambda: served.answered == 1)
            assert (await _exchange(served, GET + b"Connection: close\r\n\r\n")).startswith(b"HTTP/1.1 200 OK")
            await _until(lambda: served.sockets == 0)


# -- the connection limit -----------------------------------------------------------------------------


async def test_the_longest_incomplete_connection_is_evicted() -> None:
    """At the limit, the connection whose request has been incomplete for longest is answered with 503 and closed."""
    async with _served(max_connections=3) as served:
        slow = [await served.connect(sent) for sent in (b"", GET, CHUNKED + b"1\r\n")]
        await _until(lambda: served.sockets == 3)
        assert (await _exchange(served, GET + b"Connection: close\r\n\r\n")).startswith(b"HTTP/1.1 200 OK")
        assert await slow[0].refusal() == OVERLOADED
        assert (await _exchange(served, GET + b"Connection: close\r\n\r\n")).startswith(b"HTTP/1.1 200 OK")
        await slow[1].send(b"\r\n")  # two places are free again: no other connection was evicted
        assert (await slow[1].reply()).status == 200


async def test_an_idle_connection_is_evicted_without_an_answer() -> None:
    """An idle keep-alive connection is evicted without an answer, as at its timeout."""
    async with _served(max_connections=1) as served:
        kept = await served.connect(GET + b"\r\n")
        await kept.reply()
        assert (await _exchange(served, GET + b"Connection: close\r\n\r\n")).startswith(b"HTTP/1.1 200 OK")
        assert await kept.rest() == b""


async def test_a_new_connection_is_refused_while_all_are_busy() -> None:
    """No connection with a request in progress is evicted: the new connection gets a 503 with Retry-After at once."""
    async with _served(max_connections=2) as served:
        busy = [await served.connect(b"GET /held HTTP/1.1\r\n\r\n") for _ in range(2)]
        await _until(lambda: served.held == 2)
        head = await _exchange(served)
        assert head.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after: 5\r\n" in head
        assert await _refusal(served, GET + b"\r\n") == OVERLOADED
        served.gate.set()
        for each in busy:
            assert (await each.reply()).body == b"held"


async def test_incomplete_bodies_share_a_bounded_memory() -> None:
    """When incomplete bodies exceed the limit, the longest incomplete one is evicted and the others are read."""
    body = b"Content-Length: 60000\r\n\r\n" + b"x" * 59_999
    async with _served(max_bytes=150_000) as served:
        first, second = [await served.connect(POST + body) for _ in range(2)]
        third = await served.connect(POST + body)
        assert await first.refusal() == OVERLOADED
        for connection in (second, third):
            await connection.send(b"x")
            assert b"\r\n\r\n[60000," in await connection.rest()
