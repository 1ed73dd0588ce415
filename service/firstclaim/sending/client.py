"""Signs an event as Stripe signs it, and sends it in as many copies as requested, concurrently.

Guarantees: every copy is the same bytes with a signature of its own, as Stripe's retries are. A server that cannot
be reached is an `Answer`, never a traceback.
"""

import asyncio
import hashlib
import hmac
import re
import ssl
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass

import httpx
import orjson

# Requests in flight: more than any one process dispatches, and well under the usual limit of 1024 open files.
_IN_FLIGHT_MOST = 200

# A service answers within 5 s (its budget). After this time the server hangs, and that is the answer.
_TIMEOUT_SECONDS = 30.0

_LOOPBACK = re.compile(r"https?://(localhost|127\.|\[::1\])", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Answer:
    """The result of one copy: a status, with what the body had of `action`, `processed` and `reason`, or an error."""

    status: int | None
    action: str | None
    processed: bool | None
    seconds: float
    error: str | None
    reason: str | None = None


def sign(body: bytes, secret: str, timestamp: int | None = None) -> str:
    """The `Stripe-Signature` header for `body`, at `timestamp` (unix seconds, default now).

    It signs the bytes themselves. stripe-python's own function takes text, and would refuse a body that is not UTF-8.
    """
    at = int(time.time()) if timestamp is None else timestamp
    digest = hmac.new(secret.encode(), b"%d.%b" % (at, body), hashlib.sha256).hexdigest()
    return f"t={at},v1={digest}"


async def send(
    url: str,
    body: bytes,
    secret: str,
    copies: int,
    on_answer: Callable[[Answer], None],
    *,
    transport: httpx.AsyncBaseTransport | None = None,
) -> list[Answer]:
    """Post `copies` of `body`, up to 200 in flight at once. Returns the answers in the order in which they arrived.

    Raises `ValueError` for an invalid URL. A failed request raises nothing.
    """
    check_url(url)
    copies_left = iter(range(copies))
    answers: list[Answer] = []
    tls = httpx.create_ssl_context()

    async def send_in_turn(client: httpx.AsyncClient) -> None:
        for _ in copies_left:
            answer = await _post(client, url, body, secret)
            answers.append(answer)
            on_answer(answer)

    # A client for each request in flight: one client's pool walks through all of its connections at every request,
    # and the walk was most of the latency (500 copies of 50 ms, 200 in flight: p99 8.6 s, this way 0.5 s; httpx 0.28).
    async with AsyncExitStack() as clients, asyncio.TaskGroup() as tasks:
        for _ in range(min(copies, _IN_FLIGHT_MOST)):
            client = await clients.enter_async_context(_client(url, tls, transport))
            tasks.create_task(send_in_turn(client))
    return answers


def check_url(url: str) -> None:
    """Raise `ValueError` for a URL to which no event can be sent."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ValueError(f"--url: {error}") from None
    if parsed.scheme not in ("http", "https") or not parsed.host or (parsed.port or 0) > 65_535:
        raise ValueError("--url: expected e.g. http://localhost:8000/webhooks/stripe")


def _client(url: str, tls: ssl.SSLContext, transport: httpx.AsyncBaseTransport | None) -> httpx.AsyncClient:
    # A request to this machine must not go through a proxy that the environment names.
    trust_env = not _LOOPBACK.match(url)
    return httpx.AsyncClient(verify=tls, timeout=_TIMEOUT_SECONDS, transport=transport, trust_env=trust_env)


async def _post(client: httpx.AsyncClient, url: str, body: bytes, secret: str) -> Answer:
    headers = {"Content-Type": "application/json; charset=utf-8", "Stripe-Signature": sign(body, secret)}
    started = time.perf_counter()
    try:
        response = await client.post(url, content=body, headers=headers)
    except httpx.HTTPError as error:
        return Answer(None, None, None, time.perf_counter() - started, _explain(error, url))
    seconds = time.perf_counter() - started
    action, processed, reason = outcome_of(response.content)
    return Answer(response.status_code, action, processed, seconds, None, reason)


def _explain(error: httpx.HTTPError, url: str) -> str:
    """The class of the error, the server and what to do. The login, the path and the query may hold a secret."""
    name, server = type(error).__name__, httpx.URL(url)
    place = f"{server.scheme}://{server.netloc.decode()}"
    match error:
        case httpx.ConnectError() | httpx.ConnectTimeout():
            said = f" ({error})" if str(error) else ""
            return f"{name}: cannot connect to {place}{said}: check that `firstclaim serve` runs there, or give --url"
        case httpx.TimeoutException():
            return (
                f"{name}: no answer from {place} within {_TIMEOUT_SECONDS:g} s: check what listens there, and its log"
            )
    return f"{name}: {error}".removesuffix(": ")


def outcome_of(content: bytes) -> tuple[str | None, bool | None, str | None]:
    """An answer's `action`, `processed` and `reason`. The answer of any other server (a proxy, say) has none."""
    try:
        answer = orjson.loads(content)
    except orjson.JSONDecodeError:
        return None, None, None
    fields = answer if isinstance(answer, dict) else {}
    action, processed, reason = (fields.get(name) for name in ("action", "processed", "reason"))
    return (
        action if isinstance(action, str) else None,
        processed if isinstance(processed, bool) else None,
        reason if isinstance(reason, str) else None,
    )
