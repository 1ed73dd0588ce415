"""The proxy works as documented: a chaos test that uses it must not be testing the proxy."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest

from tests.acceptance.harness import eventually
from tests.proxy import Mode, Proxy, Tap, Upstream, before_postgres, before_redis

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass(slots=True)
class Echo:
    """A proxy in front of a server that records and echoes what it receives."""

    proxy: Proxy
    heard: bytearray
    _lines: list[Streams] = field(default_factory=list)

    async def connect(self) -> Streams:
        line = await asyncio.open_connection("127.0.0.1", self.proxy.port)
        self._lines.append(line)
        return line

    async def has_heard(self) -> bytes:
        return bytes(self.heard)

    def close(self) -> None:
        for _, writer in self._lines:
            writer.transport.abort()


@pytest.fixture
async def echo() -> AsyncIterator[Echo]:
    """One for each test."""
    heard = bytearray()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while chunk := await reader.read(1000):
            heard.extend(chunk)
            writer.write(chunk)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server, Proxy(Upstream(*server.sockets[0].getsockname())) as proxy:
        echo = Echo(proxy, heard)
        yield echo
        echo.close()


async def said(reader: asyncio.StreamReader, count: int) -> bytes:
    async with asyncio.timeout(10):
        return await reader.readexactly(count)


async def at_end(reader: asyncio.StreamReader) -> bool:
    """Whether the connection was cut."""
    try:
        async with asyncio.timeout(10):
            return await reader.read() == b""
    except ConnectionResetError:
        return True


async def test_open_forwards_both_ways(echo: Echo) -> None:
    """Two clients at once, each gets its own words back."""
    (one, to_one), (other, to_other) = await echo.connect(), await echo.connect()
    to_one.write(b"one")
    to_other.write(b"other")
    assert (await said(one, 3), await said(other, 5)) == (b"one", b"other")
    assert echo.proxy.connections == 2


async def test_refuse_cuts_and_refuses_and_the_port_stays(echo: Echo) -> None:
    """Connections are cut, new ones refused, no other process gets the port, and after reopening it is served again."""
    reader, writer = await echo.connect()
    writer.write(b"hello")
    await said(reader, 5)
    echo.proxy.switch(Mode.REFUSE)
    assert await at_end(reader)
    for _ in range(3):
        with pytest.raises(ConnectionRefusedError):
            await echo.connect()
    with pytest.raises(OSError, match="in use"):
        await asyncio.start_server(lambda *_: None, "127.0.0.1", echo.proxy.port)
    echo.proxy.switch(Mode.OPEN)
    reader, writer = await echo.connect()
    writer.write(b"again")
    assert await said(reader, 5) == b"again"


async def test_frozen_accepts_and_forwards_when_thawed(echo: Echo) -> None:
    """Old and new connections stand and nothing passes; what was sent meanwhile arrives with the thaw."""
    old, to_old = await echo.connect()
    to_old.write(b"before")
    await said(old, 6)
    echo.proxy.switch(Mode.FROZEN)
    new, to_new = await echo.connect()
    to_old.write(b"during")
    to_new.write(b"during")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await old.read(1)
    assert echo.heard == b"before"
    echo.proxy.switch(Mode.OPEN)
    assert (await said(old, 6), await said(new, 6)) == (b"during", b"during")


async def test_mute_lets_the_server_hear(echo: Echo) -> None:
    """The server receives the data, and its reply arrives only once the proxy is open again."""
    reader, writer = await echo.connect()
    echo.proxy.switch(Mode.MUTE)
    writer.write(b"hello")
    await eventually(echo.has_heard, lambda heard: heard == b"hello")
    echo.proxy.switch(Mode.OPEN)
    assert await said(reader, 5) == b"hello"


async def test_a_hole_lets_nobody_in_and_nothing_through(echo: Echo) -> None:
    """An old connection stands silent, a new one is not even refused; both work once the proxy is open again."""
    old, to_old = await echo.connect()
    echo.proxy.switch(Mode.HOLE)
    to_old.write(b"during")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await echo.connect()
    assert echo.heard == b""
    echo.proxy.switch(Mode.OPEN)
    assert await said(old, 6) == b"during"
    new, to_new = await echo.connect()
    to_new.write(b"after")
    assert await said(new, 5) == b"after"


class Cutting(Tap):
    """Cuts the connection at a word: `ask`, before the server receives it; `answer`, after the server has replied."""

    def sent(self, chunk: bytes) -> None:
        if b"ask" in chunk:
            raise ConnectionResetError

    def replied(self, chunk: bytes) -> None:
        if b"answer" in chunk:
            raise ConnectionResetError


@pytest.mark.parametrize(("word", "heard"), [(b"ask", b""), (b"answer", b"answer")])
async def test_a_tap_cuts_its_own_connection(echo: Echo, word: bytes, heard: bytes) -> None:
    """Before the server receives the data, or after it has answered; other connections are not affected."""
    other, to_other = await echo.connect()
    to_other.write(b"before")
    await said(other, 6)
    echo.proxy.tap = Cutting
    reader, writer = await echo.connect()
    writer.write(word)
    assert await at_end(reader)
    assert echo.heard == b"before" + heard
    to_other.write(b"answer")
    assert await said(other, 6) == b"answer"


async def test_a_chunk_is_seen_before_it_is_forwarded(echo: Echo) -> None:
    """A test can act at the data that must not arrive: the connection is cut before the server has received it."""

    def cut(sent: bytes) -> None:
        if b"COMMIT" in sent:
            echo.proxy.switch(Mode.FROZEN)
            echo.proxy.cut()

    echo.proxy.on_sent = cut
    reader, writer = await echo.connect()
    writer.write(b"BEGIN")
    await said(reader, 5)
    writer.write(b"COMMIT")
    assert await at_end(reader)
    assert echo.heard == b"BEGIN"


async def test_leaving_closes_everything(echo: Echo) -> None:
    """After the block, no client is connected and nothing listens."""
    async with Proxy(Upstream("127.0.0.1", echo.proxy.port)) as outer:
        reader, writer = await asyncio.open_connection("127.0.0.1", outer.port)
        writer.write(b"hello")
        await said(reader, 5)
    assert await at_end(reader)
    writer.close()
    assert outer.connections == 0
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", outer.port)


async def test_the_addresses_of_proxied_stores() -> None:
    """User, password, database and other parameters stay; host and port are the proxy's, a socket's path goes."""
    async with before_postgres("postgresql://me:pw%40x@db:6543/shop?sslmode=disable") as (proxy, url):
        assert url == f"postgresql://me:pw%40x@127.0.0.1:{proxy.port}/shop?sslmode=disable"
    async with before_postgres("postgresql://postgres@/shop?host=/run/pg&port=5433") as (proxy, url):
        assert url == f"postgresql://postgres@127.0.0.1:{proxy.port}/shop"
    async with before_redis("redis://:pw@cache:6380/3") as (proxy, url):
        assert url == f"redis://:pw@127.0.0.1:{proxy.port}/3"
    async with before_redis("unix:///run/valkey.sock?db=2") as (proxy, url):
        assert url == f"redis://127.0.0.1:{proxy.port}/2"
