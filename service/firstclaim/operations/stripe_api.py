"""Stripe's list of events, page by page (docs.stripe.com/api/events/list).

Guarantees: a request is retried only if a retry can succeed: no connection, a response that is not a list of events,
408, 409, 429 or 5xx. It is retried a few times with growing pauses, or after the pause that Stripe asks for. Any other
failure is raised at once. No message holds the API key or text of a response. Each event is JSON of its own, with every
number as Stripe wrote it, and no `StripeObject` is built. The API does not offer the bytes that Stripe signs for a
delivery.
"""

import asyncio
import json
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

import orjson
import stripe

from firstclaim.backoff import Backoff
from firstclaim.errors import ConfigurationError, StripeRefused, StripeUnavailable
from firstclaim.event import EVENT_ID

PAGE_MOST = 100  # Stripe's own limit
_ATTEMPTS = 6
_BACKOFF = Backoff(0.5, 8)  # 8 to 16 s in all: longer than a rate limit lasts, shorter than an outage
_RETRY_AFTER_MOST_SECONDS = 60  # for a longer pause, the command fails and names it
_TIMEOUT_SECONDS = 60.0
_SHOWN = re.compile(r"[A-Za-z0-9_]{1,100}")  # what is shown of a response: an error code and a request's id
_UNNAMED = "(without an id)"


@dataclass(frozen=True, slots=True)
class ListedEvent:
    """An event of the list: its id, or a placeholder, and its JSON (empty if it cannot be written as JSON)."""

    event_id: str
    body: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class EventPage:
    """Events, the newest first. `cursor` leads to the next page; None on the last page."""

    events: tuple[ListedEvent, ...]
    cursor: str | None


class StripeEvents:
    """The list, through Stripe's library. `sleep` waits between attempts; `timeout_seconds` limits one request."""

    def __init__(
        self,
        client: stripe.StripeClient,
        base: str,
        *,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
        timeout_seconds: float = _TIMEOUT_SECONDS,
    ) -> None:
        self._client = client
        self._base = base
        self._sleep = sleep
        self._timeout_seconds = timeout_seconds

    @classmethod
    @asynccontextmanager
    async def connect(cls, base: str, key: str, **options: Any) -> AsyncIterator["StripeEvents"]:
        """A connection for the duration of the block. `options` are the constructor's. Raises `ConfigurationError`."""
        if os.environ.get("STRIPE_LOG") or stripe.log:
            raise ConfigurationError(["STRIPE_LOG makes stripe-python print responses, with payloads: unset it"])
        http = stripe.HTTPXClient(timeout=_TIMEOUT_SECONDS)
        try:
            # The library's retries ignore 429 and Retry-After, so they are switched off. The retries are here.
            client = stripe.StripeClient(key, base_addresses={"api": base}, http_client=http, max_network_retries=0)
            yield cls(client, base, **options)
        finally:
            await http.close_async()  # type: ignore[no-untyped-call]

    async def page(
        self, start: int, end: int | None, cursor: str | None, *, undelivered: bool = False
    ) -> EventPage | None:
        """Events created from `start` to before `end` (unix seconds; None: until now), those after `cursor`.

        Returns None if the event at the cursor is gone, because it is more than 30 days old by now. `undelivered`: only
        events that some endpoint has not accepted yet. Raises `StripeRefused` and `StripeUnavailable`.
        """
        parameters: dict[str, Any] = {"limit": PAGE_MOST, "created": {"gte": start}}
        if end is not None:
            parameters["created"]["lt"] = end
        if cursor is not None:
            parameters["starting_after"] = cursor
        if undelivered:
            parameters["delivery_success"] = False
        attempt = 0
        while True:
            attempt += 1
            try:
                async with asyncio.timeout(self._timeout_seconds):
                    response = await self._client.raw_request_async("get", "/v1/events", **parameters)
            except Exception as error:  # noqa: BLE001  (for a malformed response, the library raises any exception)
                failure = error
            else:
                if (page := _parse_page(response.body)) is not None:
                    return page
                failure = ValueError("no list of events")
            if cursor is not None and _names_the_cursor(failure):
                return None
            await self._sleep(self._pause(failure, attempt))

    def _pause(self, failure: Exception, attempt: int) -> float:
        """The seconds to wait before the next attempt; raises if there is no further attempt."""
        status = getattr(failure, "http_status", None)
        if status is not None and not 200 <= status < 300 and status not in (408, 409, 429) and status < 500:
            _refused(failure, status)
        asked = retry_after(failure)
        if attempt < _ATTEMPTS and (asked or 0) <= _RETRY_AFTER_MOST_SECONDS:
            return _BACKOFF.after(attempt) if asked is None else asked
        tried = f"after {attempt} attempt{'' if attempt == 1 else 's'}{request_id(failure)}"
        if status == 429:
            wait = f"wait {asked} s before you run it again" if asked else "run it again later"
            raise StripeUnavailable(f"Stripe limits the rate of requests (429, {tried}): {wait}")
        if status is not None and status >= 400:
            raise StripeUnavailable(f"Stripe failed ({status}, {tried}): run it again later")
        if isinstance(failure, stripe.APIConnectionError | TimeoutError):
            cause = failure.__cause__ if isinstance(failure, stripe.APIConnectionError) else failure
            raise StripeUnavailable(f"Stripe cannot be reached at {self._base} ({type(cause).__name__}, {tried})")
        raise StripeUnavailable(f"the response of {self._base} is not a list of events ({tried})")


def _refused(failure: Exception, status: int) -> NoReturn:
    if status == 401:
        raise StripeRefused(f"Stripe does not accept the key in STRIPE_API_KEY (401{request_id(failure)})")
    if status == 403:
        raise StripeRefused(
            f"the key in STRIPE_API_KEY may not read events (403{request_id(failure)}): "
            "a restricted key needs the permission to read Events"
        )
    code = getattr(failure, "code", None)
    shown_code = f", {code}" if isinstance(code, str) and _SHOWN.fullmatch(code) else ""
    raise StripeRefused(
        f"Stripe refused the request for its list of events ({status}{shown_code}{request_id(failure)})"
    )


def request_id(failure: Exception) -> str:
    """The request's id, which Stripe's support asks for, as the end of a message; empty if it is not known."""
    found = getattr(failure, "request_id", None)
    return f", request {found}" if isinstance(found, str) and _SHOWN.fullmatch(found) else ""


def retry_after(failure: Exception) -> int | None:
    """The seconds of a response's Retry-After, if it has one."""
    # If the response is not JSON (a proxy's page), the library passes the headers as `json_body`.
    headers = getattr(failure, "headers", None) or getattr(failure, "json_body", None)
    value = str(headers.get("retry-after") or "") if isinstance(headers, Mapping) else ""
    return int(value) if re.fullmatch(r"[0-9]{1,100}", value) else None


def _names_the_cursor(failure: Exception) -> bool:
    return isinstance(failure, stripe.InvalidRequestError) and failure.param == "starting_after"


def _parse_page(text: str) -> EventPage | None:
    """The page in a response, or None if it is not a page. Numbers are copied as text and never parsed."""
    as_written: dict[str, Any] = dict.fromkeys(("parse_int", "parse_float", "parse_constant"), orjson.Fragment)
    try:
        content = json.loads(text, **as_written)
    except (ValueError, RecursionError):
        return None
    data, has_more = (content.get("data"), content.get("has_more")) if isinstance(content, dict) else (None, None)
    if not isinstance(data, list) or not isinstance(has_more, bool):
        return None
    events = tuple(map(_listed_event, data))
    if not has_more:
        return EventPage(events, None)
    if not events or events[-1].event_id == _UNNAMED:
        return None  # the next page has no cursor
    return EventPage(events, events[-1].event_id)


def _listed_event(event: object) -> ListedEvent:
    event_id = event.get("id") if isinstance(event, dict) else None
    has_id = isinstance(event_id, str) and EVENT_ID.fullmatch(event_id)
    try:
        body = orjson.dumps(event)
    except TypeError:  # a lone surrogate, or too many levels of nesting
        body = b""
    return ListedEvent(str(event_id) if has_id else _UNNAMED, body)
