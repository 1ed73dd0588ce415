"""Signs an event as Stripe signs it, and sends it in as many copies as requested, concurrently.

Guarantees: every copy is the same bytes with a signature of its own, as Stripe's retries are. A server that cannot
be reached is an `Answer`, never a traceback. No message holds the login, the path or the query of the address, or the
value of a variable that names a proxy: they may hold a secret.
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
from urllib.request import getproxies, proxy_bypass

import httpx
import orjson

from firstclaim.errors import ConfigurationError

# Requests in flight: more than any one process dispatches, and well under the usual limit of 1024 open files.
_IN_FLIGHT_MOST = 200

# A service answers within 5 s (its budget). After this time the server hangs, and that is the answer.
_TIMEOUT_SECONDS = 30.0

_EXPECTED = "expected e.g. http://localhost:8000/webhooks/stripe"
_CERTIFICATES = "SSL_CERT_FILE, SSL_CERT_DIR: they do not name certificates that can be read"
_PROXIES = (
    "HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY: they do not name a proxy that can be used; "
    "expected e.g. http://proxy:3128"
)

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

    Raises `ValueError` for an invalid URL, and `ConfigurationError` where the environment names no usable proxy or
    certificates. A failed request raises nothing.
    """
    check_url(url)
    copies_left = iter(range(copies))
    answers: list[Answer] = []
    tls = _tls_context()

    async def send_in_turn(client: httpx.AsyncClient) -> None:
        for _ in copies_left:
            answer = await _post(client, url, body, secret)
            answers.append(answer)
            on_answer(answer)

    # A client for each request in flight: one client's pool walks through all of its connections at every request,
    # and the walk was most of the latency (500 copies of 50 ms, 200 in flight: p99 8.6 s, this way 0.5 s; httpx 0.28).
    async with AsyncExitStack() as opened:
        in_flight = range(min(copies, _IN_FLIGHT_MOST))
        clients = [await opened.enter_async_context(_client(url, tls, transport)) for _ in in_flight]
        async with asyncio.TaskGroup() as tasks:
            for client in clients:
                tasks.create_task(send_in_turn(client))
    return answers


def check_url(url: str) -> None:
    """Raise `ValueError` for a URL to which no event can be sent."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        fault = (
            str(error).partition(":")[0].rstrip(".")
        )  # behind it is a part of the address: of the password, if it holds a slash
        raise ValueError(f"--url: {fault}; {_EXPECTED}") from None
    if parsed.scheme not in ("http", "https") or not parsed.host or (parsed.port or 0) > 65_535:
        raise ValueError(f"--url: {_EXPECTED}")


def _tls_context() -> ssl.SSLContext:
    try:
        return httpx.create_ssl_context()
    except OSError:  # of TLS too
        raise ConfigurationError([_CERTIFICATES]) from None


def _client(url: str, tls: ssl.SSLContext, transport: httpx.AsyncBaseTransport | None) -> httpx.AsyncClient:
    # A request to this machine must not go through a proxy that the environment names.
    trust_env = not _LOOPBACK.match(url)
    try:
        return httpx.AsyncClient(verify=tls, timeout=_TIMEOUT_SECONDS, transport=transport, trust_env=trust_env)
    except (ValueError, ImportError, httpx.InvalidURL):
        raise ConfigurationError([_PROXIES]) from None


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
    """The class of the error, the server and what to do."""
    name, place = type(error).__name__, _place(httpx.URL(url))
    match error:
        case httpx.ConnectError() if (reason := _tls_reason(error)) is not None:
            return f"{name}: TLS fails with {place} ({reason}): check http or https, the port and the certificate"
        case httpx.ConnectError() | httpx.ConnectTimeout():
            said = f" ({error})" if str(error) else ""
            return f"{name}: cannot connect to {place}{said}: check that `firstclaim serve` runs there, or give --url"
        case httpx.TimeoutException():
            return (
                f"{name}: no answer from {place} within {_TIMEOUT_SECONDS:g} s: check what listens there, and its log"
            )
    return f"{name}: {error}".removesuffix(": ")


def _place(url: httpx.URL) -> str:
    """The server, and whether the environment puts a proxy before it: that may be what fails."""
    place = f"{url.scheme}://{url.netloc.decode()}"
    proxies = getproxies()
    if _LOOPBACK.match(place) or not (proxies.get(url.scheme) or proxies.get("all")) or proxy_bypass(url.host):
        return place
    return f"{place} through the environment's proxy"


def _tls_reason(error: BaseException) -> str | None:
    """OpenSSL's reason, if TLS is what failed."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ssl.SSLError):
        cause = cause.__cause__ or cause.__context__
    return None if cause is None else str(cause.reason)


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
