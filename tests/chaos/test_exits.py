"""Row 38: a handler ends its process without a signal. Its event is charged, and what had not begun is not."""

import asyncio
from pathlib import Path

import pytest

from firstclaim.status import Status
from tests.acceptance.harness import PROCESSED, SHORT_LEASE, eventually, sample
from tests.chaos.actions import answered
from tests.chaos.history import History
from tests.chaos.verdict import verdict

ABANDONED_MOST = 8
RESTARTS_SECONDS = 120.0


async def test_row_38_exit_in_a_task(history: History, tmp_path: Path) -> None:
    """`sys.exit(3)` in a handler's task: exit code 3; what ran counts as abandoned, what waited is released."""
    sandbox = history.sandbox
    service = await history.service({"handler_slots": 2, "lease_seconds": 12}).start()
    assert (await answered(history, service, sample())).result == PROCESSED
    gate, never = tmp_path / "gate", tmp_path / "never"
    poison, running = sample("exit_in_a_task", gate=str(gate), until=1), sample("hold", gate=str(never))
    waiting = [sample() for _ in range(2)]
    answers = [asyncio.create_task(history.deliver(service, event)) for event in (poison, running)]
    for event in (poison, running):
        await sandbox.settled(event, Status.PROCESSING)
    answers += [asyncio.create_task(history.deliver(service, event)) for event in waiting]
    await eventually(sandbox.rows, lambda rows: rows == 5)
    gate.touch()
    assert await service.wait_for_exit() == 3, service.output
    await asyncio.gather(*answers)

    for event in (poison, running):
        row = await sandbox.settled(event, Status.PROCESSING)
        assert row.counts == (1, 0, 0)
    for event in waiting:
        row = await sandbox.settled(event, Status.PENDING)
        assert (row.failures, row.abandoned) == (0, 0)
        assert row.due_in_seconds <= 0

    never.touch()
    await history.service(SHORT_LEASE).start()
    for event in (poison, running):
        assert (await sandbox.settled(event)).counts == (2, 0, 1)
    for event in waiting:
        row = await sandbox.settled(event)
        assert (row.failures, row.abandoned) == (0, 0)
    await verdict(history)


@pytest.mark.timeout(200)
async def test_row_38_exit_in_a_task_of_a_worker(history: History, tmp_path: Path) -> None:
    """An event that exits each worker that handles it: each is replaced, the others serve on, dead after eight."""
    sandbox, service = history.sandbox, await history.service(SHORT_LEASE, workers=2).start()
    gate = tmp_path / "gate"
    gate.touch()

    async def serves() -> bool:
        answer = await history.deliver(service, sample())
        return answer is not None and answer.result == PROCESSED

    before = set(await service.pids())
    poison = sample("exit_in_a_task", gate=str(gate))
    await history.deliver(service, poison)
    await eventually(service.pids, lambda pids: len(before & set(pids)) < len(before))
    assert len(before & set(await service.pids())) >= len(before) - 1, "no other worker was stopped"
    await eventually(serves)
    await eventually(lambda: sandbox.row(poison), lambda row: row and row.status is Status.DEAD, RESTARTS_SECONDS)
    dead = await sandbox.settled(poison, Status.DEAD)
    assert dead.counts == (ABANDONED_MOST, 0, ABANDONED_MOST)
    assert service.output.count("worker_died") == ABANDONED_MOST
    await eventually(serves)
    assert await service.stop() == 0
    await verdict(history)
