"""The HTTP protocol of one connection: uvicorn's, plus limits on size, time and number.

Guarantees, for every connection:

- A request is refused if its request line and headers exceed `MAX_HEAD_BYTES` or take longer than `HEAD_SECONDS`. The
  same limits hold for a connection that sends nothing, or no next request, and for trailers and chunk extensions. A
  body that takes longer than its limit is refused too. (uvicorn limits none of this: slow heads and idle sockets were
  still open after 8 s, and a header of 1 MB was accepted.) The webhook limits the size of the body.
- Trailers are never treated as headers.
- A request that arrives in one piece, as nearly all do, starts no timer.
- One request at a time. Bytes that arrive behind an unanswered request are not parsed, and the answer to that request
  is the last one on the connection. (uvicorn queues a request for each 20 bytes that it reads, without limit, and
  answers garbage that follows a delivery before it answers the delivery.)
- A client that ends its side of the connection after a complete request (`shutdown(SHUT_WR)`) gets its answer. (uvicorn
  closes the connection: the request was processed and never answered.)
- A client that does not read its answers is disconnected: when more is unread than the transport buffers, no further
  answer is written, and the connection is aborted `UNREAD_SECONDS` after the client has last read. A large answer
  (a payload's page, `/metrics` of many handlers) fills that buffer at once, however fast the client reads.
- When the process has too many connections or buffered bytes, the `ConnectionLimiter` decides which one is evicted.

A refused request is answered in the same JSON form as all others, and its sender can read that answer.
"""

import asyncio
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from typing import Any

import httptools
import structlog
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from firstclaim import outcome as outcomes
from firstclaim.errors import Rejected
from firstclaim.observability import metrics
from firstclaim.server.answer_transport import AnswerTransport, as_sent
from firstclaim.server.connection_limiter import ConnectionLimiter
from firstclaim.web.answers import CLOSE, WHOLE_ANSWER, Answer, answer, rejection

log = structlog.get_logger(__name__)

MAX_HEAD_BYTES = 32 * 1024  # Stripe's heads are under 2 kB, and proxies add some; common servers allow 8 to 64 kB
HEAD_SECONDS = 10.0  # a slow mobile link needs one or two, and no sender of webhooks uses one
UNREAD_SECONDS = 10.0  # for a client to read some more of what the transport's buffer has no room for
# For the client to read the last answer, or some more of it; closing at once would reset a client that still sends.
LINGER_SECONDS = 2.0
_BETWEEN_HEADER_BYTES = 4  # the colon, a space, the end of the line
_FRAMING = (b"content-length", b"transfer-encoding")


class HttpProtocol(HttpToolsProtocol):
    """One connection. Its states: awaiting a head, awaiting a body, answering, idle, lingering before it closes."""

    def __init__(
        self,
        limiter: ConnectionLimiter,
        body_seconds: float,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._limiter = limiter
        self._body_seconds = body_seconds
        self._timer: asyncio.TimerHandle | None = None
        self._received_bytes = 0  # of this request, since its first byte or since the last piece of its body
        self._ignoring_input = False  # once true, received bytes are discarded
        self._unread_timer: asyncio.TimerHandle | None = None

    # -- callbacks of the transport -------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A new connection: await its first head, or refuse it if there is no capacity."""
        super().connection_made(transport)
        self._answer_transport = AnswerTransport(self, transport)
        self._extensions: dict[str, dict[object, object]] = {WHOLE_ANSWER: {"send": self._answer_transport.send_whole}}
        self._await_head()
        if not self._limiter.opened(self):
            self._refuse_overload()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed."""
        self._clear_timer()
        self._clear_unread_timer()
        self._limiter.closed(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Received bytes: of a head, of a body, or of both."""
        self._unset_keepalive_if_required()
        if not self._ignoring_input:
            self._received_bytes += len(data)
            self._limiter.received(self, len(data))
        if self._ignoring_input:
            return
        try:
            self.parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            # A request to upgrade gets an ordinary answer.
            self._stop_reading(error.__context__)
        else:
            self._check_progress()

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client sends no more. Returns whether the connection stays open: until a complete request is answered."""
        if not self._unanswered_complete:
            return False
        self._ignoring_input = True
        self.cycle.keep_alive = False  # the answer is the last
        return True

    def pause_writing(self) -> None:
        """More is unread than the transport buffers: no further answer is written until the client has read."""
        super().pause_writing()
        self._await_reading(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        """The client has read nearly all."""
        self._clear_unread_timer()
        super().resume_writing()

    def _await_reading(self, unread_bytes: int) -> None:
        self._unread_timer = self.loop.call_later(UNREAD_SECONDS, self._check_reading, unread_bytes)

    def _check_reading(self, unread_before: int) -> None:
        unread = self.transport.get_write_buffer_size()
        if unread < unread_before:
            self._await_reading(unread)
        else:
            self.transport.abort()

    def _clear_unread_timer(self) -> None:
        if self._unread_timer is not None:
            self._unread_timer.cancel()
            self._unread_timer = None

    def timeout_keep_alive_handler(self) -> None:
        """The connection was idle for too long."""
        super().timeout_keep_alive_handler()
        self._set_timer(LINGER_SECONDS, self.transport.abort)

    # -- callbacks of the parser ----------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """The first byte of a request: the first on this connection, or a later one."""
        if self._unanswered:
            raise Rejected("pipelined", "One request at a time")  # stops the parser; see _stop_reading
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """The head is complete. It may still be too large, if it arrived in one piece."""
        self._clear_timer()
        if self._received_bytes > MAX_HEAD_BYTES and self._head_bytes() > MAX_HEAD_BYTES:
            raise _too_large()
        if b"#" in self.url:  # no valid request target; the path in front of it would be served
            raise Rejected("malformed", "Malformed HTTP request")
        if self.parser.should_upgrade() and any(name in _FRAMING for name, _ in self.headers):
            raise Rejected("upgrade", "Protocol upgrades are not supported")  # the parser would skip its body
        super().on_headers_complete()
        self._answer_transport.begin(self.cycle)
        self.scope["extensions"] = self._extensions
        self.headers = []  # the request keeps the old list; trailers are appended to this one, which nobody reads

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        self._received_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is complete."""
        self._clear_timer()
        super().on_message_complete()
        self._limiter.request_complete(self)

    def on_response_complete(self) -> None:
        """The answer is sent: the connection becomes idle, or closes."""
        self._answer_transport.flush()
        super().on_response_complete()
        self._received_bytes = 0
        if self.transport.is_closing():
            self._set_timer(LINGER_SECONDS, self._check_lingering)
        elif self._ignoring_input or self.cycle.more_body:  # nobody reads the rest of that body
            self._linger()
        else:
            self._limiter.request_awaited(self)

    def send_whole(self, whole: Answer) -> bool:
        """Send the answer to the request in one step. False if that has to wait, or if nobody awaits an answer.

        uvicorn's own steps look at each header with regular expressions: 6 us of a duplicate's 113 (measured).
        """
        cycle = self.cycle
        if self.flow.write_paused or cycle.disconnected or cycle.response_started:
            return False
        cycle.response_started = cycle.response_complete = True
        headers = [*self.server_state.default_headers, *whole.headers]
        if CLOSE in whole.headers:
            cycle.keep_alive = False
        elif not cycle.keep_alive:
            headers.append(CLOSE)
        self.transport.write(as_sent(whole.status, headers, whole.body))
        if not cycle.keep_alive:
            self.close_after_answer()
        self.on_response_complete()
        return True

    def close_after_answer(self) -> None:
        """Close after the last answer. A client that is still sending its body gets time to read the answer."""
        if self.cycle.more_body:
            self._linger()
        else:
            self.transport.close()

    # -- eviction and refusal -------------------------------------------------------------------------

    def evict(self) -> None:
        """Close this connection at once, because the process is at a limit. A client that is mid-request gets a 503."""
        if self.cycle is None or self._unanswered or self._received_bytes:
            self._refuse_overload()
        self.transport.close()
        self._set_timer(LINGER_SECONDS, self.transport.abort)

    def _refuse_overload(self) -> None:
        self._send_last(answer(None, outcomes.unavailable("Too many connections")))

    def _check_progress(self) -> None:
        """Check the limits. Called after parsing, because the bytes may have ended the head and begun a large body."""
        if self._unanswered_complete:
            return
        if self._received_bytes > MAX_HEAD_BYTES:
            self._refuse(_too_large())
        elif self._timer is None:
            if self._unanswered:
                self._set_timer(self._body_seconds, self._body_timed_out)
            else:
                self._await_head()

    def _stop_reading(self, cause: object) -> None:
        if self._unanswered_complete:
            self._ignoring_input = True  # sent behind an unanswered request, whose answer is now the last
        else:
            malformed = Rejected("malformed", "Malformed HTTP request")
            self._refuse(cause if isinstance(cause, Rejected) else malformed)

    def _head_timed_out(self) -> None:
        self._refuse(Rejected("head_too_slow", "Headers took too long to arrive", HTTPStatus.REQUEST_TIMEOUT))

    def _body_timed_out(self) -> None:
        self._refuse(Rejected("body_too_slow", "Body took too long to arrive", HTTPStatus.REQUEST_TIMEOUT))

    def _refuse(self, error: Rejected) -> None:
        log.info("rejected", kind=error.kind, status=int(error.status))
        metrics.rejected[error.kind].inc()
        self._send_last(rejection(error))

    def _send_last(self, last: Answer) -> None:
        """Send the last answer of the connection, outside of a request's own answer."""
        if self._ignoring_input or self.transport.is_closing():
            return
        headers = dict((*last.headers, CLOSE))
        self.transport.write(as_sent(last.status, headers.items(), last.body))
        self._linger()

    def _linger(self) -> None:
        """Stop reading and writing. The socket stays open for a short time, so that the client can read the answer."""
        self._ignoring_input = True
        if self._unanswered:
            self.cycle.disconnected = True  # tells the application, which may still read the body
            self.cycle.message_event.set()
        self._unset_keepalive_if_required()
        self.transport.write_eof()
        self._limiter.request_awaited(self)
        self._set_timer(LINGER_SECONDS, self._check_lingering)

    def _check_lingering(self, unread_before: int | None = None) -> None:
        """Abort, unless the client still reads a last answer that was larger than the buffers."""
        unread = self.transport.get_write_buffer_size()
        if unread and (unread_before is None or unread < unread_before):
            self._set_timer(LINGER_SECONDS, partial(self._check_lingering, unread))
        else:
            self.transport.abort()

    # -- state ----------------------------------------------------------------------------------------

    @property
    def _unanswered(self) -> bool:
        """Whether a request was passed to the application and is not answered yet."""
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def _unanswered_complete(self) -> bool:
        """Whether that request is complete."""
        return self._unanswered and not self.cycle.more_body

    def _head_bytes(self) -> int:
        lines = (len(name) + len(value) + _BETWEEN_HEADER_BYTES for name, value in self.headers)
        return len(self.url) + sum(lines)

    def _await_head(self) -> None:
        self._set_timer(HEAD_SECONDS, self._head_timed_out)

    def _set_timer(self, seconds: float, on_expiry: Callable[[], None]) -> None:
        """Set the connection's only timer, in place of the one that runs."""
        self._clear_timer()
        self._timer = self.loop.call_later(seconds, on_expiry)

    def _clear_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _too_large() -> Rejected:
    return Rejected("head_too_large", "Headers are too large", HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
