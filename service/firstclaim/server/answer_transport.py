"""The transport that answers are written to, each in one piece if it is not streamed.

Guarantees: head and body of an answer take one system call and one packet, however it is sent. (uvicorn writes the head
before the body is there.) The connection's protocol closes the transport after the last answer. (uvicorn closes it even
over an unread body.)
"""

import asyncio
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

from firstclaim.web.answers import Answer, Header

if TYPE_CHECKING:
    from firstclaim.server.protocol import HttpProtocol

_INTERIM = b"HTTP/1.1 1"  # 100 Continue: the client sends its body after it


class AnswerTransport(asyncio.Transport):
    """The transport of a connection, as uvicorn's requests have it."""

    def __init__(self, protocol: "HttpProtocol", transport: asyncio.Transport) -> None:
        super().__init__()
        self._protocol = weakref.ref(protocol)  # weak: a cycle would keep the buffers until the next collection
        self._send = transport.write
        self._head_is_next = False
        self._head = b""  # written, and not sent yet
        self.is_closing = transport.is_closing  # type: ignore[method-assign]

    def begin(self, cycle: RequestResponseCycle) -> None:
        """The answer of `cycle` is the next one."""
        cycle.transport = self
        self._head_is_next = True

    def write(self, data: Any) -> None:
        """Keep the head of an answer until a piece of its body follows."""
        if self._head_is_next and not data.startswith(_INTERIM):
            self._head_is_next, self._head = False, data
        else:
            self._send(self._head + data)
            self._head = b""

    def send_whole(self, whole: Answer) -> bool:
        """Send an answer in one step, and return whether it could be."""
        protocol = self._protocol()
        return protocol is not None and protocol.send_whole(whole)

    def flush(self) -> None:
        """The answer is complete: send a head that no body has followed, as after HEAD."""
        if self._head:
            self.write(b"")

    def close(self) -> None:
        """Leave closing to the protocol: a socket closed over unread bytes is reset, which often loses the answer."""
        self.flush()
        if (protocol := self._protocol()) is not None:
            protocol.close_after_answer()


def as_sent(status: int, headers: Iterable[Header], body: bytes) -> bytes:
    """An answer as it is sent."""
    head = b"".join([b"%b: %b\r\n" % header for header in headers])
    return b"%b%b\r\n%b" % (STATUS_LINE[status], head, body)
