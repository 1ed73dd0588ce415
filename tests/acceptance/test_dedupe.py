"""Two deliveries of one event in the same microsecond, the case that this service was built for; and their lock."""

import asyncio
from collections import Counter

import pytest
import pytest_asyncio

from firstclaim.status import Status
from tests.acceptance.harness import (
    IGNORED,
    PROCESSED,
    Answer,
    Sample,
    Sandbox,
    Service,
    parallel_reason,
    post_at_once,
    sample,
)

PAIRS = 50


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def both(shared_sandbox: Sandbox) -> tuple[Service, Service]:
    """Two services with two workers each, on the same stores; a worker has a place for all events of a service."""
    one, other = [shared_sandbox.service({"handler_slots": 25}, workers=2) for _ in range(2)]
    await asyncio.gather(one.start(), other.start())
    return one, other


def assert_one_processed(event: Sample, answers: list[Answer]) -> None:
    assert Counter(answer.result for answer in answers) == {PROCESSED: 1, IGNORED: len(answers) - 1}
    reasons = {answer.reason for answer in answers if not answer.processed}
    assert reasons <= {parallel_reason(event.id), f"Event {event.id} already completed"}


async def test_two_copies_at_once_are_processed_once_for_each_of_many_events(
    shared_sandbox: Sandbox, both: tuple[Service, Service]
) -> None:
    """For 50 events, each delivered to two services at the same moment, the two never both process it."""
    for _ in range(PAIRS):
        event = sample()
        assert_one_processed(event, await post_at_once([(service.url, event.body) for service in both]))
        assert (await shared_sandbox.settled(event)).counts == (1, 0, 0)


async def test_many_pairs_at_once_are_processed_once_each(
    shared_sandbox: Sandbox, both: tuple[Service, Service]
) -> None:
    """50 events in two copies each, all 100 deliveries in flight together: each is processed once."""
    events = [sample() for _ in range(PAIRS)]
    answers = await post_at_once([(service.url, event.body) for event in events for service in both])
    for number, event in enumerate(events):
        assert_one_processed(event, answers[2 * number : 2 * number + 2])
        assert (await shared_sandbox.settled(event)).counts == (1, 0, 0)


async def test_who_meets_anothers_lock_records_and_never_dispatches(
    shared_sandbox: Sandbox, both: tuple[Service, Service]
) -> None:
    """A lock is held and there is no row yet: recorded, ignored, attempt 0; recovery's once the lock has run out."""
    event = sample()
    await shared_sandbox.put(event, "claimed:another", ttl_seconds=1.5)
    answer = await shared_sandbox.deliver(both[0], event)
    assert (answer.result, answer.reason) == (IGNORED, parallel_reason(event.id))
    row = await shared_sandbox.row(event)
    assert row is not None
    assert (row.status, row.counts) == (Status.PENDING, (0, 0, 0))
    assert 0 < row.due_in_seconds <= 2, "due when the longest lock has run out"
    assert (await shared_sandbox.settled(event)).counts == (1, 0, 0)


@pytest.mark.parametrize(
    ("value", "ttl_seconds"),
    [
        pytest.param("recorded:0123456789abcdef", 100, id="marker of another epoch"),
        pytest.param("claimed:another", None, id="lock without an end"),
        pytest.param("claimed:another", 100, id="lock longer than ours"),
        pytest.param("whatever", 100, id="unknown content"),
        pytest.param("", None, id="another type"),
    ],
)
async def test_what_is_left_over_in_redis_delays_nothing(
    value: str, ttl_seconds: float | None, shared_sandbox: Sandbox, both: tuple[Service, Service]
) -> None:
    """A value that no live service can have written is taken over: the first delivery is processed."""
    event = sample()
    await shared_sandbox.put(event, value, ttl_seconds)
    assert (await shared_sandbox.deliver(both[0], event)).result == PROCESSED
    assert (await shared_sandbox.deliver(both[1], event)).reason == parallel_reason(event.id)
    assert (await shared_sandbox.settled(event)).counts == (1, 0, 0)
