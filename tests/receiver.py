"""A webhook receiver that counts: the other side of everything that sends events.

Guarantees: the events in `answers` arrived with a valid signature, and were answered like that; a reply of None closes
the connection without one.
"""

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import orjson

from firstclaim.web.signature import verify
from tests.fixtures import SECRET

# Status and body; None closes the connection instead.
Reply = tuple[int, bytes] | None


def reply(status: int, action: str, *, processed: bool = False) -> Reply:
    return status, orjson.dumps({"event_id": None, "processed": processed, "action": action, "reason": None})


PROCESSED = reply(200, "load_effect_recorded", processed=True)


@dataclass(slots=True)
class Receiver:
    """Counts the deliveries; `respond` chooses the reply to each, in the thread of the request."""

    respond: Callable[[str], Reply]
    url: str = ""
    answers: list[tuple[str, Reply]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, body: bytes, signatures: list[str]) -> Reply:
        verify(body, signatures, [SECRET], tolerance_seconds=300, now=time.time())
        event_id = orjson.loads(body)["id"]
        chosen = self.respond(event_id)
        with self.lock:
            self.answers.append((event_id, chosen))
        return chosen


@contextmanager
def receiving(respond: Callable[[str], Reply], tls: ssl.SSLContext | None = None) -> Iterator[Receiver]:
    receiver = Receiver(respond)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            chosen = receiver.answer(body, self.headers.get_all("Stripe-Signature", []))
            if chosen is None:
                self.close_connection = True
                return
            status, content = chosen
            self.send_response(status)
            if 300 <= status < 400:
                self.send_header("Location", receiver.url)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True  # of connections that are kept
        request_queue_size = 128

        def get_request(self) -> tuple[socket.socket, Any]:
            connection, address = super().get_request()
            if tls is not None:  # the hands are shaken in the connection's own thread, at its first read
                connection = tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
            return connection, address

        def handle_error(self, *_: object) -> None:
            """A connection that the generator closed at its end."""

    with Server(("127.0.0.1", 0), Handler) as server:
        receiver.url = f"{'https' if tls else 'http'}://127.0.0.1:{server.server_port}/webhooks/stripe"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield receiver
        finally:
            server.shutdown()
            thread.join()
