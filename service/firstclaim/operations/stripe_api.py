"""Stripe's list of events, a page at a time, as its API has it (docs.stripe.com/api/events/list).

Guarantees: what is asked again is only what may succeed then (no connection, an answer that is none, 429, 5xx), a few
times and with growing pauses, or after the pause that Stripe asks for; everything else is a sentence at once. No
message holds the API key or a word of an answer. An event comes as JSON of its own with every number as it was
written, and no `StripeObject` is built of it. The very bytes that Stripe signs for a delivery are not to be had here.
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
_BACKOFF = Backoff(0.5, 8)  # 8 to 16 s in all: a rate limit is over by then, an outage is not
_RETRY_AFTER_MOST_SECONDS = 60  # whoever asks for a longer pause is told to come back instead
_TIMEOUT_SECONDS = 60.0
_WORD = re.compile(r"[A-Za-z0-9_]{1,100}")  # of an answer: nothing but a code or a request's id looks like this
_UNNAMED = "(without an id)"


@dataclass(frozen=True, slots=True)
class Item:
    """One event of the list: its id, or what to call it instead, and its JSON (empty: cannot be written as JSON)."""

    event_id: str
    body: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Page:
    """Events, the newest first; `cursor` leads to the next page, None: this was the last."""

    items: tuple[Item, ...]
    cursor: str | None


class StripeEvents:
    """The list, through Stripe's library; `sleep` is how it pauses, `timeout_seconds` what a request may take."""

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
    async def connect(cls, base: str, key: str, **how: Any) -> AsyncIterator["StripeEvents"]:
        """With a connection of its own; `how` is what the constructor takes. Raises `ConfigurationError`."""
        if os.environ.get("STRIPE_LOG") or stripe.log:
            raise ConfigurationError(["STRIPE_LOG has stripe-python print what Stripe answers, payloads too: unset it"])
        http = stripe.HTTPXClient(timeout=_TIMEOUT_SECONDS)
        try:
            # The library's own retries know no 429 and no Retry-After: they are off, and made here.
            client = stripe.StripeClient(key, base_addresses={"api": base}, http_client=http, max_network_retries=0)
            yield cls(client, base, **how)
        finally:
            await http.close_async()  # type: ignore[no-untyped-call]

    async def page(self, start: int, end: int | None, cursor: str | None, *, undelivered: bool = False) -> Page | None:
        """Events created from `start` to before `end` (unix seconds; None: until now), those after `cursor`.

        None: the event at the cursor is gone, because it has become 30 days old meanwhile. `undelivered`: only what
        some endpoint has not taken yet. Raises `StripeRefused` and `StripeUnavailable`.
        """
        asked: dict[str, Any] = {"limit": PAGE_MOST, "created": {"gte": start}}
        if end is not None:
            asked["created"]["lt"] = end
        if cursor is not None:
            asked["starting_after"] = cursor
        if undelivered:
            asked["delivery_success"] = False
        attempt = 0
        while True:
            attempt += 1
            try:
                async with asyncio.timeout(self._timeout_seconds):
                    answer = await self._client.raw_request_async("get", "/v1/events", **asked)
            except Exception as error:  # noqa: BLE001  (of an odd answer the library raises whatever it stumbles over)
                failure = error
            else:
                if (page := _read(answer.body)) is not None:
                    return page
                failure = ValueError("no list of events")
            if cursor is not None and _names_the_cursor(failure):
                return None
            await self._sleep(self._pause(failure, attempt))

    def _pause(self, failure: Exception, attempt: int) -> float:
        """How long to wait before the next attempt, in seconds; raises where there is to be none."""
        status = getattr(failure, "http_status", None)
        if status is not None and not 200 <= status < 300 and status not in (408, 409, 429) and status < 500:
            _refused(failure, status)
        asked = _retry_after(failure)
        if attempt < _ATTEMPTS and (asked or 0) <= _RETRY_AFTER_MOST_SECONDS:
            return _BACKOFF.after(attempt) if asked is None else asked
        said = f"asked {attempt} times{_request_id(failure)}"
        if status == 429:
            wait = f"wait {asked} s before you" if asked else "later"
            raise StripeUnavailable(f"Stripe limits our rate of requests (429, {said}): {wait} run it again")
        if status is not None and status >= 400:
            raise StripeUnavailable(f"Stripe has a failure of its own ({status}, {said}): run it again later")
        if isinstance(failure, stripe.APIConnectionError | TimeoutError):
            cause = failure.__cause__ if isinstance(failure, stripe.APIConnectionError) else failure
            raise StripeUnavailable(f"Stripe cannot be reached at {self._base} ({type(cause).__name__}, {said})")
        raise StripeUnavailable(f"what answers at {self._base} answers with no list of events ({said})")


def _refused(failure: Exception, status: int) -> NoReturn:
    if status == 401:
        raise StripeRefused(f"Stripe does not know the key in STRIPE_API_KEY (401{_request_id(failure)})")
    if status == 403:
        raise StripeRefused(
            f"the key in STRIPE_API_KEY may not read events (403{_request_id(failure)}): "
            "a restricted key needs the permission to read Events"
        )
    code = getattr(failure, "code", None)
    word = f", {code}" if isinstance(code, str) and _WORD.fullmatch(code) else ""
    raise StripeRefused(f"Stripe does not list events when asked like this ({status}{word}{_request_id(failure)})")


def _request_id(failure: Exception) -> str:
    """What Stripe's support asks for."""
    found = getattr(failure, "request_id", None)
    return f", request {found}" if isinstance(found, str) and _WORD.fullmatch(found) else ""


def _retry_after(failure: Exception) -> int | None:
    # Of an answer that is no JSON (a proxy's page) the library hands on the headers as `json_body`.
    headers = getattr(failure, "headers", None) or getattr(failure, "json_body", None)
    found = str(headers.get("retry-after") or "") if isinstance(headers, Mapping) else ""
    return int(found) if re.fullmatch(r"[0-9]{1,6}", found) else None


def _names_the_cursor(failure: Exception) -> bool:
    return isinstance(failure, stripe.InvalidRequestError) and failure.param == "starting_after"


def _read(text: str) -> Page | None:
    """The page in an answer; None: it is something else. Numbers are copied as they stand, never read."""
    as_written: dict[str, Any] = dict.fromkeys(("parse_int", "parse_float", "parse_constant"), orjson.Fragment)
    try:
        answer = json.loads(text, **as_written)
    except (ValueError, RecursionError):
        return None
    found, more = (answer.get("data"), answer.get("has_more")) if isinstance(answer, dict) else (None, None)
    if not isinstance(found, list) or not isinstance(more, bool):
        return None
    items = tuple(map(_item, found))
    if not more:
        return Page(items, None)
    if not items or items[-1].event_id == _UNNAMED:
        return None  # there would be no way on from here
    return Page(items, items[-1].event_id)


def _item(event: object) -> Item:
    event_id = event.get("id") if isinstance(event, dict) else None
    named = isinstance(event_id, str) and EVENT_ID.fullmatch(event_id)
    try:
        body = orjson.dumps(event)
    except TypeError:  # a lone surrogate, or too many levels
        body = b""
    return Item(str(event_id) if named else _UNNAMED, body)
