"""Rows 5 to 9: kill -9 at the worst moments. Every promise is kept, and nothing is done twice.

Two services share the sandbox. The one that receives a delivery is killed at a chosen point. The ledger's leases run
on a clock that the test advances: until then nothing is recovered, so each state can be checked.
"""

import asyncio
from functools import partial
from pathlib import Path

import pytest

from firstclaim.status import Status
from tests.acceptance.harness import (
    IGNORED,
    PROCESSED,
    SHORT_LEASE,
    Overrides,
    Sample,
    Service,
    eventually,
    parallel_reason,
    recovery_has_passed,
    sample,
)
from tests.chaos.actions import answered, armed, dispatched, killed
from tests.chaos.history import History
from tests.chaos.verdict import verdict
from tests.clock import Clock

LEASE_SECONDS = 10.0
PATIENT: Overrides = {"lease_seconds": LEASE_SECONDS}
KILLS = 3


async def died_at(point: str, history: History, folder: Path, *events: Sample) -> Service:
    """Let a service be killed by `events` at `point`, all of them unanswered; returns another, healthy service."""
    doomed = history.service(PATIENT | armed(point, folder / "kills", arrivals=len(events)))
    survivor = history.service(PATIENT)
    await asyncio.gather(doomed.start(), survivor.start())
    answers = await asyncio.gather(*(history.deliver(doomed, event) for event in events))
    assert answers == [None] * len(events), "each connection was to be reset"
    await killed(doomed)
    return survivor


async def test_row_05_killed_after_the_lock(history: History, tmp_path: Path) -> None:
    """Killed between lock and row: no retry is ignored before there is a row, and each event completes."""
    retried, silent = sample(), sample()
    survivor = await died_at("lock", history, tmp_path, retried, silent)
    assert (await history.sandbox.key(silent) or b"").startswith(b"claimed:"), (
        "it should have been killed with the lock held"
    )
    assert await history.sandbox.rows() == 0

    # While the lock of the killed service lasts, a retry is recorded and then ignored; afterwards it is processed.
    assert (await answered(history, survivor, retried)).result in (IGNORED, PROCESSED)
    assert (await history.sandbox.settled(retried)).counts == (1, 0, 0)
    await eventually(lambda: history.sandbox.key(silent), lambda value: value is None)
    assert await history.sandbox.row(silent) is None
    assert (await answered(history, survivor, silent)).result == PROCESSED
    assert (await history.sandbox.settled(silent)).counts == (1, 0, 0)
    await verdict(history)


@pytest.mark.parametrize("point", ["insert", "marker"])
async def test_row_06_killed_after_the_insert(point: str, history: History, clock: Clock, tmp_path: Path) -> None:
    """Killed after the row's commit, before or after its marker: the retry is ignored, recovery completes it."""
    await dead_before_the_commit(point, history, clock, tmp_path)


@pytest.mark.smoke
async def test_row_07_killed_in_the_handler(history: History, clock: Clock, tmp_path: Path) -> None:
    """Killed after the handler's SQL, before the mark and its COMMIT: no effect remains, recovery completes it."""
    await dead_before_the_commit("handler", history, clock, tmp_path)


async def dead_before_the_commit(point: str, history: History, clock: Clock, folder: Path) -> None:
    event = sample()
    survivor = await died_at(point, history, folder, event)
    held = await history.sandbox.settled(event, Status.PROCESSING)  # and no effect is there
    assert held.counts == (1, 0, 0)
    assert (await answered(history, survivor, event)).result == IGNORED
    assert await history.sandbox.row(event) == held, "nothing takes it over while its lease lasts"

    await clock.advance(LEASE_SECONDS)
    # An abandoned attempt is no failure of the handler: it is counted separately.
    assert (await history.sandbox.settled(event)).counts == (2, 0, 1)
    assert dispatched(history, event)[-1] == 2
    await verdict(history)


async def test_row_08_killed_after_the_completion(history: History, clock: Clock, tmp_path: Path) -> None:
    """Killed between the commit and the answer: the one effect stays, the retry is ignored, recovery does nothing."""
    event = sample()
    survivor = await died_at("commit", history, tmp_path, event)
    completed = await history.sandbox.settled(event)
    retry = await answered(history, survivor, event)
    assert (retry.result, retry.reason) == (IGNORED, parallel_reason(event.id))

    await clock.advance(LEASE_SECONDS)
    await recovery_has_passed(history.sandbox, survivor)
    assert await history.sandbox.settled(event) == completed
    assert dispatched(history, event) == [1]
    await verdict(history)


# The number of events that are delivered until three processes have been killed. One event is enough for a point that
# each of its attempts reaches; after a commit an event has no further attempt.
VICTIMS = {"lock": 1, "insert,take_over": 1, "handler": 1, "commit": KILLS}


@pytest.mark.parametrize("points", VICTIMS)
async def test_row_09_killed_three_times_running(points: str, history: History, tmp_path: Path) -> None:
    """Killed at the same point three times in a row, in any process: the event settles then, with one effect."""
    folder = tmp_path / "kills"
    # The supervisor starts a worker whenever one has died.
    service = await history.service(SHORT_LEASE | armed(points, folder, times=KILLS), workers=2).start()
    events = [sample() for _ in range(VICTIMS[points])]
    for event in events:
        assert await history.deliver(service, event) is None
        await eventually(partial(history.deliver, service, event))  # as Stripe does, until it is answered

    async def kills() -> int:
        return len(list(folder.iterdir()))

    await eventually(kills, lambda kills: kills == KILLS)
    for event, row in zip(events, await history.sandbox.all_settled(events), strict=True):
        assert row.failures == 0
        assert row.attempt == row.abandoned + 1 == (1 if points in ("lock", "commit") else KILLS + 1)
        assert (await answered(history, service, event)).result == IGNORED
    await verdict(history)
