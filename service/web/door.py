"""The HTTP protocol of the server, with what uvicorn's leaves open closed: the head of a request.

Guarantees: a request whose line and headers are larger than `HEAD_MOST_BYTES` or have not arrived within
`HEAD_SECONDS` is refused and its connection closed, and so is a socket that sends nothing; what is no HTTP at
all is answered in the one JSON shape. (uvicorn has no limit for either: slow heads and idle sockets were still
open after 8 s, and a header of 1 MB was accepted.) The body's size and time are the webhook's own.
"""

import asyncio
from http import HTTPStatus

import structlog
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.errors import Rejected
from service.web.webhook import rejection

log = structlog.get_logger(__name__)

HEAD_MOST_BYTES = 32 * 1024  # Stripe's heads are under 2 kB, proxies add some; common servers allow 8 to 64 kB
HEAD_SECONDS = 10.0  # a slow mobile link needs one or two, and no sender of webhooks is on one


class Door(HttpToolsProtocol):
    """One connection."""

    _timer: asyncio.TimerHandle | None = None
    _seen_bytes = 0  # of the head that is arriving

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A new socket: its first head is due."""
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Gone: nothing is due any more."""
        self._head_is_here()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes of a head, of a body, or of both."""
        self._seen_bytes += len(data)
        super().data_received(data)
        # Asked after parsing: the chunk may have ended the head and begun a large body.
        if self._timer is not None and self._seen_bytes > HEAD_MOST_BYTES:
            self._refuse("head_too_large", "Headers are too large", HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)

    def on_message_begin(self) -> None:
        """The first byte of a request, also of a later one on the same connection."""
        super().on_message_begin()
        if self._timer is None:
            self._expect_head()

    def on_headers_complete(self) -> None:
        """The head is here; it may still be too large, if it came in one piece."""
        self._head_is_here()
        if sum(len(name) + len(value) for name, value in self.headers) + len(self.url) > HEAD_MOST_BYTES:
            self._refuse("head_too_large", "Headers are too large", HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
            return
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Part of a body; of a refused request nobody reads it."""
        if not self.transport.is_closing():
            super().on_body(body)

    def on_message_complete(self) -> None:
        """The end of a request; a refused one has no cycle to end."""
        if not self.transport.is_closing():
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """What the parser could not read."""
        del msg
        self._refuse("malformed", "Malformed HTTP request", HTTPStatus.BAD_REQUEST)

    def _expect_head(self) -> None:
        self._seen_bytes = 0
        self._timer = self.loop.call_later(HEAD_SECONDS, self._too_slow)

    def _head_is_here(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        self._refuse("head_too_slow", "Headers took too long to arrive", HTTPStatus.REQUEST_TIMEOUT)

    def _refuse(self, kind: str, reason: str, status: HTTPStatus) -> None:
        self._head_is_here()
        if self.transport.is_closing():
            return
        log.info("rejected", kind=kind, status=status.value)
        response = rejection(Rejected(kind, reason, status.value))
        response.headers["Connection"] = "close"
        head = b"".join(b"%s: %s\r\n" % header for header in response.raw_headers)
        line = f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode()
        self.transport.write(line + head + b"\r\n" + bytes(response.body))
        self.transport.close()
