"""An endpoint, by default POST /webhooks/stripe: reads a delivery, passes it on, and answers with the outcome.

Guarantees: the signature is verified over the raw bytes before they are looked at. The size of a body is limited here,
and the time that it may take in `firstclaim.server.protocol`. A delivery that is answered with 500 or 503 can always be
sent again. A named endpoint, POST /webhooks/stripe/{name}, takes only what is signed with a secret of its own: the name
of a delivery is as trustworthy as its signature.

It is plain ASGI, without a framework's request and response, because most deliveries of a burst are duplicates, and
most of the cost of a duplicate is that of HTTP.
"""

import asyncio
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import structlog
from starlette.types import Receive, Scope, Send

from firstclaim import outcome as outcomes
from firstclaim.errors import Rejected
from firstclaim.event import Delivery
from firstclaim.inbox.pipeline import Pipeline
from firstclaim.observability import metrics, tracing
from firstclaim.outcome import Outcome
from firstclaim.web.answers import Answer, Header, answer, rejection
from firstclaim.web.first_look import first_look
from firstclaim.web.refusals import RefusalLog
from firstclaim.web.signature import verify

log = structlog.get_logger(__name__)

WEBHOOK_PATH = "/webhooks/stripe"  # the default


class _DisconnectedError(Exception):
    """The client disconnected before its body was complete."""


@dataclass(frozen=True, slots=True)
class Webhook:
    """One endpoint, an ASGI application of its own. `name`: its name, if it has one."""

    pipeline: Pipeline
    secrets: Sequence[str]
    tolerance_seconds: int
    max_body_bytes: int
    name: str | None = None
    refusals: RefusalLog = field(default_factory=RefusalLog)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Verify, deliver to the pipeline, answer."""
        headers: list[Header] = scope["headers"]
        with tracing.delivery_span(headers):
            reply = await self._receive(headers, receive)
        await reply(scope, receive, send)

    async def _receive(self, headers: Iterable[Header], receive: Receive) -> Answer:
        began = time.perf_counter()
        try:
            length, signatures = _relevant(headers)
            body = await self._read(length, receive)
            verify(body, signatures, self.secrets, tolerance_seconds=self.tolerance_seconds, now=time.time())
            self._count("verified")
            delivery = first_look(body, headers, self.name)
            result = await self._deliver(delivery)
        except Rejected as error:
            self.refusals.note(error, **self._named)
            metrics.rejected[error.kind].inc()
            if error.kind.startswith("signature_"):
                self._count("signature_refused")
            tracing.note(error=error.kind, **self._named)
            return rejection(error)
        except _DisconnectedError:
            return Answer(400, b"", ())  # the client does not read it
        except asyncio.CancelledError:  # the server is shutting down and no longer waits for this body
            return answer(None, outcomes.unavailable("Shutting down"))
        metrics.deliveries[result.kind].inc()
        tracing.note(
            event_id=delivery.event_id, type=delivery.type, outcome=result.kind, attempt=result.attempt, **self._named
        )
        log.info(
            "delivery",
            event_id=delivery.event_id,
            type=delivery.type,
            outcome=result.kind,
            attempt=result.attempt,
            milliseconds=round((time.perf_counter() - began) * 1000, 1),
            **self._named,
        )
        return answer(delivery.event_id, result)

    @property
    def _named(self) -> dict[str, str]:
        """The field of log records and spans."""
        return {} if self.name is None else {"endpoint": self.name}

    def _count(self, verification: metrics.Verification) -> None:
        metrics.endpoint_requests(self.name)[verification].inc()

    async def _deliver(self, delivery: Delivery) -> Outcome:
        try:
            return await self.pipeline.deliver(delivery)
        except asyncio.CancelledError:  # shutting down; the work continues in its own task
            return outcomes.unavailable("Shutting down")

    async def _read(self, length: bytes, receive: Receive) -> bytes:
        """The raw body. Raises `Rejected` (413) if it is too large, and `_DisconnectedError`."""
        if not _is_at_most(length.strip(b" \t"), self.max_body_bytes):
            raise self._too_large()
        pieces, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _DisconnectedError
            pieces.append(message.get("body", b""))
            size += len(pieces[-1])
            if size > self.max_body_bytes:
                raise self._too_large()
            more = message.get("more_body", False)
        return b"".join(pieces)  # of one piece, as nearly all are, it is that one

    def _too_large(self) -> Rejected:
        return Rejected("body_too_large", f"Body is larger than {self.max_body_bytes} bytes", 413)


def _relevant(headers: Iterable[Header]) -> tuple[bytes, list[str]]:
    """The first Content-Length, or 0, and all values of Stripe-Signature."""
    length, signatures = None, []
    for name, value in headers:
        if name == b"stripe-signature":
            signatures.append(value.decode("latin-1"))
        elif name == b"content-length" and length is None:
            length = value
    return b"0" if length is None else length, signatures


def _is_at_most(declared: bytes, limit: int) -> bool:
    """Whether a Content-Length is a number up to `limit`. (A proxy in front of the service may pass malformed ones.)"""
    return declared.isdigit() and len(declared) < 12 and int(declared) <= limit
