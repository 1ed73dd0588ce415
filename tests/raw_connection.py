"""A raw connection to an HTTP server: sends any bytes at any pace, and reads every byte up to the end of the stream."""

import asyncio
from typing import NamedTuple

import orjson

ANSWER_SECONDS = 30.0  # a server that has not answered by then hangs, even on a busy machine


class Reply(NamedTuple):
    """One answer with a Content-Length. The head is in lower case."""

    status: int
    head: bytes
    body: bytes


class RawConnection:
    """One connection to a port of 127.0.0.1."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def open(cls, port: int, *chunks: bytes) -> "RawConnection":
        """Connect, and send the chunks."""
        connection = cls(*await asyncio.open_connection("127.0.0.1", port))
        await connection.send(*chunks)
        return connection

    async def send(self, *chunks: bytes) -> None:
        """Send the chunks one after the other. Raises ConnectionError."""
        for chunk in chunks:
            self._writer.write(chunk)
            await self._writer.drain()

    def end(self) -> None:
        """Send no more, and go on reading."""
        self._writer.write_eof()

    async def head(self) -> bytes:
        """The next head, in lower case."""
        return (await self._reader.readuntil(b"\r\n\r\n")).lower()

    async def reply(self) -> Reply:
        """The next answer."""
        async with asyncio.timeout(ANSWER_SECONDS):
            head = await self.head()
            length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
            return Reply(int(head.split(b" ")[1]), head, await self._reader.readexactly(length))

    async def rest(self, seconds: float = ANSWER_SECONDS) -> bytes:
        """All bytes until the server closes its side."""
        async with asyncio.timeout(seconds):
            return await self._reader.read()

    async def refusal(self) -> tuple[int, str]:
        """Status and reason. Fails unless the answer is a JSON rejection and the last one on the connection."""
        status, head, body = await self.reply()
        assert b"\r\nconnection: close\r\n" in head
        assert await self.rest() == b""
        return status, reason_of(status, body)

    def abort(self) -> None:
        """Close the connection at once."""
        self._writer.transport.abort()


def reason_of(status: int, body: bytes) -> str:
    """The reason in a refusal's body. Fails unless the body is a JSON rejection."""
    fields = orjson.loads(body)
    reason = fields.pop("reason")
    action = "unavailable" if status == 503 else "rejected"
    assert fields == {"event_id": None, "processed": False, "action": action}
    assert isinstance(reason, str)
    return reason
