"""What comes before the webhook: raw sockets against the server's own protocol, over real TCP."""

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

from firstclaim.server import protocol
from firstclaim.server.connection_limiter import ConnectionLimiter
from firstclaim.server.protocol import HttpProtocol
from firstclaim.web.health import livez
from tests.talk import Talk

GET = b"GET /livez HTTP/1.1\r\nHost: x\r\n"
POST = b"POST /headers HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
ROOMY = (1000, 10**8)


@dataclass
class Served:
    """A server that speaks through the door."""

    server: uvicorn.Server
    gate: asyncio.Event = field(default_factory=asyncio.Event)  # what `/held` waits for
    held: int = 0
    talks: list[Talk] = field(default_factory=list)

    @property
    def port(self) -> int:
        port: int = self.server.servers[0].sockets[0].getsockname()[1]
        return port

    @property
    def sockets(self) -> int:
        """How many are open."""
        return len(self.server.server_state.connections)

    @property
    def tasks(self) -> int:
        """How many requests are being handled."""
        return len(self.server.server_state.tasks)

    @property
    def answered(self) -> int:
        """How many requests have been."""
        return self.server.server_state.total_requests

    async def talk(self, *chunks: bytes) -> Talk:
        """A connection to it, on which the chunks were sent."""
        talk = await Talk.begin(self.port, *chunks)
        self.talks.append(talk)
        return talk

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


@asynccontextmanager
async def _served(
    connections_most: int = ROOMY[0], bytes_most: int = ROOMY[1], body_seconds: float = 60
) -> AsyncIterator[Served]:
    app = Starlette(routes=[Route("/livez", livez), Route("/headers", _headers, methods=["POST"])])
    protocol = cast(
        type[asyncio.Protocol], partial(HttpProtocol, ConnectionLimiter(connections_most, bytes_most), body_seconds)
    )
    config = uvicorn.Config(app, port=0, http=protocol, ws="none", lifespan="off", log_config=None)
    served = Served(uvicorn.Server(config))
    app.add_route("/held", served.hold, methods=["GET", "POST"])
    app.add_route("/large", _large)
    config.load()
    served.server.lifespan = config.lifespan_class(config)
    await served.server.startup()
    try:
        yield served
    finally:
        served.gate.set()
        for talk in served.talks:
            talk.hang_up()
        await served.server.shutdown()


async def _say(served: Served, *chunks: bytes) -> bytes:
    """Send the chunks and read until the server closes, five seconds at most."""
    return await (await served.talk(*chunks)).rest()


async def _refusal(served: Served, *chunks: bytes) -> tuple[int, str]:
    return await (await served.talk(*chunks)).refusal()


async def _until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not holds():  # noqa: ASYNC110  (nothing tells)
            await asyncio.sleep(0.005)


async def _until_cut(send: Callable[[], Awaitable[None]]) -> None:
    """Send again and again, until the other side has cut the connection."""
    async with asyncio.timeout(10):
        with suppress(ConnectionError):
            while True:
                await send()
                await asyncio.sleep(0.01)


TOO_LARGE = (431, "Headers are too large")
TOO_SLOW = (408, "Headers took too long to arrive")
BODY_TOO_SLOW = (408, "Body took too long to arrive")
MALFORMED = (400, "Malformed HTTP request")
CROWDED = (503, "Too many connections")


# -- what passes --------------------------------------------------------------------------------------


async def test_a_request_passes() -> None:
    """An ordinary request, and a second one on its connection, are answered as ever."""
    async with _served() as served:
        talk = await served.talk(GET + b"\r\n")
        assert (await talk.reply()).status == 200
        await talk.send(b"\r\n" + GET + b"Connection: close\r\n\r\n")  # an empty line before it is allowed
        assert (await talk.rest()).startswith(b"HTTP/1.1 200 OK")


async def test_a_head_in_pieces_and_a_large_body_pass() -> None:
    """Only the head is counted: it may come byte by byte, and the body behind it may be larger than any head."""
    head = POST + b"Content-Length: 300000\r\n\r\n"
    async with _served() as served:
        answer = await _say(served, *(bytes([byte]) for byte in head), b"x" * 300_000)
    assert b"\r\n\r\n[300000," in answer


async def test_a_large_body_in_small_chunks_passes() -> None:
    """What frames the chunks of a body adds up to more than any head, and is no head."""
    async with _served() as served:
        answer = await _say(served, CHUNKED, *[b"1\r\nx\r\n" * 1000] * 20, b"0\r\n\r\n")
    assert b"\r\n\r\n[20000," in answer


# -- the head -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [protocol.HEAD_MOST_BYTES, 8_000_000])
async def test_a_head_too_large_is_refused(size: int) -> None:
    """A little over the cap or eight megabytes, in one header: 431, which its sender gets to read."""
    async with _served() as served:
        assert await _refusal(served, GET + b"X: " + b"a" * size + b"\r\n\r\n") == TOO_LARGE


async def test_many_headers_are_counted_as_they_came() -> None:
    """10,000 headers of a letter each: what stands between names and values counts, though it is not kept."""
    async with _served() as served:
        assert await _refusal(served, GET + b"a:\r\n" * 10_000 + b"\r\n") == TOO_LARGE


@pytest.mark.parametrize("sent", [b"", b"GET /li", GET, b"\r\n"], ids=["nothing", "half a line", "half a head", "CRLF"])
async def test_a_slow_head_is_refused(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket that never finishes its head, or never begins, is told so and closed."""
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.05)
    async with _served() as served:
        assert await _refusal(served, sent) == TOO_SLOW


@pytest.mark.parametrize("sent", [b"GET /livez", b"\r\n"], ids=["half a line", "CRLF"])
async def test_a_later_head_has_its_deadline_too(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Having sent one request buys no time for the next, nor does what is not even the beginning of one."""
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.2)
    async with _served() as served:
        talk = await served.talk(GET + b"\r\n")
        await talk.reply()
        await talk.send(sent)
        assert await talk.refusal() == TOO_SLOW


async def test_endless_empty_lines_are_refused() -> None:
    """Before a request an empty line is passed over; more of them than a head may be large are not."""
    async with _served() as served:
        assert await _refusal(served, b"\r\n" * protocol.HEAD_MOST_BYTES) == TOO_LARGE


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
async def test_what_cannot_be_framed_is_refused(sent: bytes) -> None:
    """What has no one meaning is answered 400 in the one shape, and nothing behind it is read."""
    async with _served() as served:
        assert await _refusal(served, sent) == MALFORMED


async def test_nobody_goes_on_waiting_for_a_refused_body(monkeypatch: pytest.MonkeyPatch) -> None:
    """A body that breaks off in nonsense has ended for whoever reads it, though the connection is still there."""
    monkeypatch.setattr(protocol, "LEAVE_SECONDS", 60)
    async with _served() as served:
        talk = await served.talk(CHUNKED)
        await _until(lambda: served.tasks == 1)
        await talk.send(b"zz\r\n")
        assert await talk.refusal() == MALFORMED
        await _until(lambda: served.tasks == 0)
        assert served.sockets == 1


async def test_trailers_are_no_headers() -> None:
    """What comes behind a body is not there for whoever reads the headers, though all of it came in one piece."""
    async with _served() as served:
        answer = await _say(served, CHUNKED + b"1\r\na\r\n0\r\nStripe-Signature: t=1,v1=00\r\n\r\n")
    assert b"stripe-signature" not in answer
    assert b"\r\n\r\n[1," in answer


@pytest.mark.parametrize("start", [b"1;x=", b"1\r\na\r\n0\r\nX: ", b"0\r\n"], ids=["extension", "trailer", "trailers"])
async def test_what_frames_a_body_is_bounded_too(start: bytes) -> None:
    """A chunk's extension without end, and trailers without end, are refused like a head of that size."""
    filling = b"X: y\r\n" if start.endswith(b"\n") else b"aaaaaa"
    async with _served() as served:
        assert await _refusal(served, CHUNKED, start, *[filling * 10_000] * 20) == TOO_LARGE


async def test_an_upgrade_is_declined() -> None:
    """Without a body it is answered as what it is besides; with one it is refused, for its body would be lost."""
    upgrade = b"Connection: Upgrade\r\nUpgrade: h2c\r\n"
    async with _served() as served:
        assert (await _say(served, GET + upgrade + b"\r\n")).startswith(b"HTTP/1.1 200 OK")
        sent = POST.replace(b"Connection: close\r\n", upgrade) + b"Content-Length: 5\r\n\r\n"
        assert await _refusal(served, sent, b"hello") == (400, "Protocol upgrades are not supported")


# -- a body's time ------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [b"", b"4\r\nhalf\r\n"], ids=["nothing", "half of it"])
async def test_a_slow_body_is_refused(body: bytes) -> None:
    """A body that does not come in its time is given up, also by whoever reads it."""
    async with _served(body_seconds=0.05) as served:
        assert await _refusal(served, CHUNKED + body) == BODY_TOO_SLOW
        await _until(lambda: served.tasks == 0)


async def test_a_drip_does_not_buy_time() -> None:
    """The time is for the whole body, not from one byte to the next."""
    async with _served(body_seconds=0.2) as served:
        talk = await served.talk(CHUNKED)
        await _until_cut(lambda: talk.send(b"1\r\nx\r\n"))
        await _until(lambda: served.tasks == 0)


async def test_a_body_in_time_is_not_held_against_what_follows() -> None:
    """Whoever works on a request for longer than its body may take has nothing to fear, nor has the next request."""
    async with _served(body_seconds=0.2) as served:
        talk = await served.talk(b"POST /held HTTP/1.1\r\nContent-Length: 2\r\n\r\n", b"x")
        await _until(lambda: served.held == 1)
        await talk.send(b"x")
        assert await _refusal(served, CHUNKED) == BODY_TOO_SLOW  # so long have we waited now
        served.gate.set()
        assert (await talk.reply()).body == b"held"
        await talk.send(GET + b"\r\n")
        assert (await talk.reply()).status == 200


# -- one request at a time ----------------------------------------------------------------------------


@pytest.mark.parametrize("behind", [GET + b"\r\n", GET, b"nonsense\r\n\r\n", b"\0" * 1_000_000])
async def test_nothing_behind_an_unanswered_request_is_read(behind: bytes) -> None:
    """A second request, half a one or garbage: the first is answered, as the last on its connection."""
    async with _served() as served:
        talk = await served.talk(b"GET /held HTTP/1.1\r\nHost: x\r\n\r\n" + behind)
        await _until(lambda: served.held == 1)
        await talk.send(GET + b"\r\n")
        served.gate.set()
        assert (await talk.reply()).body == b"held"
        assert await talk.rest() == b""


async def test_requests_in_great_number_are_not_queued() -> None:
    """200,000 requests in one go cost the service no more than the first."""
    async with _served() as served:
        talk = await served.talk(*[b"GET /held HTTP/1.1\r\n\r\n" * 10_000] * 20)
        await _until(lambda: served.held == 1)
        [connection] = served.server.server_state.connections
        assert isinstance(connection, HttpProtocol)
        assert not connection.pipeline
        served.gate.set()
        assert (await talk.rest()).count(b"HTTP/1.1") == 1
        assert served.held == 1


async def test_who_still_sends_gets_to_read_the_answer() -> None:
    """The connection is to be closed, and the body still coming: it is taken, though not read, and nothing is reset."""
    sent = b"POST /nowhere HTTP/1.1\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    async with _served() as served:
        talk = await served.talk(sent)
        await _until(lambda: served.answered == 1)
        await talk.send(*[b"10000\r\n" + b" " * 65_536 + b"\r\n"] * 64)
        assert (await talk.reply()).status == 404
        assert await talk.rest() == b""


async def test_an_answer_before_the_bodys_end_is_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who goes on sending to where nothing is read gets the 404, and a short time to notice."""
    monkeypatch.setattr(protocol, "LEAVE_SECONDS", 0.2)
    async with _served() as served:
        talk = await served.talk(b"POST /nowhere HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n")
        assert (await talk.reply()).status == 404
        await _until_cut(lambda: talk.send(b"1\r\na\r\n"))
        await _until(lambda: served.sockets == 0)


# -- who does not read --------------------------------------------------------------------------------


@contextmanager
def _deaf_client(served: Served) -> Iterator[Callable[[bytes], Awaitable[None]]]:
    """A client with next to no buffers who never reads; hands out how it sends."""
    [listener] = served.server.servers[0].sockets
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2048)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.connect(("127.0.0.1", served.port))
        client.setblocking(False)
        yield partial(asyncio.get_running_loop().sock_sendall, client)


async def test_nobody_waits_for_who_does_not_read() -> None:
    """Request after request and not one answer read: the connection is cut, and no task waits for it."""
    async with _served() as served:
        with _deaf_client(served) as send:
            await _until_cut(lambda: send(b"GET /large HTTP/1.1\r\n\r\n"))
        await _until(lambda: (served.sockets, served.tasks) == (0, 0))


async def test_a_last_answer_is_not_waited_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that is to be closed, and whose last answer nobody reads, is cut."""
    monkeypatch.setattr(protocol, "LEAVE_SECONDS", 0.2)
    async with _served() as served:
        with _deaf_client(served) as send:
            await send(b"GET /large HTTP/1.1\r\nConnection: close\r\n\r\n")
            await _until(lambda: served.answered == 1)
            await _until(lambda: served.sockets == 0)


async def test_who_does_not_read_makes_room_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """An idle connection with an answer that nobody reads is closed like any other, and then cut."""
    monkeypatch.setattr(protocol, "LEAVE_SECONDS", 0.2)
    async with _served(connections_most=1) as served:
        with _deaf_client(served) as send:
            await send(b"GET /large HTTP/1.1\r\n\r\n")
            await _until(lambda: served.answered == 1)
            assert (await _say(served, GET + b"Connection: close\r\n\r\n")).startswith(b"HTTP/1.1 200 OK")
            await _until(lambda: served.sockets == 0)


# -- a full house -------------------------------------------------------------------------------------


async def test_the_one_who_waits_longest_makes_room() -> None:
    """When all places are taken by sockets whose requests do not come, the first of them is told so and goes."""
    async with _served(connections_most=3) as served:
        slow = [await served.talk(sent) for sent in (b"", GET, CHUNKED + b"1\r\n")]
        await _until(lambda: served.sockets == 3)
        assert (await _say(served, GET + b"Connection: close\r\n\r\n")).startswith(b"HTTP/1.1 200 OK")
        assert await slow[0].refusal() == CROWDED
        assert (await _say(served, GET + b"Connection: close\r\n\r\n")).startswith(b"HTTP/1.1 200 OK")
        await slow[1].send(b"\r\n")  # two places are free again: nobody else had to go
        assert (await slow[1].reply()).status == 200


async def test_an_idle_connection_makes_room_without_a_word() -> None:
    """A kept connection waits for nothing: it is closed as it would be when its time is over."""
    async with _served(connections_most=1) as served:
        kept = await served.talk(GET + b"\r\n")
        await kept.reply()
        assert (await _say(served, GET + b"Connection: close\r\n\r\n")).startswith(b"HTTP/1.1 200 OK")
        assert await kept.rest() == b""


async def test_a_full_house_at_work_says_so() -> None:
    """Nobody whose request is being worked on has to go: the newcomer is told at once to come again."""
    async with _served(connections_most=2) as served:
        busy = [await served.talk(b"GET /held HTTP/1.1\r\n\r\n") for _ in range(2)]
        await _until(lambda: served.held == 2)
        head = await _say(served)
        assert head.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after: 5\r\n" in head
        assert await _refusal(served, GET + b"\r\n") == CROWDED
        served.gate.set()
        for each in busy:
            assert (await each.reply()).body == b"held"


async def test_bodies_that_do_not_end_share_a_bounded_memory() -> None:
    """More of them than fit: whose body has been coming for longest goes, the others are read."""
    body = b"Content-Length: 60000\r\n\r\n" + b"x" * 59_999
    async with _served(bytes_most=150_000) as served:
        first, second = [await served.talk(POST + body) for _ in range(2)]
        third = await served.talk(POST + body)
        assert await first.refusal() == CROWDED
        for talk in (second, third):
            await talk.send(b"x")
            assert b"\r\n\r\n[60000," in await talk.rest()
