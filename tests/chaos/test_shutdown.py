"""Rows 28 and 39: SIGTERM with work in flight. Nobody is lied to, nothing is charged, and it ends in its time."""

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest

from firstclaim.status import Status
from tests.acceptance.harness import (
    DEFERRED,
    PROCESSED,
    SHORT_LEASE,
    UNAVAILABLE,
    Overrides,
    StalledDelivery,
    eventually,
    sample,
)
from tests.chaos.actions import answered
from tests.chaos.history import History
from tests.chaos.own import Own
from tests.chaos.verdict import verdict

SHUTDOWN_SECONDS = 4
EXIT_SECONDS = 6  # for a busy machine: the interpreter's own end is a part of the shutdown
FLUSH_SECONDS = 1  # half of it for the watchdog's last words, half for this process to notice
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


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("behaviour", ["block_a_thread", "leave_a_thread", "stubborn", "block_the_loop"])
async def test_row_39_what_never_ends(behaviour: str, workers: int, history: History, tmp_path: Path) -> None:
    """A blocked thread, a swallowed cancellation, a blocked event loop: the stop ends in its time all the same."""
    sandbox, service = history.sandbox, await history.service(HASTY, workers=workers).start()
    assert (await answered(history, service, sample())).result == PROCESSED
    event = sample(behaviour, seconds=60, gate=str(tmp_path / "gate"), until=1)
    answer = asyncio.create_task(history.deliver(service, event))
    await sandbox.settled(event, Status.COMPLETED if behaviour == "leave_a_thread" else Status.PROCESSING)

    signalled_at = time.monotonic()
    service.terminate()
    code = await service.wait_for_exit()
    assert time.monotonic() - signalled_at < SHUTDOWN_SECONDS + EXIT_SECONDS
    await eventually(service.pids, lambda members: not members)
    await answer
    row = await sandbox.row(event)
    assert row is not None
    assert (row.failures, row.abandoned) == (0, 0)
    if behaviour == "block_the_loop":  # the loop that would release the event is what is blocked
        assert (code, row.status) == (1, Status.PROCESSING)
    elif behaviour == "leave_a_thread":
        assert (code, row.status) == (0, Status.COMPLETED)
    else:
        assert code == 0, service.output
        # Of two workers, the one that stops last may have taken over what the first released.
        assert row.status is Status.PENDING or workers == 2

    await history.service(SHORT_LEASE).start()
    assert (await sandbox.settled(event)).failures == 0
    await verdict(history)


async def test_row_39_frozen_postgres(own: Own, tmp_path: Path) -> None:
    """Postgres is frozen and a handler runs: nothing can be released, and the stop ends in its time all the same."""
    sandbox, service = own.history.sandbox, await own.history.service(HASTY).start()
    assert (await answered(own.history, service, sample())).result == PROCESSED
    event = sample("hold", gate=str(tmp_path / "gate"))
    answer = asyncio.create_task(own.history.deliver(service, event))
    await sandbox.settled(event, Status.PROCESSING)
    with own.history.postgres_unreachable():
        own.postgres.pause()
        signalled_at = time.monotonic()
        service.terminate()
        await service.wait_for_exit()
        assert time.monotonic() - signalled_at < SHUTDOWN_SECONDS + EXIT_SECONDS
        await answer
        own.postgres.resume()
    (tmp_path / "gate").touch()
    await own.history.service().start()
    await sandbox.settled(event)
    await verdict(own.history)


@pytest.mark.alone
async def test_row_39_a_frozen_worker(history: History) -> None:
    """One of two workers is frozen: the supervisor stops the other one, kills the frozen one and exits in its time."""
    service = await history.service(HASTY, workers=2).start()
    assert (await answered(history, service, sample())).result == PROCESSED
    frozen = (await history.sandbox.fetch("SELECT pid FROM effects"))[0]["pid"]
    os.kill(frozen, signal.SIGSTOP)
    signalled_at = time.monotonic()
    service.terminate()
    assert await service.wait_for_exit() == 1
    assert time.monotonic() - signalled_at < SHUTDOWN_SECONDS + FLUSH_SECONDS
    await eventually(service.pids, lambda members: not members)
    await verdict(history)
