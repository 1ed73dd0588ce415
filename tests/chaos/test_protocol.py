"""Row 31: a request that is no signed event, or never becomes one, costs no store a command and delays no other."""

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator, Sequence
from typing import Final

import httpx
import orjson

from firstclaim.server.protocol import HEAD_SECONDS
from firstclaim.status import Status
from firstclaim.web.webhook import WEBHOOK_PATH
from tests.acceptance.harness import PROCESSED, Answer, Overrides, Sample, Service, post, sample
from tests.chaos.history import History
from tests.chaos.invalid_requests import HOST, MEBIBYTE, good, length, request, requests
from tests.chaos.sessions import Sessions, counted
from tests.chaos.verdict import verdict
from tests.fixtures import event_body, signed
from tests.raw_connection import RawConnection, Reply, reason_of

BODY_SECONDS: Final = 5.0  # as shipped
LATE_SECONDS: Final = 30.0  # on top of a deadline: the machine may be busy
# Recovery looks once after the start, and then not again while a test runs.
_NO_UPKEEP: Final[Overrides] = {"recovery_interval_seconds": 60, "body_timeout_seconds": BODY_SECONDS}


# -- costs --------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def no_store_used(history: History, service: Service) -> AsyncIterator[None]:
    """The block costs no command of Redis and no statement of Postgres and leaves no row; a delivery costs both."""
    async with Sessions.of(history.sandbox) as sessions:
        await sessions.end()
        before = await sessions.begun()
        with counted(history.sandbox) as commands:
            yield
        assert await sessions.alive() == 0
        assert await sessions.begun() == before
        assert commands == {}
        assert await history.sandbox.rows() == 0
        await sessions.end()
        with counted(history.sandbox) as commands:
            event = sample()
            answer = await post(service.url, event.body)
        assert answer.result == PROCESSED
        assert commands["cmdstat_set"] >= 1
        assert await sessions.alive() > 0
    await history.note(service, event, answer)


async def test_row_31_what_is_refused_costs_nothing(history: History) -> None:
    """Every bad signature, framing, size and path, and smuggled deliveries: refused, and no store is contacted."""
    service = await history.service(_NO_UPKEEP).start()
    refused = requests()
    async with no_store_used(history, service):
        seen = {name: await one_answer(service, each.chunks) for name, each in refused.items()}
    assert {name: reply.status for name, reply in seen.items()} == {name: each.status for name, each in refused.items()}
    reasons = {name: reason_of(reply.status, reply.body) for name, reply in seen.items()}
    assert all(reasons.values())
    # The reason does not reveal what is wrong with a signature.
    assert len({reason for name, reason in reasons.items() if name.startswith("signature: ")}) == 1
    await verdict(history)


async def one_answer(service: Service, chunks: Sequence[bytes]) -> Reply:
    """The answer while the chunks are sent; the service need not receive all of them."""
    connection = await RawConnection.open(service.port)
    sending = asyncio.create_task(connection.send(*chunks))
    try:
        return await connection.reply()
    finally:
        sending.cancel()
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):
            await sending
        connection.abort()


async def test_row_31_one_request_at_a_time(history: History) -> None:
    """Requests or garbage behind a delivery are not served, nor answered before it: its answer is the last."""
    service = await history.service().start()
    several = (good(), good() * 1000, b"nonsense\r\n\r\n", b"GET /livez HTTP/1.1\r\nHost: x\r\n", b"\0" * MEBIBYTE)
    for number, behind in enumerate(several):
        gate = history.sandbox.folder / f"gate-{number}"
        event = sample("hold", gate=str(gate))
        connection = await RawConnection.open(service.port, delivery(event) + behind)
        await history.sandbox.settled(event, Status.PROCESSING)
        gate.touch()
        reply = await connection.reply()
        answer = Answer(reply.status, orjson.loads(reply.body), httpx.Headers(), 0)
        await history.note(service, event, answer)
        assert answer.result == PROCESSED
        assert await connection.rest() == b""
        connection.abort()
    assert await history.sandbox.rows() == len(several)
    await verdict(history)


def delivery(event: Sample) -> bytes:
    return request([HOST, *signed(event.body).items(), length(event.body)], event.body)


# -- slow ---------------------------------------------------------------------------------------------

LIVEZ: Final = b"GET /livez HTTP/1.1\r\nHost: x\r\n"
_POST: Final = f"POST {WEBHOOK_PATH} HTTP/1.1\r\nHost: x\r\n".encode()
_CHUNKED: Final = _POST + b"Transfer-Encoding: chunked\r\n\r\n"
_BODY: Final = event_body()

# name: (what is sent first, what is sent twice a second from then on, the statuses that are answered, after how long)
SLOWLY: Final[dict[str, tuple[bytes, bytes, list[int], float]]] = {
    "nothing": (b"", b"", [408], HEAD_SECONDS),
    "half a line": (b"POST /web", b"", [408], HEAD_SECONDS),
    "a line without end": (b"POST /", b"x", [408], HEAD_SECONDS),
    "half a head": (_POST, b"", [408], HEAD_SECONDS),
    "a header without end": (_POST + b"X: ", b"x", [408], HEAD_SECONDS),
    "headers without end": (_POST, b"X: y\r\n", [408], HEAD_SECONDS),
    "blank lines": (b"", b"\r\n", [408], HEAD_SECONDS),
    "no body": (_POST + b"Content-Length: 9\r\n\r\n", b"", [408], BODY_SECONDS),
    "half a body": (request([HOST, *signed(_BODY).items(), length(_BODY)], _BODY[:-1]), b"", [408], BODY_SECONDS),
    "a body byte by byte": (_POST + b"Content-Length: 9000\r\n\r\n", b"x", [408], BODY_SECONDS),
    "chunks without end": (_CHUNKED, b"1\r\nx\r\n", [408], BODY_SECONDS),
    "a chunk without end": (_CHUNKED + b"fff\r\n", b"x", [408], BODY_SECONDS),
    "an extension without end": (_CHUNKED + b"1;", b"x", [408], BODY_SECONDS),
    "trailers without end": (_CHUNKED + b"0\r\n", b"X: y\r\n", [408], BODY_SECONDS),
    "what it was told to go on with": (
        _POST + b"Expect: 100-continue\r\nContent-Length: 9\r\n\r\n",
        b"",
        [100, 408],
        BODY_SECONDS,
    ),
    "a body for nobody": (_CHUNKED.replace(WEBHOOK_PATH.encode(), b"/"), b"1\r\nx\r\n", [404], 0),
}
AGAIN: Final[dict[str, tuple[bytes, bytes]]] = {  # on a connection that had its first answer
    "half a head": (LIVEZ, b""),
    "a header without end": (LIVEZ + b"X: ", b"x"),
    "blank lines": (b"\r\n", b"\r\n"),
}


async def test_row_31_slow_requests_are_given_up(history: History) -> None:
    """Heads, bodies and their framing, stalled or sent byte by byte: 408 when their time is over, not before."""
    service = await history.service(_NO_UPKEEP).start()
    async with no_store_used(history, service):
        seen = await asyncio.gather(
            *(slowly(service, first, more) for first, more, *_ in SLOWLY.values()),
            *(slowly(service, first, more, answered_before=True) for first, more in AGAIN.values()),
        )
    expected = [(statuses, seconds) for _, _, statuses, seconds in SLOWLY.values()] + [([408], HEAD_SECONDS)] * len(
        AGAIN
    )
    for name, (statuses, took), (due, seconds) in zip([*SLOWLY, *AGAIN], seen, expected, strict=True):
        assert statuses == due, name
        assert seconds - 0.5 < took < seconds + LATE_SECONDS, name
    await verdict(history)


async def slowly(
    service: Service, first: bytes, more: bytes, *, answered_before: bool = False
) -> tuple[list[int], float]:
    """The statuses until the service closes the connection, and the seconds until then."""
    connection = await RawConnection.open(service.port)
    if answered_before:
        await connection.send(LIVEZ + b"\r\n")
        assert (await connection.reply()).status == 200
    began = time.monotonic()
    dripping = asyncio.create_task(_drip(connection, first, more))
    try:
        said = await connection.rest(HEAD_SECONDS + LATE_SECONDS)
    finally:
        dripping.cancel()
        connection.abort()
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+) ", said)], time.monotonic() - began


async def _drip(connection: RawConnection, first: bytes, more: bytes) -> None:
    with contextlib.suppress(ConnectionError):
        await connection.send(first)
        while more:
            await asyncio.sleep(0.5)
            await connection.send(more)
