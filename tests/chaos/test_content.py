"""Row 30: any content with a valid signature is an event, stored byte for byte, or gets a 400 and no row."""

from collections.abc import Mapping
from urllib.parse import urlsplit

import asyncpg
import orjson

from firstclaim.event import parse_event
from firstclaim.status import Status
from tests.acceptance.harness import (
    DEAD,
    IGNORED,
    PROCESSED,
    REJECTED,
    Answer,
    Sample,
    Sandbox,
    Service,
    eventually,
    parallel_reason,
    raw_request,
)
from tests.chaos.history import History
from tests.chaos.verdict import verdict
from tests.fixtures import signed
from tests.hostile import ACCEPTED, bodies


async def test_row_30_hostile_content(history: History) -> None:
    """Each hostile body is processed once and stored as sent, or refused with a sentence of ours; never a 5xx."""
    service = await history.service().start()
    sent = bodies()
    answers = {name: await delivered(history, service, name, body) for name, body in sent.items()}
    assert {name: answer.result for name, answer in answers.items()} == {
        name: PROCESSED if name in ACCEPTED else REJECTED for name in sent
    }
    assert await stored(history.sandbox) == {event.id: event.body for event in events(sent).values()}
    assert await history.sandbox.rows() == len(ACCEPTED)
    assert_quiet(service)
    await verdict(history)


async def test_row_30_hostile_content_is_a_duplicate_the_second_time(history: History) -> None:
    """Its id is found again in Redis and in the ledger: ignored, and the row is unchanged."""
    service = await history.service().start()
    sent = {name: body for name, body in bodies().items() if name in ACCEPTED}
    for name, body in sent.items():
        assert (await delivered(history, service, name, body)).result == PROCESSED
        assert (await delivered(history, service, name, body)).result == IGNORED
    history.sandbox.empty_redis()
    for name, body in sent.items():
        assert (await delivered(history, service, name, body)).result == IGNORED
    assert await stored(history.sandbox) == {event.id: event.body for event in events(sent).values()}
    await verdict(history)


async def test_row_30_recovery_reads_hostile_content_from_the_ledger(history: History) -> None:
    """Recorded while another held the lock: recovery dispatches the stored body, and it is the same event."""
    service = await history.service().start()
    sent = {name: body for name, body in bodies().items() if name in ACCEPTED}
    for name, event in events(sent).items():
        await history.sandbox.put(event, "claimed:another", ttl_seconds=2)
        answer = await delivered(history, service, name, event.body)
        assert (answer.result, answer.reason) == (IGNORED, parallel_reason(event.id))
    for row in await history.sandbox.all_settled(events(sent).values()):
        assert row.counts == (1, 0, 0)
    assert_quiet(service)
    await verdict(history)


async def test_row_30_the_shipped_handler(history: History) -> None:
    """The shipped handler accepts it too: it stores what it can, or raises Permanent, and never fails."""
    service = await history.sandbox.service({"handlers": "firstclaim.handlers"}).start()
    sent = bodies()
    for name, body in sent.items():
        answer = await raw_request(service.url, request(service, body))
        assert answer.result in (DEAD, (200, True, "payment_failure_recorded")) if name in ACCEPTED else REJECTED, name
        assert (answer.result == DEAD) == (name == "NUL in the object's id")
    statuses = await eventually(history.sandbox.statuses)
    assert statuses == {Status.COMPLETED: len(ACCEPTED) - 1, Status.DEAD: 1}
    assert_quiet(service, "handler_failed")
    history.sandbox.waived |= {event.id for event in events(sent).values()}  # its effects are in a table of its own


# -- sent, stored, said -------------------------------------------------------------------------------


def request(service: Service, body: bytes) -> bytes:
    """The whole request, byte by byte."""
    headers = {**signed(body), "Host": "x", "Content-Length": str(len(body)), "Connection": "close"}
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"POST {urlsplit(service.url).path} HTTP/1.1\r\n{lines}\r\n".encode() + body


async def delivered(history: History, service: Service, name: str, body: bytes) -> Answer:
    """Send it in one piece; an event's answer is put on record."""
    answer = await raw_request(service.url, request(service, body))
    if name in ACCEPTED:
        await history.note(service, Sample(parse_event(body).id, body), answer)
    else:
        assert answer.content["event_id"] is None
        assert "evt" not in (answer.reason or "")  # nor anything else of it
    return answer


def events(sent: Mapping[str, bytes]) -> dict[str, Sample]:
    """Those that are events all the same, with the ids that they are known by."""
    return {name: Sample(parse_event(body).id, body) for name, body in sent.items() if name in ACCEPTED}


async def stored(sandbox: Sandbox) -> dict[str, bytes]:
    """Every body that the ledger holds, by its event's id."""
    connection = await asyncpg.connect(sandbox.database_url)
    try:
        return dict(map(tuple, await connection.fetch("SELECT event_id, body FROM firstclaim.stripe_event_payloads")))
    finally:
        await connection.close()


def assert_quiet(service: Service, *expected: str) -> None:
    """Every line since the start is one JSON object, and only the expected ones have a level above info."""
    said = [orjson.loads(line) for line in service.output.partition("Application startup complete")[2].splitlines()[1:]]
    assert said
    assert [line["event"] for line in said if line["level"] != "info"] == list(expected)
