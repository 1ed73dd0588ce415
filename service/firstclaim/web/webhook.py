"""POST /webhooks/stripe: bytes in, one honest answer out.

Guarantees: the signature is checked over the raw bytes before they are parsed; the body is capped in size (its
time is the door's business); every answer has the one JSON shape; the table `STATUS` is the only place where an
outcome becomes a status code. A 500 or 503 is always safe to retry.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

import orjson
import structlog
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from firstclaim import outcome as outcomes
from firstclaim.errors import Rejected
from firstclaim.event import Delivery, parse_event
from firstclaim.inbox.pipeline import Pipeline
from firstclaim.observability import metrics, tracing
from firstclaim.outcome import Kind, Outcome
from firstclaim.web.signature import verify

log = structlog.get_logger(__name__)

WEBHOOK_PATH = "/webhooks/stripe"
STATUS: dict[Kind, tuple[int, bool]] = {  # (HTTP status, processed)
    Kind.PROCESSED: (200, True),
    Kind.UNHANDLED: (200, True),
    Kind.DUPLICATE: (200, False),
    Kind.DEFERRED: (202, False),
    Kind.FAILED: (500, False),
    Kind.DEAD: (200, False),
    Kind.UNAVAILABLE: (503, False),
}
_RETRY_AFTER_SECONDS = "5"  # an outage shorter than this is not worth a retry; Stripe has its own pace anyway


@dataclass(frozen=True, slots=True)
class Webhook:
    """The endpoint."""

    pipeline: Pipeline
    secrets: Sequence[str]
    tolerance_seconds: int
    body_most_bytes: int

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Verify, parse, hand to the pipeline, answer: an ASGI application of its own."""
        headers = Headers(scope=scope)
        with tracing.delivery_span(headers):
            response = await self._receive(headers, receive)
        await response(scope, receive, send)

    async def _receive(self, headers: Headers, receive: Receive) -> Response:
        began = time.perf_counter()
        try:
            body = await self._read(headers, receive)
            verify(
                body,
                headers.getlist("stripe-signature"),
                self.secrets,
                tolerance_seconds=self.tolerance_seconds,
                now=time.time(),
            )
            event = parse_event(body)
        except Rejected as error:
            log.info("rejected", kind=error.kind, status=error.status)
            metrics.rejected[error.kind].inc()
            tracing.note(error=error.kind)
            return rejection(error)
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads it
        except asyncio.CancelledError:  # the server gave up waiting for this body: it is shutting down
            return answer(None, outcomes.unavailable("Shutting down"))
        result = await self._deliver(Delivery(event, body))
        metrics.deliveries[result.kind].inc()
        tracing.note(event_id=event.id, type=event.type, outcome=result.kind, attempt=result.attempt)
        log.info(
            "delivery",
            event_id=event.id,
            type=event.type,
            outcome=result.kind,
            attempt=result.attempt,
            milliseconds=round((time.perf_counter() - began) * 1000, 1),
        )
        return answer(event.id, result)

    async def _deliver(self, delivery: Delivery) -> Outcome:
        try:
            return await self.pipeline.deliver(delivery)
        except asyncio.CancelledError:  # shutting down; the work goes on in its own task
            return outcomes.unavailable("Shutting down")

    async def _read(self, headers: Headers, receive: Receive) -> bytes:
        """The raw body, within the cap; raises `Rejected` (413), and `ClientDisconnect`."""
        if not _is_at_most(headers.get("content-length", "0").strip(" \t"), self.body_most_bytes):
            raise self._too_large()
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            body += message.get("body", b"")
            if len(body) > self.body_most_bytes:
                raise self._too_large()
            more = message.get("more_body", False)
        return bytes(body)

    def _too_large(self) -> Rejected:
        return Rejected("body_too_large", f"Body is larger than {self.body_most_bytes} bytes", 413)


def _is_at_most(declared: str, most: int) -> bool:
    """Whether a Content-Length is a number, and one of up to `most`; a server before us may let odd ones pass."""
    return declared.isascii() and declared.isdigit() and len(declared) < 12 and int(declared) <= most


def answer(event_id: str | None, result: Outcome) -> Response:
    """The response for an outcome; errors name no event."""
    status, processed = STATUS[result.kind]
    headers = {"Retry-After": _RETRY_AFTER_SECONDS} if status == 503 else {}
    return _respond(status, event_id if status < 400 else None, processed, result.action, result.reason, headers)


def rejection(error: Rejected) -> Response:
    """The response for what was refused; the connection is closed when its body was not read to the end."""
    headers = {"Connection": "close"} if error.status == 413 else {}
    return _respond(error.status, None, False, "rejected", error.reason, headers)


async def refuse_path(_request: Request, error: Exception) -> Response:
    """404 and 405 in the one shape, the header `Allow` kept."""
    status = error.status_code if isinstance(error, HTTPException) else 404
    reason = "Method not allowed" if status == 405 else f"No such path: webhooks go to POST {WEBHOOK_PATH}"
    metrics.rejected["path"].inc()
    response = rejection(Rejected("path", reason, status))
    response.headers.update(getattr(error, "headers", None) or {})
    return response


def _respond(
    status: int,
    event_id: str | None,
    processed: bool,
    action: str,
    reason: str | None,
    headers: dict[str, str],
) -> Response:
    body = {"event_id": event_id, "processed": processed, "action": action, "reason": reason}
    return Response(orjson.dumps(body), status, headers, media_type="application/json")
