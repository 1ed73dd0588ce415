"""Row 28: SIGTERM with work in flight. Nobody is lied to, nothing is charged, and it ends in its time."""

import asyncio
import time
from pathlib import Path

import pytest

from firstclaim.status import Status
from tests.acceptance.harness import (
    DEFERRED,
    PROCESSED,
    UNAVAILABLE,
    Overrides,
    StalledDelivery,
    eventually,
    sample,
)
from tests.chaos.history import History
from tests.chaos.verdict import verdict

SHUTDOWN_SECONDS = 4
HASTY: Overrides = {"answer_budget_seconds": 1.5, "shutdown_seconds": SHUTDOWN_SECONDS, "lock_ttl_seconds": 1}


@pytest.mark.alone
@pytest.mark.parametrize("workers", [1, 2])
async def test_row_28_sigterm_with_work_in_flight(workers: int, history: History, tmp_path: Path) -> None:
    """Work that can end does, other work is released uncharged, new work is refused; exit 0 in the grace period."""
    sandbox, service = history.sandbox, await history.service(HASTY, workers=workers).start()
    gate = tmp_path / "gate"
    ending, stuck, unsent, late = sample("hold", gate=str(gate)), sample("hang", until=1), sample(), sample()
    answers = [asyncio.create_task(history.deliver(service, event)) for event in (ending, stuck)]
    stalled = await StalledDelivery.begin(service.url, unsent.body)
    for event in (ending, stuck):
        await sandbox.settled(event, Status.PROCESSING)

    async def shutting_down() -> int:
        return service.output.count("Shutting down")

    asked_at = time.monotonic()
    service.terminate()
    await eventually(shutting_down, lambda times: times == workers)
    refused = asyncio.create_task(history.deliver(service, late))
    gate.touch()
    assert await service.wait_for_exit() == 0, service.output
    assert time.monotonic() - asked_at < SHUTDOWN_SECONDS + 2
    await eventually(service.pids, lambda members: not members)

    ended, deferred = await asyncio.gather(*answers)
    assert ended is not None
    assert ended.result in (PROCESSED, DEFERRED)
    assert deferred is not None
    assert deferred.result in (DEFERRED, UNAVAILABLE)
    assert (await stalled.answer()).result == UNAVAILABLE
    assert [await sandbox.row(event) for event in (unsent, late)] == [None, None]
    answer = await refused
    assert answer is None or answer.result == UNAVAILABLE
    assert (await sandbox.settled(ending)).counts == (1, 0, 0)
    row = await sandbox.row(stuck)
    assert row is not None
    assert (row.failures, row.abandoned) == (0, 0)
    if workers == 1:  # of two, the one that stops last may have taken over what the first released
        assert (row.status, row.attempt) == (Status.PENDING, 1)
        assert row.due_in_seconds <= 0

    await history.service().start()
    row = await sandbox.settled(stuck)
    assert (row.failures, row.abandoned) == (0, 0)
    await verdict(history)
