"""Rows 33 to 35: concurrent work on one row, in every order. One dispatch, no waiting, no deadlock, no row left over.

This must hold however a service groups its statements. The tests send many deliveries at the same moment, so that a
service that batches them has a batch.
"""

import asyncio
import signal
from collections import Counter
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import pytest

from firstclaim.status import Status
from tests.acceptance.harness import (
    IGNORED,
    PROCESSED,
    Answer,
    Overrides,
    Sample,
    Service,
    eventually,
    parallel_reason,
    sample,
)
from tests.chaos.actions import answered, armed, deliver_at_once, dispatched, resume, stopped
from tests.chaos.history import History
from tests.chaos.sessions import Sessions
from tests.chaos.verdict import verdict
from tests.clock import Clock

IDS, ROUNDS = 40, 5
ONE_OF_TWO = [IGNORED, PROCESSED]


async def two(history: History) -> tuple[Service, Service]:
    """Two services on the same sandbox, with a place for every event of these tests."""
    one, other = [history.service({"handler_slots": 25}) for _ in range(2)]
    await asyncio.gather(one.start(), other.start())
    return one, other


def said(answer: Answer | None) -> tuple[int, bool, str] | None:
    return None if answer is None else answer.result


def said_of(events: Iterable[Sample], posts: Iterable[tuple[Service, Sample]], answers: list[Answer]) -> list[object]:
    """For each of `events` in turn, what its deliveries were answered, sorted."""
    found: dict[str, list[tuple[int, bool, str]]] = {}
    for (_, event), answer in zip(posts, answers, strict=True):
        found.setdefault(event.id, []).append(answer.result)
    return [sorted(found[event.id]) for event in events]


async def test_row_33_no_insert_waits_for_a_handler(history: History, tmp_path: Path) -> None:
    """New events and copies of one whose handler holds its row, together, with Redis empty: none waits for it."""
    services = await two(history)
    gate = tmp_path / "gate"
    held = sample("hold", gate=str(gate))
    holding = asyncio.create_task(history.deliver(services[0], held))

    async def holders() -> list[int]:
        return dispatched(history, held)

    await eventually(holders)
    history.sandbox.empty_redis()
    fresh = [sample() for _ in range(30)]
    posts = [(service, event) for each in fresh for event in (each, held) for service in services]
    answers = await deliver_at_once(history, posts)
    assert not gate.exists(), "the handler holds its row all the while"
    assert said_of(fresh, posts, answers) == [ONE_OF_TWO] * len(fresh)
    assert said_of([held], posts, answers) == [[IGNORED] * len(fresh) * 2]

    gate.touch()
    assert said(await holding) == PROCESSED
    for row in await history.sandbox.all_settled([held, *fresh]):
        assert row.counts == (1, 0, 0)
    await verdict(history)


# Slow enough for two statements with the same rows to run into each other.
_SLOW_INSERTS = """
CREATE FUNCTION slowly() RETURNS trigger LANGUAGE plpgsql AS
    'BEGIN PERFORM pg_sleep(0.002); RETURN NEW; END';
CREATE TRIGGER slowly BEFORE INSERT ON firstclaim.stripe_events FOR EACH ROW EXECUTE FUNCTION slowly();
"""


async def test_row_34_opposite_orders(history: History) -> None:
    """The same 40 ids reach two services at once, ascending and descending, five times: no deadlock, one each."""
    async with Sessions.of(history.sandbox) as sessions:
        await history.sandbox.execute(_SLOW_INSERTS)
        one, other = await two(history)
        for _ in range(ROUNDS):
            up = sorted((sample() for _ in range(IDS)), key=lambda event: event.id)
            posts = list(chain(*(((one, low), (other, high)) for low, high in zip(up, reversed(up), strict=True))))
            answers = await deliver_at_once(history, posts)
            assert said_of(up, posts, answers) == [ONE_OF_TWO] * IDS
        rows = (await verdict(history)).rows.values()
        assert Counter((row.status, row.counts) for row in rows) == {(Status.COMPLETED, (1, 0, 0)): ROUNDS * IDS}
        await asyncio.gather(one.kill(), other.kill())
        await sessions.end()
        assert await sessions.deadlocks() == 0


# -- row 35: the holder of the lock, who recorded meanwhile, and recovery -----------------------------
#
# `holder` gets the lock and stops there; a copy reaches `other`, which may only record. Then three can finish it:
# the holder, recovery, or a later delivery if the holder has died.

LOCK_SECONDS = 20.0  # until the test lets them run out
Delivery = asyncio.Task[Answer | None]


def a_service(history: History, *arguments: Path, stopping_at: str = "", arrivals: int = 1) -> Service:
    """A service with long locks. It stops itself at each of the points, once, and notes that in the folder."""
    settings: Overrides = {"lock_ttl_seconds": LOCK_SECONDS}
    if stopping_at:
        times = stopping_at.count(",") + 1
        settings |= armed(stopping_at, *arguments, send=signal.SIGSTOP, arrivals=arrivals, times=times)
    return history.service(settings)


async def recorded_behind(holder: Service, other: Service, history: History, events: list[Sample]) -> list[Delivery]:
    """Have `holder` stop with the locks of `events`, and `other` record them; returns the holder's deliveries."""
    await asyncio.gather(holder.start(), other.start())
    deliveries = [asyncio.create_task(history.deliver(holder, event)) for event in events]
    await stopped(holder)
    for event in events:
        answer = await answered(history, other, event)
        assert (answer.result, answer.reason) == (IGNORED, parallel_reason(event.id))
        row = await history.sandbox.row(event)
        assert row is not None
        assert (row.status, row.counts) == (Status.PENDING, (0, 0, 0))
        assert row.due_in_seconds > 0, "not due for recovery while the lock may last"
    return deliveries


async def locks_run_out(history: History, clock: Clock) -> None:
    """The locks disappear from Redis as after their TTL, and the events that were recorded meanwhile become due."""
    history.sandbox.empty_redis()
    await clock.advance(LOCK_SECONDS)


async def completed_once(history: History, events: list[Sample]) -> None:
    for event, row in zip(events, await history.sandbox.all_settled(events), strict=True):
        assert row.counts == (1, 0, 0)
        assert dispatched(history, event) == [1]
    await verdict(history)


async def test_row_35_the_holder_dies(history: History, clock: Clock, tmp_path: Path) -> None:
    """The lock's holder dies after another delivery recorded the event: recovery takes it when the lock expires."""
    event, holder, other = sample(), a_service(history, tmp_path / "a", stopping_at="lock"), a_service(history)
    (delivery,) = await recorded_behind(holder, other, history, [event])
    await holder.kill()
    assert await delivery is None
    await locks_run_out(history, clock)
    await completed_once(history, [event])


async def test_row_35_the_holder_comes_first(history: History, tmp_path: Path) -> None:
    """The lock's holder finds the row that another delivery recorded: it takes it over at once and processes it."""
    event, holder, other = sample(), a_service(history, tmp_path / "a", stopping_at="lock"), a_service(history)
    (delivery,) = await recorded_behind(holder, other, history, [event])
    resume(holder)
    assert said(await delivery) == PROCESSED
    await completed_once(history, [event])


@pytest.mark.parametrize("points", ["lock", "lock,found"])
async def test_row_35_recovery_comes_first(points: str, history: History, clock: Clock, tmp_path: Path) -> None:
    """Recovery took the row when the lock expired: the late holder, which had found it pending, ignores it."""
    event, holder, other = sample(), a_service(history, tmp_path / "a", stopping_at=points), a_service(history)
    (delivery,) = await recorded_behind(holder, other, history, [event])
    if points == "lock,found":
        resume(holder)
        await stopped(holder)
    await locks_run_out(history, clock)
    await history.sandbox.settled(event)
    resume(holder)
    assert said(await delivery) == IGNORED
    await completed_once(history, [event])


async def test_row_35_recovery_is_between_lock_and_row(history: History, clock: Clock, tmp_path: Path) -> None:
    """Recovery took the expired lock but not yet the row: the late holder processes it, recovery leaves it alone."""
    event = sample()
    holder, other = (a_service(history, tmp_path / each, stopping_at="lock") for each in ("a", "b"))
    (delivery,) = await recorded_behind(holder, other, history, [event])
    await locks_run_out(history, clock)
    await stopped(other)
    resume(holder)
    assert said(await delivery) == PROCESSED
    resume(other)
    assert said(await history.deliver(other, event)) == IGNORED
    await completed_once(history, [event])


async def test_row_35_all_at_the_same_moment(history: History, clock: Clock, tmp_path: Path) -> None:
    """Twenty late holders resume just as recovery takes their rows: one of the two gets each row, once."""
    events = [sample() for _ in range(20)]
    holder = a_service(history, tmp_path / "a", stopping_at="lock", arrivals=len(events))
    deliveries = await recorded_behind(holder, a_service(history), history, events)
    await locks_run_out(history, clock)
    resume(holder)
    answers = await asyncio.gather(*deliveries)
    assert set(map(said, answers)) <= {PROCESSED, IGNORED}
    await completed_once(history, events)
