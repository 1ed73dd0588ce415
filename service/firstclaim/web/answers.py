"""The answers: a status, and the same four JSON fields for each of them.

Guarantees: the table `STATUS` is the only place that turns an outcome into a status code. The answer to an error names
no event. A 503 says when to send the event again.

Under `serve` an answer goes to its connection as a whole, by an extension of the scope, and under any other server as
the two messages of ASGI.
"""

from dataclasses import dataclass
from typing import Any

import orjson
from starlette.types import Receive, Scope, Send

from firstclaim.errors import Rejected
from firstclaim.outcome import Kind, Outcome

STATUS: dict[Kind, tuple[int, bool]] = {  # (HTTP status, processed)
    Kind.PROCESSED: (200, True),
    Kind.UNHANDLED: (200, True),
    Kind.DUPLICATE: (200, False),
    Kind.DEFERRED: (202, False),
    Kind.FAILED: (500, False),
    Kind.DEAD: (200, False),
    Kind.UNAVAILABLE: (503, False),
}
_RETRY_AFTER = (b"retry-after", b"5")  # sooner, a retry would meet the same outage (Stripe retries on its own schedule)
CLOSE = (b"connection", b"close")
_JSON = (b"content-type", b"application/json")

WHOLE_ANSWER = "firstclaim.answer"
"""The name of the scope's extension: `{"send": function}`, which sends an `Answer`, and returns whether it could."""

_NO_EXTENSIONS: dict[str, Any] = {}

Header = tuple[bytes, bytes]


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer, which is an ASGI application: it sends itself. `headers` are all of them, with names in lower case."""

    status: int
    body: bytes
    headers: tuple[Header, ...]

    async def __call__(self, scope: Scope, _receive: Receive, send: Send) -> None:
        """Send it."""
        extension = scope.get("extensions", _NO_EXTENSIONS).get(WHOLE_ANSWER)
        if extension is not None and extension["send"](self):
            return
        await send({"type": "http.response.start", "status": self.status, "headers": list(self.headers)})
        await send({"type": "http.response.body", "body": self.body})


def answer(event_id: str | None, result: Outcome) -> Answer:
    """The answer for an outcome. The answer for an error names no event."""
    status, processed = STATUS[result.kind]
    headers = (_RETRY_AFTER,) if status == 503 else ()
    return _answer(status, event_id if status < 400 else None, processed, result.action, result.reason, headers)


def rejection(error: Rejected) -> Answer:
    """The answer for a refused request. A 413 closes the connection, because the body was not read to its end."""
    headers = (CLOSE,) if error.status == 413 else ()
    return _answer(error.status, None, False, "rejected", error.reason, headers)


def _answer(
    status: int,
    event_id: str | None,
    processed: bool,
    action: str,
    reason: str | None,
    headers: tuple[Header, ...],
) -> Answer:
    body = orjson.dumps({"event_id": event_id, "processed": processed, "action": action, "reason": reason})
    return Answer(status, body, (*headers, (b"content-length", b"%d" % len(body)), _JSON))
