"""The endpoint, by default POST /webhooks/stripe: reads a delivery, passes it on, and answers with the outcome.

Guarantees: the signature is verified over the raw bytes before they are parsed. The size of a body is limited here, and
the time that it may take in `firstclaim.server.protocol`. Every answer has the same JSON fields. The table `STATUS` is
the only place that turns an outcome into a status code. A delivery that is answered with 500 or 503 can always be sent
again.
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

WEBHOOK_PATH = "/webhooks/stripe"  # the default
STATUS: dict[Kind, tuple[int, bool]] = {  # (HTTP status, processed)
    Kind.PROCESSED: (200, True),
    Kind.UNHANDLED: (200, True),
    Kind.DUPLICATE: (200, False),
    Kind.DEFERRED: (202, False),
    Kind.FAILED: (500, False),
    Kind.DEAD: (200, False),
    Kind.UNAVAILABLE: (503, False),
}
_RETRY_AFTER_SECONDS = "5"  # sooner, a retry would meet the same outage (Stripe retries on a schedule of its own)


@dataclass(frozen=True, slots=True)
class Webhook:
    """The endpoint, an ASGI application of its own."""

    pipeline: Pipeline
    secrets: Sequence[str]
    tolerance_seconds: int
    max_body_bytes: int

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Verify, parse, deliver to the pipeline, answer."""
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
            return Response(status_code=400)  # the client is gone and does not read it
        except asyncio.CancelledError:  # the server is shutting down and no longer waits for this body
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
        except asyncio.CancelledError:  # shutting down; the work continues in its own task
            return outcomes.unavailable("Shutting down")

    async def _read(self, headers: Headers, receive: Receive) -> bytes:
        """The raw body. Raises `Rejected` (413) if it is too large, and `ClientDisconnect`."""
        if not _is_at_most(headers.get("content-length", "0").strip(" \t"), self.max_body_bytes):
            raise self._too_large()
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            body += message.get("body", b"")
            if len(body) > self.max_body_bytes:
                raise self._too_large()
            more = message.get("more_body", False)
        return bytes(body)

    def _too_large(self) -> Rejected:
        return Rejected("body_too_large", f"Body is larger than {self.max_body_bytes} bytes", 413)


def _is_at_most(declared: str, limit: int) -> bool:
    """Whether a Content-Length is a number up to `limit`. (A proxy in front of the service may pass malformed ones.)"""
    return declared.isascii() and declared.isdigit() and len(declared) < 12 and int(declared) <= limit


def answer(event_id: str | None, result: Outcome) -> Response:
    """The response for an outcome. The response for an error names no event."""
    status, processed = STATUS[result.kind]
    headers = {"Retry-After": _RETRY_AFTER_SECONDS} if status == 503 else {}
    return _respond(status, event_id if status < 400 else None, processed, result.action, result.reason, headers)


def rejection(error: Rejected) -> Response:
    """The response for a refused request. A 413 closes the connection, because the body was not read to its end."""
    headers = {"Connection": "close"} if error.status == 413 else {}
    return _respond(error.status, None, False, "rejected", error.reason, headers)


async def refuse_path(webhook_path: str, _request: Request, error: Exception) -> Response:
    """The responses for 404 and 405, with the same JSON fields as all others. A 405 keeps its header `Allow`.

    A path of your own may be chosen so that nobody guesses it: only the default is told.
    """
    status = error.status_code if isinstance(error, HTTPException) else 404
    hint = f": webhooks go to POST {WEBHOOK_PATH}" if webhook_path == WEBHOOK_PATH else ""
    reason = "Method not allowed" if status == 405 else f"No such path{hint}"
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
