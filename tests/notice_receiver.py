"""A receiver of notices on the loopback interface, over real HTTP, with any answer that a test needs.

Guarantees: `notices` are the bodies of the POSTs in their order, whatever was answered; `requests` are all request
lines with their headers. The next POSTs get the `answers`, then 200; a HEAD gets 405.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import orjson

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
SILENT = b""  # the connection is closed without an answer


def status(number: int, header: str = "") -> bytes:
    """An answer with that status, and another header."""
    return f"HTTP/1.1 {number} Reason\r\nContent-Length: 0\r\n{header}\r\n".encode()


@dataclass(slots=True)
class NoticeReceiver:
    """The server."""

    url: str = ""
    answers: list[bytes] = field(default_factory=list)
    notices: list[dict[str, Any]] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """All requests of one connection."""
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                lengths = [line[15:] for line in head.splitlines() if line.lower().startswith("content-length:")]
                body = await reader.readexactly(int(lengths[0]) if lengths else 0)
                self.requests.append(head)
                answer = status(405)
                if head.startswith("POST "):
                    self.notices.append(orjson.loads(body))
                    answer = self.answers.pop(0) if self.answers else OK
                writer.write(answer)
                await writer.drain()
                if not answer:
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def receiving_notices() -> AsyncIterator[NoticeReceiver]:
    """Serves while the block runs. The path of its address is a secret."""
    receiver = NoticeReceiver()
    server = await asyncio.start_server(receiver.serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    receiver.url = f"http://127.0.0.1:{port}/services/c4n4rypath"
    try:
        yield receiver
    finally:
        server.close()
