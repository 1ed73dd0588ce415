"""Row 47: a poison event, a killed process and a handler's own COMMIT, each in the middle of a batch."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

from firstclaim.status import Status
from tests.acceptance.handlers import BATCHED
from tests.acceptance.harness import FAILED, PROCESSED, Answer, Overrides, Sample, Service, eventually, sample
from tests.chaos import trace
from tests.chaos.actions import killed
from tests.chaos.history import History
from tests.chaos.verdict import verdict

# One slot, which an event holds until the others have gathered behind it.
ONE_SLOT: Overrides = {"handler_slots": 1, "lease_seconds": 4, "lock_ttl_seconds": 2, "answer_budget_seconds": 30.0}


async def together(history: History, service: Service, events: Sequence[Sample], folder: Path) -> list[Answer | None]:
    """Deliver `events` while another event of the batch handler has the only slot; returns their answers."""
    gate = folder / "gate"
    first = asyncio.create_task(history.deliver(service, sample("hold", BATCHED, gate=str(gate))))
    await eventually(lambda: _held(history), bool)
    others = [asyncio.create_task(history.deliver(service, event)) for event in events]
    await eventually(history.sandbox.rows, lambda rows: rows == len(events) + 1)
    gate.touch()
    answers = await asyncio.gather(*others)
    await first
    return answers


async def _held(history: History) -> bool:
    return any(line.what == trace.HOLD for line in trace.read(history.trace))


def batched(history: History) -> set[str]:
    """The events that were in a batch."""
    return {line.event_id for line in trace.read(history.trace) if line.what == trace.BATCH_START}


async def test_row_47_a_poison_event_in_a_batch(history: History, tmp_path: Path) -> None:
    """It fails alone, and is charged alone; the others are processed at their first attempt, with one effect each."""
    service = await history.service(ONE_SLOT).start()
    poison, others = sample("fail", BATCHED, until=1), [sample(type=BATCHED) for _ in range(8)]
    answers = await together(history, service, [*others[:4], poison, *others[4:]], tmp_path)
    results = [answer.result for answer in answers if answer is not None]
    assert results == [PROCESSED] * 4 + [FAILED] + [PROCESSED] * 4
    assert batched(history)
    for event in others:
        assert (await history.sandbox.settled(event)).counts == (1, 0, 0)
    assert (await history.sandbox.settled(poison)).counts == (2, 1, 0)
    await verdict(history)


async def test_row_47_killed_in_a_batch(history: History, tmp_path: Path) -> None:
    """The batch counts as abandoned, and its events come back one at a time: the one that kills stays alone."""
    doomed = await history.service(ONE_SLOT).start()
    poison, others = sample("die", BATCHED, until=1), [sample(type=BATCHED) for _ in range(6)]
    await together(history, doomed, [*others, poison], tmp_path)
    await killed(doomed)
    survivor = await history.service(ONE_SLOT).start()
    for event in [*others, poison]:
        row = await history.sandbox.settled(event)
        assert row.status is Status.COMPLETED
        assert row.failures == 0
    lines = trace.read(history.trace)
    assert not {line.event_id for line in lines if line.what == trace.BATCH_START and line.attempt > 1}
    assert survivor is not doomed
    await verdict(history)


async def test_row_47_an_own_commit_in_a_batch(history: History, tmp_path: Path) -> None:
    """Every event of the batch is dead, with the rule's name and the effect that was committed; none runs again."""
    service = await history.service(ONE_SLOT).start()
    rogue, others = sample("raw_commit", BATCHED), [sample(type=BATCHED) for _ in range(6)]
    await together(history, service, [*others, rogue], tmp_path)
    row = await history.sandbox.row(rogue)
    assert row is not None
    assert row.status is Status.DEAD
    for event in [*others, rogue]:
        row = await history.sandbox.row(event)
        assert row is not None
        assert row.status in (Status.COMPLETED, Status.DEAD)
        if row.status is Status.DEAD:
            assert "rule broken: a handler must not commit" in (row.last_error or "")
            history.sandbox.waived.add(event.id)
        assert await history.sandbox.effects(event) == 1
    await verdict(history)
