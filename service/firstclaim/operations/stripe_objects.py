"""The object of an event as it is now, from Stripe's API: what a handler with `fresh=True` gets.

Guarantees: a request goes to the path that the installed stripe-python knows for the object, or, for a thin event, to
the event's `related_object.url`; with the key of the event's endpoint and mode and no other; in the event's account;
and in the event's API version, so that the object has the fields that the endpoint subscribed to. (A thin event has no
version of an object: it is fetched in the library's.) One request, no retry: the event itself is retried. While Stripe
asks for a pause (429, or 503 with Retry-After), nothing is sent with that key. No message holds a key or text of a
response.

Stripe answers 404 for most objects that are deleted, and `{"id", "object", "deleted": true}` for some. Handlers get the
second form for both.
"""

import asyncio
import math
import os
import random
import re
from collections.abc import Iterable, Mapping
from typing import Any

import orjson
import stripe

from firstclaim.errors import Permanent, Retry, StripeRefused, StripeUnavailable
from firstclaim.event import Event
from firstclaim.operations.stripe_api import request_id, retry_after
from firstclaim.registry import Handler
from firstclaim.settings import Settings

_RELATED_PATH = re.compile(r"/v[12](?:/[A-Za-z0-9_][A-Za-z0-9_.\-]{0,254}){1,8}")
_LEASE_SHARE = 4  # see `firstclaim.inbox.fresh`
_LONGEST_PAUSE_SECONDS = 3600
_UNNAMED_PAUSE_SECONDS = 1.0  # after a 429 without Retry-After, as Stripe sends it: its limits are for a second
_SPREAD = 0.25  # of a pause, so that what waited for its end does not come all at once
_EXPECTED = "an object with the same id"


def faults(settings: Settings, handlers: Iterable[Handler]) -> list[str]:
    """What a handler with `fresh=True` needs and the settings do not have."""
    declared = [handler for handler in handlers if handler.fresh]
    fresh = [handler.name for handler in declared]
    if not fresh:
        return []
    found = []
    named = {endpoint for endpoint, _ in settings.api_keys}
    for endpoint in settings.endpoints:
        if endpoint in named:
            continue
        setting = "FIRSTCLAIM_FRESH_API_KEYS: no API key" if named or endpoint else "STRIPE_API_KEY is missing"
        example = "rk_live_..." if endpoint is None else f"{endpoint}=rk_live_..."
        found.append(
            f"{setting} for the events of {_of(endpoint)}, whose objects {fresh[0]} (fresh=True) is to get: "
            f"add {example} to FIRSTCLAIM_FRESH_API_KEYS" + ("" if endpoint or named else ", or set STRIPE_API_KEY")
        )
    if settings.fresh_timeout_seconds * _LEASE_SHARE > settings.lease_seconds:
        found.append(
            "FIRSTCLAIM_FRESH_TIMEOUT_SECONDS must be at most a quarter of FIRSTCLAIM_LEASE_SECONDS, because "
            f"{fresh[0]} (fresh=True) waits for Stripe while no row is locked"
        )
    found += sorted(
        {
            f"FIRSTCLAIM_FRESH_TIMEOUT_SECONDS must be below the deadline={handler.options.deadline_seconds:g} of "
            f"{handler.name} (fresh=True), against which the request counts"
            for handler in declared
            if (handler.options.deadline_seconds or math.inf) <= settings.fresh_timeout_seconds
        }
    )
    if os.environ.get("STRIPE_LOG"):
        found.append("STRIPE_LOG makes stripe-python print responses, with payloads: unset it")
    return found


class StripeObjects:
    """Fetches objects. `keys`: by endpoint and mode (`Settings.api_keys`). Opens nothing before the first request."""

    def __init__(
        self, base: str, keys: Mapping[tuple[str | None, bool | None], str], *, timeout_seconds: float
    ) -> None:
        self._base = base
        self._keys = keys
        self._timeout_seconds = timeout_seconds
        self._http: stripe.HTTPXClient | None = None
        self._making: asyncio.Future[stripe.StripeClient] | None = None
        self._resume_at: dict[str, float] = {}  # by key, in seconds of the event loop's clock

    async def fetch(self, event: Event) -> dict[str, Any]:
        """The object of `event`.

        Raises `Permanent` if it is of a kind that cannot be fetched; `Retry` if Stripe asks for a pause; and
        `StripeRefused` or `StripeUnavailable`.
        """
        path = _path(event)
        key = self._key(event)
        self._check_pause(key)
        options: dict[str, str] = {"api_key": key}
        if event.thin:
            if event.account is not None:
                options["stripe_context"] = event.account
        else:
            options |= {
                name: value
                for name, value in (("stripe_account", event.account), ("stripe_version", event.api_version))
                if value is not None
            }
        try:
            client = await self._connected()
            response = await client.raw_request_async("get", path, **options)
        except Exception as error:  # noqa: BLE001  (for a malformed response, the library raises any exception)
            return self._explained(event, key, error)
        return _checked(event, response.body)

    async def close(self) -> None:
        """Close the connections."""
        if self._http is not None:
            await self._http.close_async()  # type: ignore[no-untyped-call]

    async def _connected(self) -> stripe.StripeClient:
        """The client, made in a thread: it reads all certificates (0.1 to 1 s)."""
        if self._making is None:
            self._making = asyncio.get_running_loop().run_in_executor(None, self._connect)
        return await asyncio.shield(self._making)

    def _connect(self) -> stripe.StripeClient:
        self._http = stripe.HTTPXClient(timeout=self._timeout_seconds)
        return stripe.StripeClient(
            "unused", base_addresses={"api": self._base}, http_client=self._http, max_network_retries=0
        )

    def _key(self, event: Event) -> str:
        key = self._keys.get((event.endpoint, event.livemode)) or self._keys.get((event.endpoint, None))
        if key is None:
            mode = "live" if event.livemode else "test"
            raise StripeRefused(
                f"no API key of {mode} mode for the events of {_of(event.endpoint)}: add one to "
                "FIRSTCLAIM_FRESH_API_KEYS, or set FIRSTCLAIM_LIVEMODE"
            )
        return key

    def _pause(self, key: str, seconds: float) -> float:
        """Send nothing with this key for so long. A pause that ends later stays. Returns `seconds`."""
        ends_at = asyncio.get_running_loop().time() + seconds
        self._resume_at[key] = max(self._resume_at.get(key, 0), ends_at)
        return seconds

    def _check_pause(self, key: str) -> None:
        left = self._resume_at.get(key, 0) - asyncio.get_running_loop().time()
        if left > 0:
            raise Retry("Stripe limits the rate of requests", after=_spread(left))

    def _explained(self, event: Event, key: str, error: Exception) -> dict[str, Any]:
        """The object if it is deleted; else raises what the response, or the failure without one, means."""
        status, named = getattr(error, "http_status", None), request_id(error)
        if status == 404 and getattr(error, "code", None) in ("resource_missing", "not_found"):
            return _deleted(event)
        if status in (429, 503) and (asked := retry_after(error)):  # 0 names no time
            pause = self._pause(key, min(asked, _LONGEST_PAUSE_SECONDS))
            raise Retry(f"Stripe asks for a pause ({status}{named})", after=_spread(pause)) from None
        if status == 429:
            self._pause(key, _UNNAMED_PAUSE_SECONDS)
            raise Retry(f"Stripe limits the rate of requests (429{named})") from None
        if status == 401:
            raise StripeRefused(f"Stripe does not accept the API key of {_of(event.endpoint)} (401{named})") from None
        if status == 403:
            raise StripeRefused(
                f"the API key of {_of(event.endpoint)} may not read {_kind(event)} (403{named}): a restricted key "
                "needs the permission to read it"
            ) from None
        if status is not None and 400 <= status < 500:
            raise StripeRefused(f"Stripe refused the request for {_kind(event)} ({status}{named})") from None
        if status is not None and status >= 500:
            raise StripeUnavailable(f"Stripe failed ({status}{named})") from None
        cause = error.__cause__ if isinstance(error, stripe.APIConnectionError) else error
        raise StripeUnavailable(f"no object from Stripe at {self._base} ({type(cause).__name__})") from None


def _path(event: Event) -> str:
    """The path of the object. Raises `Permanent` if it has none."""
    path: object = None
    if event.thin:
        related = event.payload.get("related_object")
        path = related.get("url") if isinstance(related, dict) else None
    elif event.data["object"].get("object") in _SINGLETONS or isinstance(event.data["object"].get("id"), str):
        try:
            path = event.object.instance_url()
        except Exception:  # noqa: BLE001  (what has no path has no method, or one that raises any exception)
            path = None
    if not isinstance(path, str) or not _RELATED_PATH.fullmatch(path):
        raise Permanent(f"fresh=True: {_kind(event)} of {event.type} cannot be fetched from Stripe by itself")
    return path


# Objects of which an account has one.
_SINGLETONS = frozenset(("balance", "balance_settings", "tax.settings"))


def _checked(event: Event, body: str) -> dict[str, Any]:
    try:
        current = orjson.loads(body)
    except orjson.JSONDecodeError:
        current = None
    wanted = event.object_id
    if not isinstance(current, dict) or (wanted is not None and current.get("id") != wanted):
        raise StripeUnavailable(f"the response to the request for {_kind(event)} is not {_EXPECTED}")
    return current


def _deleted(event: Event) -> dict[str, Any]:
    snapshot = event.payload.get("related_object") if event.thin else event.data["object"]
    kind = snapshot.get("type") if event.thin else snapshot.get("object")  # type: ignore[union-attr]
    return {"id": event.object_id, "object": kind, "deleted": True}


def _kind(event: Event) -> str:
    """The name of the object's kind, as Stripe has it, for messages."""
    about = event.payload.get("related_object") if event.thin else event.data["object"]
    kind = about.get("type" if event.thin else "object") if isinstance(about, dict) else None
    return f"the {kind}" if isinstance(kind, str) and re.fullmatch(r"[a-z0-9_.]{1,64}", kind) else "the object"


def _of(endpoint: str | None) -> str:
    return "the endpoint without a name" if endpoint is None else f"the endpoint {endpoint}"


def _spread(seconds: float) -> float:
    return seconds * random.uniform(1, 1 + _SPREAD)  # noqa: S311  (spread, not secrecy)
