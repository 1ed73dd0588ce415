"""Rows 1 to 4, and 48: one event in many copies, at one endpoint or at two, and what the later ones cost."""

import asyncio
import re
from collections import Counter

import pytest

from tests.acceptance.harness import (
    IGNORED,
    PROCESSED,
    Overrides,
    eventually,
    parallel_reason,
    post,
    post_at_once,
    sample,
)
from tests.chaos.actions import answered, deliver_at_once, dispatched, rounds
from tests.chaos.history import History
from tests.chaos.servers import Servers
from tests.chaos.sessions import Sessions, counted
from tests.chaos.verdict import verdict
from tests.fixtures import SECRET

DUPLICATES = 200
PROCESSES = 4
RESENT = 20


@pytest.mark.smoke
async def test_row_01_no_fault(history: History) -> None:
    """With no fault, every event of each kind of handler is processed once, on its first delivery."""
    service = await history.service().start()
    types = ["invoice.payment_failed", "invoice.paid", "customer.subscription.deleted"]
    events = [sample(type=each) for each in types for _ in range(6)]  # a place for each
    answers = await asyncio.gather(*(history.deliver(service, event) for event in events))
    assert Counter(answer and answer.result for answer in answers) == {PROCESSED: len(events)}
    for row in await history.sandbox.all_settled(events):
        assert row.counts == (1, 0, 0)
    await verdict(history)


@pytest.mark.smoke
async def test_row_02_duplicates_at_once(history: History) -> None:
    """Of 200 copies that reach four processes at the same moment, one is processed and 199 are ignored."""
    services = [history.service() for _ in range(PROCESSES)]
    await asyncio.gather(*(service.start() for service in services))
    event = sample()
    answers = await deliver_at_once(history, [(services[number % PROCESSES], event) for number in range(DUPLICATES)])
    assert Counter(answer.result for answer in answers) == {PROCESSED: 1, IGNORED: DUPLICATES - 1}
    reasons = {answer.reason for answer in answers if not answer.processed}
    assert reasons <= {parallel_reason(event.id), f"Event {event.id} already completed"}
    assert (await history.sandbox.settled(event)).counts == (1, 0, 0)
    assert dispatched(history, event) == [1]
    await verdict(history)


async def test_row_48_one_event_at_two_endpoints(history: History) -> None:
    """200 copies reach two endpoints of four processes at once: one is processed, the others are ignored.

    The name is that of the copy that inserted the row, and stays: another copy may have taken the row over.
    """
    # One secret for both names, as `stripe listen` has it; it forwards to two addresses.
    secrets: Overrides = {"STRIPE_WEBHOOK_SECRETS": f"{SECRET},connect={SECRET}"}
    services = [history.service(secrets) for _ in range(PROCESSES)]
    await asyncio.gather(*(service.start() for service in services))
    event = sample()
    targets = [(services[number % PROCESSES], "/connect" if number % 3 else "") for number in range(DUPLICATES)]
    answers = await post_at_once([(service.url + path, event.body) for service, path in targets])
    await history.note_all([(service, event) for service, _ in targets], answers)
    assert Counter(answer.result for answer in answers) == {PROCESSED: 1, IGNORED: DUPLICATES - 1}
    assert (await history.sandbox.settled(event)).counts == (1, 0, 0)
    [service] = [service for (service, _), answer in zip(targets, answers, strict=True) if answer.processed]
    shown = (await service.get("/metrics")).text
    verified = re.search(r'endpoint_requests_total\{endpoint="connect",result="verified"\} (\d+)', shown)
    assert verified
    assert int(verified[1]) > DUPLICATES // PROCESSES // 2
    assert dispatched(history, event) == [1]
    select = "SELECT endpoint FROM firstclaim.stripe_events WHERE event_id = $1"
    [recorded] = await history.sandbox.fetch(select, event.id)
    assert recorded["endpoint"] in ("connect", None)
    elsewhere = service.url + ("" if recorded["endpoint"] else "/connect")
    again = await post_at_once([(elsewhere, event.body)])
    await history.note_all([(service, event)], again)
    assert [answer.result for answer in again] == [IGNORED]
    assert await history.sandbox.fetch(select, event.id) == [recorded]
    await verdict(history)


async def test_row_03_what_a_duplicate_costs(history: History) -> None:
    """A duplicate of a completed event costs one Redis command and no Postgres statement."""
    # Recovery looks once when the service has started, and then not again while this runs.
    service = await history.service({"recovery_interval_seconds": 60}).start()
    await eventually(lambda: rounds(service))
    event = sample()
    assert (await answered(history, service, event)).result == PROCESSED

    async with Sessions.of(history.sandbox) as sessions:
        before = await sessions.last_statements()
        assert before
        with counted(history.sandbox) as commands:
            answers = [await post(service.url, event.body) for _ in range(RESENT)]
        assert await sessions.last_statements() == before
        assert commands == {"cmdstat_set": RESENT}

        for answer in answers:
            assert (answer.result, answer.reason) == (IGNORED, parallel_reason(event.id))
            await history.note(service, event, answer)
        fresh = sample()
        await history.note(service, fresh, await post(service.url, fresh.body))
        assert await sessions.last_statements() != before  # what asks the ledger is seen
    assert (await history.sandbox.settled(fresh)).counts == (1, 0, 0)
    await verdict(history)


async def test_row_04_a_duplicate_after_redis_was_emptied(servers: Servers, history: History) -> None:
    """After FLUSHALL the ledger answers: 200, still one effect. The marker is restored, so the next is cheap."""
    server = await servers.redis()
    history.sandbox.redis_url = server.url
    service = await history.service().start()
    event = sample()
    assert (await answered(history, service, event)).result == PROCESSED
    assert (await answered(history, service, event)).reason == parallel_reason(event.id)
    marker = await history.sandbox.key(event)
    assert marker is not None
    assert marker.startswith(b"recorded:")

    await server.call("FLUSHALL")
    again = await answered(history, service, event)
    assert (again.result, again.reason) == (IGNORED, f"Event {event.id} already completed")
    assert await history.sandbox.key(event) == marker
    assert (await answered(history, service, event)).reason == parallel_reason(event.id)
    assert (await history.sandbox.settled(event)).counts == (1, 0, 0)
    assert dispatched(history, event) == [1]
    await verdict(history)
