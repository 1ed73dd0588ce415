"""The HTTP protocol of the server, with what uvicorn's leaves open closed: how much, how long, how many.

Guarantees, for every connection:

- A request whose line and headers are larger than `HEAD_MOST_BYTES` or have not arrived within `HEAD_SECONDS` is
  refused, and so is a socket that sends nothing, or nothing of a next request; so are trailers and extensions of
  chunks of that size. What comes in trailers is never taken for a header. A body that has not arrived within its
  seconds is refused too. (uvicorn has no limit for any of it: slow heads and idle sockets were still open after 8 s,
  and a header of 1 MB was accepted.) The body's size is the webhook's own. A request that comes in one piece, as
  nearly all do, arms no timer.
- One request at a time: what a client sends behind a request that is not answered yet is not looked at, and that
  answer is the last on the connection. (uvicorn queues a request for each 20 bytes it reads, without limit, and
  answers the garbage behind a delivery before the delivery.)
- Nobody is waited for who does not read: at `pause_writing` there are hundreds of answers unread.
- When the process is full, the `ConnectionLimiter` says who leaves.

What is refused is answered in the one JSON shape, and its sender gets to see the answer.
"""

import asyncio
import weakref
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import httptools
import structlog
from starlette.responses import Response
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from firstclaim import outcome as outcomes
from firstclaim.errors import Rejected
from firstclaim.observability import metrics
from firstclaim.server.connection_limiter import ConnectionLimiter
from firstclaim.web.webhook import answer, rejection

log = structlog.get_logger(__name__)

HEAD_MOST_BYTES = 32 * 1024  # Stripe's heads are under 2 kB, proxies add some; common servers allow 8 to 64 kB
HEAD_SECONDS = 10.0  # a slow mobile link needs one or two, and no sender of webhooks is on one
LEAVE_SECONDS = 2.0  # to read the last answer; closing at once would reset the connection under whoever still sends
_BETWEEN_HEADER_BYTES = 4  # the colon, a space, the end of the line
_FRAMING = (b"content-length", b"transfer-encoding")


class HttpProtocol(HttpToolsProtocol):
    """One connection, in one of these states: a head is due, a body is due, being answered, idle, leaving."""

    def __init__(
        self,
        lobby: ConnectionLimiter,
        body_seconds: float,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._lobby = lobby
        self._body_seconds = body_seconds
        self._timer: asyncio.TimerHandle | None = None
        self._seen_bytes = 0  # of the request, since it began or since something of its body came
        self._deaf = False  # nothing that comes is looked at any more

    # -- what the transport tells ---------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A new socket: its first head is due, if there is room for it."""
        super().connection_made(transport)
        self._exit = _Exit(self, transport)
        self._expect_head()
        if not self._lobby.arrive(self):
            self._send_away()

    def connection_lost(self, exc: Exception | None) -> None:
        """Gone: nothing is due any more."""
        self._disarm()
        self._lobby.leave(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes of a head, of a body, or of both."""
        self._unset_keepalive_if_required()
        if not self._deaf:
            self._seen_bytes += len(data)
            self._lobby.bring(self, len(data))
        if self._deaf:
            return
        try:
            self.parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            # An upgrade is declined by an ordinary answer.
            self._stop_reading(error.__context__)
        else:
            self._check_progress()

    def pause_writing(self) -> None:
        """So much of our answers is unread that nobody reads them."""
        self.transport.abort()

    def timeout_keep_alive_handler(self) -> None:
        """Idle for too long."""
        super().timeout_keep_alive_handler()
        self._within(LEAVE_SECONDS, self.transport.abort)

    # -- what the parser finds ------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """The first byte of a request, also of a later one on the same connection."""
        if self._unanswered:
            raise Rejected("pipelined", "One request at a time")  # ends the parsing; see _stop_reading
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """The head is here; it may still be too large, if it came in one piece."""
        self._disarm()
        if self._seen_bytes > HEAD_MOST_BYTES and self._head_bytes() > HEAD_MOST_BYTES:
            raise _too_large()
        if self.parser.should_upgrade() and any(name in _FRAMING for name, _ in self.headers):
            raise Rejected("upgrade", "Protocol upgrades are not supported")  # the parser skips the body of one
        super().on_headers_complete()
        self.cycle.transport = self._exit
        self.headers = []  # the request has the list there was; trailers come in here, and go nowhere

    def on_body(self, body: bytes) -> None:
        """Part of a body."""
        self._seen_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """All of a request is here."""
        self._disarm()
        super().on_message_complete()
        self._lobby.complete(self)

    def on_response_complete(self) -> None:
        """Answered: the connection is idle, or was the client's for the last time."""
        super().on_response_complete()
        self._seen_bytes = 0
        if self.transport.is_closing():
            self._within(LEAVE_SECONDS, self.transport.abort)
        elif self._deaf or self.cycle.more_body:  # a body that is still on its way is of no use now
            self._leave()
        else:
            self._lobby.expect(self)

    def close_when_heard(self) -> None:
        """The answer is the connection's last; who is still sending gets to read it."""
        if self.cycle.more_body:
            self._leave()
        else:
            self.transport.close()

    # -- who has to go --------------------------------------------------------------------------------

    def evict(self) -> None:
        """Make room for another: at once, and saying so to whoever has a request on the way."""
        if self.cycle is None or self._unanswered or self._seen_bytes:
            self._send_away()
        self.transport.close()
        self._within(LEAVE_SECONDS, self.transport.abort)

    def _send_away(self) -> None:
        self._say(answer(None, outcomes.unavailable("Too many connections")))

    def _check_progress(self) -> None:
        """Asked after parsing: the chunk may have ended the head and begun a large body."""
        if self._unanswered_whole:
            return
        if self._seen_bytes > HEAD_MOST_BYTES:
            self._refuse(_too_large())
        elif self._timer is None:
            if self._unanswered:
                self._within(self._body_seconds, self._body_too_slow)
            else:
                self._expect_head()

    def _stop_reading(self, cause: object) -> None:
        if self._unanswered_whole:
            self._deaf = True  # it was sent behind a request, whose answer is now the last
        else:
            malformed = Rejected("malformed", "Malformed HTTP request")
            self._refuse(cause if isinstance(cause, Rejected) else malformed)

    def _head_too_slow(self) -> None:
        self._refuse(Rejected("head_too_slow", "Headers took too long to arrive", HTTPStatus.REQUEST_TIMEOUT))

    def _body_too_slow(self) -> None:
        self._refuse(Rejected("body_too_slow", "Body took too long to arrive", HTTPStatus.REQUEST_TIMEOUT))

    def _refuse(self, error: Rejected) -> None:
        log.info("rejected", kind=error.kind, status=int(error.status))
        metrics.rejected[error.kind].inc()
        self._say(rejection(error))

    def _say(self, response: Response) -> None:
        """The last answer, outside of any request's own."""
        if self._deaf or self.transport.is_closing():
            return
        response.headers["Connection"] = "close"
        head = b"".join(b"%s: %s\r\n" % header for header in response.raw_headers)
        line = f"HTTP/1.1 {response.status_code} {HTTPStatus(response.status_code).phrase}\r\n".encode()
        self.transport.write(line + head + b"\r\n" + bytes(response.body))
        self._leave()

    def _leave(self) -> None:
        """Nothing more is read or said; the socket stays until the other side has read, and not for long."""
        self._deaf = True
        if self._unanswered:
            self.cycle.disconnected = True  # to whoever still reads its body
            self.cycle.message_event.set()
        self._unset_keepalive_if_required()
        self.transport.write_eof()
        self._lobby.expect(self)
        self._within(LEAVE_SECONDS, self.transport.abort)

    # -- where it stands ------------------------------------------------------------------------------

    @property
    def _unanswered(self) -> bool:
        """Whether a request has begun to be handled, and has no answer yet."""
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def _unanswered_whole(self) -> bool:
        """Whether it is here to its end as well."""
        return self._unanswered and not self.cycle.more_body

    def _head_bytes(self) -> int:
        lines = (len(name) + len(value) + _BETWEEN_HEADER_BYTES for name, value in self.headers)
        return len(self.url) + sum(lines)

    def _expect_head(self) -> None:
        self._within(HEAD_SECONDS, self._head_too_slow)

    def _within(self, seconds: float, otherwise: Callable[[], None]) -> None:
        """One thing is due at a time."""
        self._disarm()
        self._timer = self.loop.call_later(seconds, otherwise)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class _Exit(asyncio.Transport):
    """The transport for whoever answers: uvicorn closes it with the last answer, also in the face of a body."""

    def __init__(self, door: HttpProtocol, transport: asyncio.Transport) -> None:
        super().__init__()
        self._door = weakref.ref(door)  # it holds us: a circle would keep its buffers until the collector comes
        self.write = transport.write  # type: ignore[method-assign]
        self.is_closing = transport.is_closing  # type: ignore[method-assign]

    def close(self) -> None:
        """A socket closed over unread bytes is reset, and the answer is often lost with it."""
        if (door := self._door()) is not None:
            door.close_when_heard()


def _too_large() -> Rejected:
    return Rejected("head_too_large", "Headers are too large", HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
