"""Rows 10 and 11: a holder that is frozen commits nothing, one that is slow keeps its event."""

import asyncio
import signal
import time
from pathlib import Path

from firstclaim.status import Status
from tests.acceptance.harness import (
    DEFERRED,
    PROCESSED,
    UNAVAILABLE,
    Overrides,
    eventually,
    sample,
)
from tests.chaos.actions import answered, armed, dispatched, resume, stopped
from tests.chaos.history import History
from tests.chaos.verdict import verdict

# The server frees the row of a frozen process when its transaction has idled for so long.
LEASE_SECONDS = 1.0
BRIEF: Overrides = {
    "lease_seconds": LEASE_SECONDS,
    "handler_deadline_seconds": 1.5,
    "idle_in_transaction_seconds": 2,
    "answer_budget_seconds": 0.5,
}


async def test_row_10_frozen_for_three_leases(history: History, tmp_path: Path) -> None:
    """Frozen before the row lock, or after the handler: another completes it, the thawed one does nothing."""
    frozen = {
        point: history.service(BRIEF | armed(point, tmp_path / point, send=signal.SIGSTOP))
        for point in ("insert", "handler")
    }
    other = history.service(BRIEF)
    await asyncio.gather(*(service.start() for service in (*frozen.values(), other)))
    events = {point: sample() for point in frozen}
    answers = [asyncio.create_task(history.deliver(frozen[point], event)) for point, event in events.items()]
    for service in frozen.values():
        await stopped(service)
    stopped_at = time.monotonic()

    rows = {point: await history.sandbox.settled(event) for point, event in events.items()}
    assert {row.counts for row in rows.values()} == {(2, 0, 1)}

    async def leases() -> float:
        return (time.monotonic() - stopped_at) / LEASE_SECONDS

    await eventually(leases, lambda passed: passed > 3)
    for service in frozen.values():
        resume(service)
    said = [answer and answer.result for answer in await asyncio.gather(*answers)]
    assert said == [UNAVAILABLE, DEFERRED], "it is deferred if the process knows that its row is committed"
    for point, service in frozen.items():
        assert (await answered(history, service, sample())).result == PROCESSED, "it works again"
        assert await history.sandbox.settled(events[point]) == rows[point]
    await verdict(history)


async def test_row_11_a_sync_handler_longer_than_its_lease(history: History, tmp_path: Path) -> None:
    """A thread that blocks for three leases, within its deadline: deferred, not taken over, no other event delayed."""
    settings: Overrides = {"lease_seconds": LEASE_SECONDS, "answer_budget_seconds": 0.5}
    service, other = history.service(settings), history.service(settings)
    await asyncio.gather(service.start(), other.start())
    gate = tmp_path / "gate"
    blocking = sample("hold", "invoice.paid", gate=str(gate))
    assert (await answered(history, service, blocking)).result == DEFERRED

    row = await eventually(
        lambda: history.sandbox.row(blocking), lambda row: row and row.due_in_seconds < -2 * LEASE_SECONDS
    )
    assert row is not None
    assert (row.status, row.counts) == (Status.PROCESSING, (1, 0, 0))
    for event in [sample(type=each) for each in ("invoice.paid", "invoice.payment_failed") for _ in range(5)]:
        assert (await answered(history, service, event)).result == PROCESSED
    assert await history.sandbox.row(blocking) == row
    gate.touch()
    assert (await history.sandbox.settled(blocking)).counts == (1, 0, 0)
    assert dispatched(history, blocking) == [1]
    await verdict(history)


async def test_row_11_a_sync_handler_over_its_deadline(history: History, tmp_path: Path) -> None:
    """A thread that still blocks at its deadline counts as abandoned: no effect, not even late, and no other delay."""
    service = await history.service(BRIEF | {"recovery_interval_seconds": 30}).start()
    gate = tmp_path / "gate"
    blocking = sample("late", "invoice.paid", until=1, gate=str(gate))
    assert (await answered(history, service, blocking)).result == DEFERRED
    assert (await answered(history, service, sample())).result == PROCESSED

    row = await history.sandbox.settled(blocking, Status.PENDING)
    assert row.counts == (1, 0, 1)
    assert "ran longer than its deadline of 1.5 s" in (row.last_error or "")
    assert (await answered(history, service, sample())).result == PROCESSED

    gate.touch()  # now it writes, on a transaction that is gone
    word = gate.parent / blocking.id

    async def left() -> bool:
        return word.exists()

    await eventually(left)
    assert await history.sandbox.settled(blocking, Status.PENDING) == row
    assert (await answered(history, service, blocking)).result == PROCESSED
    assert (await history.sandbox.settled(blocking)).counts == (2, 0, 1)
    await verdict(history)
