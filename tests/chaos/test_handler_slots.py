"""Rows 24 and 37: more slow handlers than there are slots for. They wait, for nothing charged; accepting does not."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from firstclaim.status import Status
from tests.acceptance.harness import (
    DEFERRED,
    UNHANDLED,
    Overrides,
    Sandbox,
    Service,
    eventually,
    post_at_once,
    sample,
)
from tests.chaos.actions import deliver_at_once
from tests.chaos.history import History
from tests.chaos.verdict import verdict
from tests.stores import Stores

SLOTS = 5
SLOW = 50
CROWD = 500
ROUNDS = 3
PAIRS = 200
P99 = PAIRS * 99 // 100 - 1

HOUSE: Overrides = {"handler_slots": SLOTS, "handler_deadline_seconds": 60, "idle_in_transaction_seconds": 65}


@pytest.fixture
async def quiet(stores: Stores, tmp_path: Path) -> AsyncIterator[Service]:
    """A service as any other, on a sandbox of its own, that has nothing to do."""
    sandbox = await Sandbox.prepare(stores, tmp_path)
    try:
        yield await sandbox.service(HOUSE).start()
    finally:
        await sandbox.close()


@pytest.mark.alone
async def test_row_24_slow_handlers(history: History, quiet: Service, tmp_path: Path) -> None:
    """50 slow handlers for 5 slots: all are accepted; the p99 of accepting stays under twice an idle service's."""
    service = await history.service(HOUSE | {"answer_budget_seconds": 1}).start()
    gate = tmp_path / "gate"
    slow = [sample("hold", gate=str(gate)) for _ in range(SLOW)]
    answers = await asyncio.gather(*(history.deliver(service, event) for event in slow))
    assert Counter(answer and answer.result for answer in answers) == {DEFERRED: SLOW}
    assert (await history.sandbox.statuses())[Status.PROCESSING] >= SLOTS

    seen = []
    for _ in range(ROUNDS):
        busy, idle = await paired_p99_seconds(service, quiet)
        seen.append((busy, idle))
        if busy < 2 * idle:
            break
    else:
        raise AssertionError(f"the p99 of the busy and of the idle service, in seconds, round by round: {seen}")

    gate.touch()
    evidence = await verdict(history)
    rows = [evidence.rows[event.id] for event in slow]
    assert {(row.status, row.failures, row.abandoned) for row in rows} == {(Status.COMPLETED, 0, 0)}


async def paired_p99_seconds(one: Service, other: Service) -> tuple[float, float]:
    """Of accepting, at each of the two, an event that no handler wants: one after the other, in turns.

    What else the machine is doing then meets both alike.
    """
    seconds: dict[Service, list[float]] = {one: [], other: []}
    for number in range(PAIRS):
        for service in (one, other) if number % 2 else (other, one):
            (answer,) = await post_at_once([(service.url, sample(type="customer.created").body)])
            assert answer.result == UNHANDLED
            seconds[service].append(answer.seconds)
    return sorted(seconds[one])[P99], sorted(seconds[other])[P99]


async def test_row_37_a_full_house(history: History, tmp_path: Path) -> None:
    """500 deliveries for 5 slow handlers' slots: all deferred, ten claimed, five of them released, none charged."""
    service = await history.service(HOUSE | {"answer_budget_seconds": 5}).start()
    gate = tmp_path / "gate"
    crowd = [sample("hold", gate=str(gate)) for _ in range(CROWD)]
    answers = await deliver_at_once(history, [(service, event) for event in crowd])
    assert Counter(answer.result for answer in answers) == {DEFERRED: CROWD}
    seen = await history.sandbox.statuses()
    assert seen[Status.PROCESSING] <= 2 * SLOTS
    released = {Status.PROCESSING: SLOTS, Status.PENDING: CROWD - SLOTS}
    await eventually(history.sandbox.statuses, lambda seen: seen == released)
    gate.touch()
    rows = (await verdict(history, seconds=60)).rows
    assert {(row.status, row.failures, row.abandoned) for row in rows.values()} == {(Status.COMPLETED, 0, 0)}
    assert len(rows) == CROWD
