"""One event to one target: the POST, and what its answer means.

Guarantees: a request goes to the target's own address: redirects are not followed, and nothing of an event is part of
the address. It takes no longer than the target's time limit, whatever the target does: it may be silent, answer
slowly, or send a body without an end, of which only the beginning is read. No error names the address, whose path may
be a secret, and the log gets no text of an answer; the ledger gets a short piece of it, redacted as every error is.
"""

import asyncio
import email.utils
import math
import re
import time
from dataclasses import dataclass
from datetime import UTC
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Final
from weakref import WeakKeyDictionary

import httpx
import structlog

from firstclaim import Pause, Retry
from firstclaim.handlers.forward.breaker import Breaker, Request, Result
from firstclaim.handlers.forward.signing import signed_headers
from firstclaim.handlers.forward.targets import Target

log = structlog.get_logger(__name__)

ACTION: Final = "forwarded"
_HEADERS: Final = {
    "content-type": "application/json; charset=utf-8",
    "user-agent": "firstclaim",
    "accept-encoding": "identity",
}
_TEXT_MOST_BYTES = 400  # of an answer that is no success, for the operator
_TEXT_MOST_CHARACTERS = 120
_DRAINED_MOST_BYTES = 65_536  # of a success: then the connection can be used again
_DRAIN_SECONDS = 1.0
_CLIENT_SECONDS = 3600.0  # the maximum of a handler's deadline
# A request to this machine must not go through a proxy that the environment names.
_WITHOUT_PROXY: Final = {"all://127.0.0.1": None, "all://localhost": None, "all://[::1]": None}
_LONGEST_PAUSE_SECONDS = 3600.0  # that a target may ask for: the next request asks again


class TargetFailed(Exception):
    """The target did not take the event. The message has the status and the beginning of the answer."""


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    retry_after: float | None
    text: str


class Forwarder:
    """Forwards events to one target."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._breaker = Breaker(time.monotonic)

    async def forward(self, event_id: str, body: bytes) -> str:
        """POST the event. Returns the action once the target has taken it.

        Raises `Retry` while the target fails or asks for a pause, `Pause` if it is gone for good, else `TargetFailed`.
        """
        request = self._breaker.admit()
        if not isinstance(request, Request):
            # After the usual backoff, which grows: due at the end of the pause, a large backlog would come at once.
            raise Retry(f"{self._target.name} fails, or has asked for a pause: not tried")
        return await self._try(request, event_id, body)

    async def _try(self, request: Request, event_id: str, body: bytes) -> str:
        result, pause = Result.UNKNOWN, None
        try:
            answer = await self._post(event_id, body)
            pause = answer.retry_after if answer.status in (429, 503) else None
            failed = pause is None and (answer.status >= 500 or answer.status == 429)
            result = Result.FAILED if failed else Result.ANSWERED
        except TargetFailed:
            result = Result.FAILED
            raise
        finally:
            self._note(request, result, pause)
        return self._taken(answer, pause)

    def _taken(self, answer: _Answer, pause: float | None) -> str:
        """The action, if the answer says that the target has taken the event; else raises what it says."""
        name, status = self._target.name, answer.status
        if 200 <= status < 300:
            return ACTION
        if status == 410:
            raise Pause(f"{name} is gone (410): it wants no events any more")
        if pause is not None:
            raise Retry(f"{name} asks for a pause ({status})", after=pause)
        raise TargetFailed(f"{name} answered {status}" + (f": {answer.text}" if answer.text else ""))

    async def _post(self, event_id: str, body: bytes) -> _Answer:
        target = self._target
        headers = signed_headers(target.secret.get_secret_value(), event_id, body, int(time.time()))
        client = await _client()
        request = client.build_request("POST", target.url, content=body, headers=_HEADERS | headers)
        ends_at = asyncio.get_running_loop().time() + target.timeout_seconds
        try:
            async with asyncio.timeout_at(ends_at):
                response = await client.send(request, stream=True, follow_redirects=False)
        except TimeoutError:
            raise TargetFailed(f"{target.name} did not answer within {target.timeout_seconds:g} s") from None
        except Exception as error:  # noqa: BLE001  (of a resolver or a certificate too; the message names the address)
            raise TargetFailed(f"{target.name} gave no answer: {_cause(error)}") from None
        try:
            return _Answer(response.status_code, _retry_after(response), await _beginning(response, ends_at))
        finally:
            await response.aclose()

    def _note(self, request: Request, result: Result, pause: float | None) -> None:
        was_open = self._breaker.is_open
        self._breaker.note(request, result, pause_seconds=pause)
        if self._breaker.is_open and not was_open:
            log.warning("forward_target_failing", target=self._target.name)
        elif was_open and not self._breaker.is_open:
            log.info("forward_target_back", target=self._target.name)


_clients: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Future[httpx.AsyncClient]] = WeakKeyDictionary()


async def _client() -> httpx.AsyncClient:
    """The client of this event loop. One for all targets, made in a thread: it reads all certificates (0.1 to 1 s)."""
    loop = asyncio.get_running_loop()
    if (made := _clients.get(loop)) is None or (made.done() and (made.cancelled() or made.exception() is not None)):
        made = _clients[loop] = loop.run_in_executor(None, _new_client)
    return await asyncio.shield(made)


def _new_client() -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=100, keepalive_expiry=15)
    # The time limit of each target is that of its whole request, and not of one step of it.
    # It keeps no cookies: they are for a host, whatever the port, and would reach another target, or grow for ever.
    cookies = CookieJar(DefaultCookiePolicy(allowed_domains=()))
    return httpx.AsyncClient(timeout=_CLIENT_SECONDS, limits=limits, cookies=cookies, mounts=_WITHOUT_PROXY)


def _cause(error: BaseException) -> str:
    """The class of what the error comes from: the client has one for a refused certificate, port and name."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return type(error).__name__


async def _beginning(response: httpx.Response, ends_at: float) -> str:
    """The beginning of the body, one line; of a success nothing, but it is read if it is short.

    `ends_at`, on the clock of the event loop: the end of the target's time limit, past which nothing is read.
    """
    taken = 200 <= response.status_code < 300
    most = _DRAINED_MOST_BYTES if taken else _TEXT_MOST_BYTES
    read = bytearray()
    try:
        async with asyncio.timeout_at(min(ends_at, asyncio.get_running_loop().time() + _DRAIN_SECONDS)):
            async for chunk in response.aiter_raw():
                read += chunk[: most - len(read)]
                if len(read) >= most:
                    break
    except (httpx.HTTPError, httpx.StreamError, TimeoutError):
        pass  # the head of the answer has said what it means
    if taken or "content-encoding" in response.headers:
        return ""
    text = read[:_TEXT_MOST_BYTES].decode("utf-8", "replace")
    printable = "".join(each if each.isprintable() else " " for each in text)
    return re.sub(" +", " ", printable).strip()[:_TEXT_MOST_CHARACTERS]


def _retry_after(response: httpx.Response) -> float | None:
    """The seconds of Retry-After: a number, or the time until a date. None if it names no time that is to come.

    Else `Retry-After: 0`, or the date of a clock that is slow, would have each event tried again at once, for days.
    """
    value = response.headers.get("retry-after", "")
    try:
        seconds = float(value) if re.fullmatch(r"[0-9]{1,100}", value) else _seconds_until(value)
    except (ValueError, TypeError, OverflowError):
        return None
    return min(seconds, _LONGEST_PAUSE_SECONDS) if seconds > 0 else None


def _seconds_until(date: str) -> float:
    at = email.utils.parsedate_to_datetime(date)
    return math.ceil((at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp() - time.time())
