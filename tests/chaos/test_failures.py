"""Rows 25 and 26: handlers that fail, and how long they may. Hours and days pass on the database's own clock."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from functools import partial
from pathlib import Path

import pytest

from firstclaim.status import Status
from tests import clock as clocks
from tests.acceptance.harness import (
    DEAD,
    FAILED,
    IGNORED,
    PROCESSED,
    SHORT_LEASE,
    Overrides,
    Row,
    Sample,
    Service,
    eventually,
    recovery_has_passed,
    sample,
)
from tests.chaos.actions import answered, replay
from tests.chaos.history import ABANDONED_MOST, History
from tests.chaos.verdict import verdict
from tests.clock import Clock

MINUTE = 60.0
HOUR = 60 * MINUTE
DAY = 24 * HOUR
FIRST_SECONDS = 5.0
LONGEST_SECONDS = HOUR
RESTARTS_SECONDS = 150.0
AS_SHIPPED: Overrides = {"backoff_first_seconds": FIRST_SECONDS, "backoff_most_seconds": LONGEST_SECONDS}


@pytest.fixture
async def standing(history: History) -> AsyncIterator[Clock]:
    """The history's database has a stopped clock: the test decides what is due."""
    async with clocks.installed(history.sandbox.database_url, standing=True) as clock:
        yield clock


async def deliver_all(history: History, service: Service, events: Sequence[Sample]) -> Counter[object]:
    """Deliver each of the events; returns the results."""
    answers = await asyncio.gather(*(history.deliver(service, event) for event in events))
    return Counter(answer and answer.result for answer in answers)


_TO_DO = """
SELECT count(*) FROM firstclaim.stripe_events
 WHERE status IN ('pending', 'processing') OR (status = 'failed' AND due_at <= clock_timestamp())
"""


async def tried(history: History, events: Sequence[Sample]) -> list[Row]:
    """Wait until recovery has tried everything that is due; returns the rows."""

    async def to_do() -> int:
        count: int = (await history.sandbox.fetch(_TO_DO))[0][0]
        return count

    await eventually(to_do, lambda count: count == 0)
    return [row for event in events if (row := await history.sandbox.row(event)) is not None]


async def test_row_25_fails_and_then_works(history: History, standing: Clock) -> None:
    """Three failures, each followed by a doubled, jittered wait; then completed, and later deliveries are ignored."""
    service = await history.service(AS_SHIPPED).start()
    failures = 3
    events = [sample("fail", until=failures) for _ in range(10)]
    assert await deliver_all(history, service, events) == {FAILED: len(events)}
    for count in range(1, failures + 1):
        rows = await tried(history, events)
        assert {(row.status, row.counts) for row in rows} == {(Status.FAILED, (count, count, 0))}
        whole = FIRST_SECONDS * 2 ** (count - 1)
        waits = [row.due_in_seconds for row in rows]
        assert all(whole / 2 <= wait <= whole for wait in waits), waits
        assert len(set(waits)) > len(waits) / 2, "their retries must not coincide"
        await standing.advance(whole)
    for row in await history.sandbox.all_settled(events):
        assert row.counts == (failures + 1, failures, 0)
    assert await deliver_all(history, service, events) == {IGNORED: len(events)}
    await verdict(history)


async def test_row_25_a_dependency_down_for_two_hours(history: History, standing: Clock, tmp_path: Path) -> None:
    """Two hours of failures make no event dead, however many they are; an hour after the fix all are completed."""
    service = await history.service(AS_SHIPPED).start()
    fixed = tmp_path / "fixed"
    events = [sample("fail", fixed=str(fixed)) for _ in range(10)]
    assert await deliver_all(history, service, events) == {FAILED: len(events)}
    steps = 24
    for _ in range(steps):
        await standing.advance(2 * HOUR / steps)
        rows = await tried(history, events)
    assert {row.status for row in rows} == {Status.FAILED}
    assert min(row.failures for row in rows) > 8, "more than the times that an event may be abandoned"

    fixed.touch()
    await standing.advance(LONGEST_SECONDS)
    for row, before in zip(await history.sandbox.all_settled(events), rows, strict=True):
        assert row.counts == (before.failures + 1, before.failures, 0)
    assert await deliver_all(history, service, events) == {IGNORED: len(events)}
    await verdict(history)


async def test_row_26_fails_for_three_days(history: History, standing: Clock, tmp_path: Path) -> None:
    """Dead after three days of failures, when Stripe gives up too, and not earlier; a replay then works."""
    service = await history.service(AS_SHIPPED).start()
    fixed = tmp_path / "fixed"
    event = sample("fail", fixed=str(fixed))
    assert (await answered(history, service, event)).result == FAILED
    steps = 12
    for _ in range(steps - 1):
        await standing.advance(3 * DAY / steps)
        await tried(history, [event])
        assert (await answered(history, service, event)).result == FAILED  # Stripe's own retry, at its own pace
    await standing.advance(3 * DAY / steps - 1)
    (last,) = await tried(history, [event])
    assert (last.status, last.abandoned) == (Status.FAILED, 0)

    await standing.advance(LONGEST_SECONDS)
    dead = await history.sandbox.settled(event, Status.DEAD)
    assert dead.counts == (last.attempt + 1, last.failures + 1, 0)
    assert (await answered(history, service, event)).result == IGNORED

    # Recovery runs for an event that failed later, and leaves the dead one alone.
    later = sample("fail", until=1)
    assert (await answered(history, service, later)).result == FAILED
    await standing.advance(FIRST_SECONDS)
    await history.sandbox.settled(later)
    assert await history.sandbox.settled(event, Status.DEAD) == dead

    fixed.touch()
    await replay(history.sandbox, event)
    assert (await history.sandbox.settled(event)).counts == (dead.attempt + 1, 0, 0)
    await verdict(history)


async def test_row_26_permanent(history: History, tmp_path: Path) -> None:
    """Permanent: 200, so that Stripe stops; dead at once and not retried; a replay works, and the attempt rises."""
    service = await history.service().start()
    fixed = tmp_path / "fixed"
    event = sample("permanent", fixed=str(fixed))
    answer = await answered(history, service, event)
    assert (answer.result, answer.reason) == (DEAD, f"Event {event.id} is dead: replay it")
    dead = await history.sandbox.settled(event, Status.DEAD)
    assert (dead.counts, dead.last_error) == ((1, 1, 0), "Permanent: never")
    assert (await answered(history, service, event)).result == IGNORED
    await recovery_has_passed(history.sandbox, service)
    assert await history.sandbox.settled(event, Status.DEAD) == dead

    fixed.touch()
    await replay(history.sandbox, event)
    assert (await history.sandbox.settled(event)).counts == (2, 0, 0)
    await verdict(history)


@pytest.mark.timeout(300)
async def test_row_26_an_event_that_aborts_its_process(history: History, tmp_path: Path) -> None:
    """One of 51 events aborts each process that handles it: dead after eight; the other 50 complete, once each."""
    service = await history.service(SHORT_LEASE | {"handler_slots": 30}, workers=2).start()
    fixed = tmp_path / "fixed"
    poison = sample("abort", fixed=str(fixed))
    good = [sample("slow", seconds=0.2) for _ in range(50)]
    events = [*good[:10], poison, *good[10:]]
    await asyncio.gather(*(history.deliver(service, event) for event in events))
    for event in events:  # as Stripe does, until it is answered; by then the poison may have met recovery
        await eventually(partial(history.deliver, service, event))

    # A worker has to be started each time.
    await eventually(
        lambda: history.sandbox.row(poison), lambda row: row and row.status is Status.DEAD, RESTARTS_SECONDS
    )
    dead = await history.sandbox.settled(poison, Status.DEAD)
    assert dead.counts == (ABANDONED_MOST, 0, ABANDONED_MOST)
    assert "abandoned" in (dead.last_error or "")
    rows = await history.sandbox.all_settled(good)
    assert {row.failures for row in rows} == {0}
    # Found abandoned, they are dispatched one at a time: the poison's later deaths drag no crowd along again.
    assert max(row.abandoned for row in rows) <= 2, Counter(row.counts for row in rows)

    assert (await answered(history, service, sample())).result == PROCESSED, "the supervisor restarted its workers"
    history.sandbox.empty_redis()  # otherwise the marker answers, and the ledger is not read
    again = await answered(history, service, poison)
    assert (again.result, again.reason) == (IGNORED, f"Event {poison.id} is dead: replay it")

    fixed.touch()
    await replay(history.sandbox, poison)
    assert (await history.sandbox.settled(poison)).counts == (ABANDONED_MOST + 1, 0, 0)
    await verdict(history)
