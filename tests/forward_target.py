"""A target that events are forwarded to, on the loopback interface, over real HTTP, with any answer that a test needs.

Guarantees: `received` has every request whose body arrived in full, in order, whatever was answered. `respond` chooses
the answer to each: bytes are sent as they are; `SILENT` closes the connection, `FROZEN` sends nothing, `SLOW_HEAD`
sends a head that never ends, and `ENDLESS` a 200 whose body never ends.
"""

import asyncio
import contextlib
import hashlib
import hmac
import time
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import orjson

from firstclaim.web.signature import verify

SECRET: Final = "whsec_" + b64encode(bytes(range(32))).decode()
SILENT, FROZEN, SLOW_HEAD, ENDLESS = b"", b"frozen", b"slow", b"endless"


def status(number: int, text: bytes = b"", header: str = "") -> bytes:
    """An answer with that status, that body, and another header."""
    return f"HTTP/1.1 {number} Reason\r\nContent-Length: {len(text)}\r\n{header}\r\n".encode() + text


OK: Final = status(200, b"ok")


@dataclass(frozen=True, slots=True)
class Received:
    """One request, with the names of its headers in lower case."""

    path: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def event_id(self) -> str:
        """What the receiver knows the event by."""
        return self.headers["webhook-id"]

    def check(self, secret: str = SECRET) -> None:
        """Fail unless both signatures are valid, as a receiver that knows nothing of the sender's code finds it."""
        verify(self.body, [self.headers["stripe-signature"]], [secret], tolerance_seconds=300, now=time.time())
        signed = f"{self.event_id}.{self.headers['webhook-timestamp']}.".encode() + self.body
        digest = hmac.new(b64decode(secret.removeprefix("whsec_")), signed, hashlib.sha256).digest()
        assert self.headers["webhook-signature"] == "v1," + b64encode(digest).decode()
        assert abs(int(self.headers["webhook-timestamp"]) - time.time()) < 300
        assert orjson.loads(self.body)["id"] == self.event_id


@dataclass(slots=True)
class ForwardTarget:
    """The server. `port` stays the same while it is closed and opened again."""

    respond: Callable[[Received], bytes] = lambda _: OK
    received: list[Received] = field(default_factory=list)
    url: str = ""
    at_once: int = 0  # requests that are being answered
    at_once_most: int = 0
    hold: asyncio.Event | None = None  # awaited before each answer

    @property
    def ids(self) -> set[str]:
        """The events that arrived."""
        return {each.event_id for each in self.received}

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """All requests of one connection."""
        try:
            while True:
                request = await _read(reader)
                request.check()
                self.received.append(request)
                self.at_once += 1
                self.at_once_most = max(self.at_once, self.at_once_most)
                try:
                    if self.hold is not None:
                        await self.hold.wait()
                finally:
                    self.at_once -= 1
                if not await _answer(writer, reader, self.respond(request)):
                    break
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # of a client, or of the test's end
        finally:
            writer.close()

    @asynccontextmanager
    async def listening(self) -> AsyncIterator["ForwardTarget"]:
        """Serve at `url`, whose path is a secret, while the block runs."""
        connections: set[asyncio.Task[Any]] = set()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            connections.add(task)
            task.add_done_callback(connections.discard)
            await self.serve(reader, writer)

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/hooks/c4n4rypath"
        try:
            yield self
        finally:
            server.close()
            for task in list(connections):
                task.cancel()
            await asyncio.gather(*connections, return_exceptions=True)


async def _read(reader: asyncio.StreamReader) -> Received:
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    line, *rest = head.split("\r\n")
    headers = {name.lower(): value for name, _, value in (each.partition(": ") for each in rest if each)}
    return Received(line.split(" ")[1], headers, await reader.readexactly(int(headers["content-length"])))


async def _answer(writer: asyncio.StreamWriter, reader: asyncio.StreamReader, answer: bytes) -> bool:
    """Send the answer. Returns whether the connection can be used again."""
    if answer in (SILENT, FROZEN):
        if answer == FROZEN:
            await reader.read()  # until the client closes the connection
        return False
    if answer in (SLOW_HEAD, ENDLESS):
        writer.write(b"HTTP/1.1 200 OK\r\n" + (b"" if answer == SLOW_HEAD else b"Transfer-Encoding: chunked\r\n\r\n"))
        piece = b"X-More: yes\r\n" if answer == SLOW_HEAD else b"400\r\n" + b"x" * 0x400 + b"\r\n"
        with contextlib.suppress(ConnectionError):
            while not writer.is_closing() and not reader.at_eof():
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0.005)
        return False
    writer.write(answer)
    await writer.drain()
    return b"Connection: close" not in answer and answer.startswith(b"HTTP/1.1 ")


def targets_file(path: Path, *targets: Mapping[str, object]) -> Path:
    """A TOML file with these targets. What a target does not say has a default, for a test."""
    text = ""
    for number, target in enumerate(targets):
        fields = {"name": f"target{number}", "types": ["*"], "secret": SECRET, **target}
        text += "[[target]]\n" + "".join(f"{name} = {_toml(value)}\n" for name, value in fields.items())
    path.write_text(text)
    return path


def _toml(value: object) -> str:
    return orjson.dumps(value).decode()
