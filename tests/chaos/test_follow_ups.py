"""Rows 60 and 61: kill -9 before and after the COMMIT that writes follow-ups, and under load with several handlers."""

import asyncio
from collections import Counter
from pathlib import Path

import pytest

from firstclaim.status import Status
from tests.acceptance.harness import SHORT_LEASE, Overrides, Sample, eventually, sample
from tests.chaos import follow_up_build
from tests.chaos.actions import answered, armed, killed
from tests.chaos.history import History
from tests.chaos.verdict import verdict

HANDLERS = f"tests.failpoints,tests.chaos.trace,{follow_up_build.__name__}"
BUILD: Overrides = {"handlers": HANDLERS}
EVENTS = 60
KILLS = 6


def several() -> Sample:
    return sample(type=follow_up_build.SEVERAL)


async def _rows(history: History) -> Counter[str]:
    rows = await history.sandbox.fetch("SELECT type, count(*) AS number FROM firstclaim.stripe_events GROUP BY 1")
    return Counter({row["type"]: row["number"] for row in rows})


async def _done(history: History, events: int) -> bool:
    expected = {row_type: number * events for row_type, number in follow_up_build.ROWS.items()}
    return await _rows(history) == expected and set(await history.sandbox.statuses()) == {Status.COMPLETED}


async def once_each(history: History, events: list[Sample]) -> None:
    """All rows of these events are there and completed, and each has one effect but the events' own."""
    await eventually(lambda: _done(history, len(events)), bool, 60)
    history.sandbox.waived |= {event.id for event in events}  # their fan-outs have no effect
    await verdict(history)
    [effects] = await history.sandbox.fetch("SELECT count(*) AS all, count(DISTINCT event_id) AS rows FROM effects")
    assert effects["all"] == effects["rows"] == (sum(follow_up_build.ROWS.values()) - 1) * len(events)


@pytest.mark.parametrize("point", ["handler", "commit"])
async def test_row_60_killed_around_the_commit(point: str, history: History, tmp_path: Path) -> None:
    """Before the COMMIT there is no row of a follow-up, after it another process runs them: one effect each."""
    doomed = history.service(SHORT_LEASE | armed(point, tmp_path / "kills") | BUILD)
    survivor = history.service(SHORT_LEASE | BUILD)
    await doomed.start()
    event = several()
    assert await history.deliver(doomed, event) is None
    await killed(doomed)
    rows = await _rows(history)
    assert rows[follow_up_build.SEVERAL] == 1
    assert rows.total() == (1 if point == "handler" else 3)
    await survivor.start()
    assert (await answered(history, survivor, event)).status == 200
    await once_each(history, [event])


async def test_row_61_killed_under_load(history: History) -> None:
    """Two processes are killed in turn while two handlers and their tasks run: one effect each, whoever runs it."""
    services = [await history.service(SHORT_LEASE | BUILD).start() for _ in range(2)]
    events = [several() for _ in range(EVENTS)]

    async def deliver(number: int, event: Sample) -> None:
        await asyncio.sleep(0)
        for turn in range(200):  # as Stripe does, until it is answered
            answer = await history.deliver(services[(number + turn) % 2], event)
            if answer is not None and answer.status < 300:
                return
            await asyncio.sleep(0.05)
        raise AssertionError(f"{event.id} was never answered")

    async def kill() -> None:
        for number in range(KILLS):
            before = (await _rows(history)).total()
            await eventually(lambda: _grown(history, before), bool, 30)  # noqa: B023  (awaited in its turn)
            await services[number % 2].kill()
            await services[number % 2].start()

    killing = asyncio.create_task(kill())
    for start in range(0, EVENTS, 10):
        await asyncio.gather(*(deliver(number, events[number]) for number in range(start, start + 10)))
    await killing
    await once_each(history, events)


async def _grown(history: History, before: int) -> bool:
    total = (await _rows(history)).total()
    return total > before or total == sum(follow_up_build.ROWS.values()) * EVENTS
