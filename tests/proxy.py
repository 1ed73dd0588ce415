"""A TCP proxy in front of Postgres or Redis that injects faults, in the process of the tests.

Guarantees: the address stays the same through every change of mode. A switch takes effect at once (`switch` is not a
coroutine, so nothing happens in between). Data that was held back while frozen is forwarded afterwards, as a stopped
and continued server would read it. Closing leaves no connection, task or port behind.

The server may listen on a Unix socket: an embedded server has no other address.
"""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Self
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit, urlunsplit

# Where a client executes the COMMIT of a handler's transaction: the statement is prepared, and Bind names it.
EXECUTES_COMMIT = b"\0firstclaim_commit\0"

_CHUNK_BYTES = 65_536
_BACKLOG = 1024
_FILLERS = 4  # a queue of length 0 holds one, and the kernel completes one more

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Mode(Enum):
    """How the proxy behaves."""

    OPEN = auto()  # forwards
    REFUSE = auto()  # nothing listens, and all connections were cut
    FROZEN = auto()  # accepts, and forwards nothing in either direction
    MUTE = auto()  # the server receives everything, and none of its replies arrive
    HOLE = auto()  # packets vanish: nothing is forwarded, and no new connection is ever established (Linux)


@dataclass(frozen=True, slots=True)
class Upstream:
    """Where the real server listens."""

    host: str
    port: int
    path: str | None = None  # of a Unix socket; then host and port are unused

    async def connect(self) -> Streams:
        """A new connection to the server."""
        if self.path is not None:
            return await asyncio.open_unix_connection(self.path)
        return await asyncio.open_connection(self.host, self.port)


class Tap:
    """Sees the data on one connection before it is forwarded. A ConnectionError that it raises cuts the connection."""

    def pieces(self, chunk: bytes) -> list[bytes]:
        """What the client has sent, in pieces that are seen and forwarded one after another."""
        return [chunk]

    def sent(self, chunk: bytes) -> None:
        """The client has sent this."""

    def replied(self, chunk: bytes) -> None:
        """The server has sent this."""


class Proxy:
    """One listener on 127.0.0.1. Use it as an async context manager; it keeps `port` until the block ends."""

    def __init__(self, upstream: Upstream) -> None:
        self.upstream = upstream  # a change applies to new connections
        self.mode = Mode.OPEN
        # Called with each chunk from a client, before it is forwarded: a test that acts at one statement (a COMMIT,
        # for example) switches the mode from here.
        self.on_sent: Callable[[bytes], None] | None = None
        # Creates the tap of each new connection: for faults of that connection alone.
        self.tap: Callable[[], Tap] = Tap
        # Bound during the life of the proxy, and never listening: while the proxy refuses, no other process can get
        # the port, and the kernel answers every connection attempt with a reset.
        self._holder = _bound(0)
        self.port: int = self._holder.getsockname()[1]
        self._listener: socket.socket | None = None
        self._fillers: list[socket.socket] = []
        self._serving: dict[asyncio.Task[None], int] = {}  # and the client's port
        self._changed = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._listen()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._refuse()
        await asyncio.gather(*self._serving, return_exceptions=True)
        self._holder.close()

    @property
    def connections(self) -> int:
        """The number of connected clients."""
        return len(self._serving)

    @property
    def client_ports(self) -> set[int]:
        """The port of each connected client."""
        return set(self._serving.values())

    def switch(self, mode: Mode) -> None:
        """Change the mode, at once."""
        self.mode = mode
        self._unfill()
        if mode is Mode.REFUSE:
            self._refuse()
        elif self._listener is None:
            self._listen()
        if mode is Mode.HOLE:
            self._fill()
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def cut(self) -> None:
        """Cut all connections. New ones are accepted if the mode allows it."""
        for task in self._serving:
            task.cancel()

    def _listen(self) -> None:
        self._listener = _bound(self.port)
        self._listener.listen(_BACKLOG)
        asyncio.get_running_loop().add_reader(self._listener, self._accept, self._listener)

    def _fill(self) -> None:
        """Fill the listener's queue: then the kernel does not answer a connection attempt at all."""
        assert self._listener is not None
        asyncio.get_running_loop().remove_reader(self._listener)
        self._listener.listen(0)
        for _ in range(_FILLERS):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", self.port))
            self._fillers.append(filler)

    def _unfill(self) -> None:
        if self._fillers and self._listener is not None:
            self._listener.listen(_BACKLOG)
            asyncio.get_running_loop().add_reader(self._listener, self._accept, self._listener)
        while self._fillers:
            self._fillers.pop().close()

    def _refuse(self) -> None:
        self._unfill()
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._listener = None
        self.cut()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionError):  # the client has closed it already
            client, (_, port) = listener.accept()
            client.setblocking(False)
            task = asyncio.create_task(self._serve(client))
            self._serving[task] = port
            task.add_done_callback(self._serving.pop)
            task.add_done_callback(lambda _: client.close())  # also if it was cut before the task ran

    async def _serve(self, client: socket.socket) -> None:
        async with contextlib.AsyncExitStack() as stack:
            client_reader, client_writer = await asyncio.open_connection(sock=client)
            stack.callback(client_writer.transport.abort)
            with contextlib.suppress(OSError):
                await self._passable(Mode.OPEN, Mode.MUTE)
                server_reader, server_writer = await self.upstream.connect()
                stack.callback(server_writer.transport.abort)
                tap = self.tap()
                directions = {
                    asyncio.create_task(self._send(client_reader, server_writer, tap)),
                    asyncio.create_task(self._reply(server_reader, client_writer, tap)),
                }
                stack.push_async_callback(_cancelled, directions)
                await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)

    async def _send(self, client: asyncio.StreamReader, server: asyncio.StreamWriter, tap: Tap) -> None:
        while chunk := await client.read(_CHUNK_BYTES):
            if self.on_sent is not None:
                self.on_sent(chunk)
            for piece in tap.pieces(chunk):
                tap.sent(piece)
                await self._passable(Mode.OPEN, Mode.MUTE)
                server.write(piece)
                await server.drain()

    async def _reply(self, server: asyncio.StreamReader, client: asyncio.StreamWriter, tap: Tap) -> None:
        while chunk := await server.read(_CHUNK_BYTES):
            tap.replied(chunk)
            await self._passable(Mode.OPEN)
            client.write(chunk)
            await client.drain()

    async def _passable(self, *modes: Mode) -> None:
        while self.mode not in modes:
            await self._changed.wait()


async def _cancelled(tasks: set[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _bound(port: int) -> socket.socket:
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    bound.bind(("127.0.0.1", port))
    bound.setblocking(False)
    return bound


# -- addresses ----------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def before_postgres(url: str) -> AsyncIterator[tuple[Proxy, str]]:
    """A proxy in front of the server of a `postgresql://` address, and the address of the proxy."""
    parts = urlsplit(url)
    query = dict(parse_qsl(parts.query))
    host = query.pop("host", "") or unquote(parts.hostname or "127.0.0.1")
    port = int(query.pop("port", "") or parts.port or 5432)
    path = f"{host}/.s.PGSQL.{port}" if host.startswith("/") else None
    async with Proxy(Upstream(host, port, path)) as proxy:
        yield proxy, urlunsplit(parts._replace(netloc=_through(proxy, parts.netloc), query=urlencode(query)))


@contextlib.asynccontextmanager
async def before_redis(url: str) -> AsyncIterator[tuple[Proxy, str]]:
    """A proxy in front of the server of a `redis://` or `unix://` address, and the address of the proxy."""
    parts = urlsplit(url)
    if parts.scheme not in ("redis", "unix"):
        raise ValueError(f"cannot stand before {parts.scheme}://: the certificate is not this proxy's")
    over_unix = parts.scheme == "unix"
    database = dict(parse_qsl(parts.query)).get("db", "0") if over_unix else parts.path.strip("/")
    upstream = Upstream(parts.hostname or "127.0.0.1", parts.port or 6379, unquote(parts.path) if over_unix else None)
    async with Proxy(upstream) as proxy:
        query = "" if over_unix else parts.query
        yield proxy, urlunsplit(("redis", _through(proxy, parts.netloc), f"/{database}", query, ""))


def _through(proxy: Proxy, netloc: str) -> str:
    user, at, _ = netloc.rpartition("@")
    return f"{user}{at}127.0.0.1:{proxy.port}"
