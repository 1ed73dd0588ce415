"""kill -9 at the worst moments: whatever was promised is kept, and nothing is done twice."""

import asyncio
from pathlib import Path

import httpx
import pytest

from service.inbox.model import Status
from tests.acceptance.harness import (
    IGNORED,
    PROCESSED,
    SHORT_LEASE,
    Ground,
    Overrides,
    Sample,
    Service,
    eventually,
    post,
    sample,
)


async def unanswered(service: Service, event: Sample) -> None:
    """Deliver to a process that dies of it."""
    with pytest.raises(httpx.TransportError):
        await post(service.url, event.body)


async def killed_at(point: str, ground: Ground, folder: Path) -> tuple[Service, Sample, Sample]:
    """A service that was killed with two deliveries at `point`, and then started again."""
    kills = folder / "kills"
    kills.mkdir()
    armed: Overrides = {"TEST_FAILPOINT": point, "TEST_FAILPOINT_FOLDER": str(kills), "TEST_FAILPOINT_ARRIVALS": 2}
    service = ground.service(SHORT_LEASE | armed)
    await service.start()
    one, other = sample(), sample()
    await asyncio.gather(unanswered(service, one), unanswered(service, other))
    assert await service.ended() == -9
    assert len(list(kills.iterdir())) == 1
    return service, one, other


async def test_killed_after_the_lock(ground: Ground, tmp_path: Path) -> None:
    """A death between lock and row: no row, so nothing was promised; a retry is processed, silence stays silence."""
    service, retried, silent = await killed_at("lock", ground, tmp_path)
    assert await ground.key(retried) is not None, "it must have died with the lock held"
    assert await ground.rows() == 0

    await service.start()
    answer = await ground.deliver(service, retried)  # which never says ignored before a row exists
    assert answer.said in (PROCESSED, IGNORED)
    assert (await ground.settled(retried)).counts == (1, 0, 0)

    assert await ground.row(silent) is None
    await eventually(lambda: ground.key(silent), lambda value: value is None)
    assert (await ground.deliver(service, silent)).said == PROCESSED
    assert (await ground.settled(silent)).counts == (1, 0, 0)


@pytest.mark.parametrize("point", ["insert", "marker", "handler"])
async def test_killed_before_the_completion(point: str, ground: Ground, tmp_path: Path) -> None:
    """Dead after the row, after the marker, in the handler after its SQL: no effect stays, recovery does the rest."""
    service, retried, silent = await killed_at(point, ground, tmp_path)
    for event in (retried, silent):
        row = await ground.settled(event, Status.PROCESSING)
        assert row.counts == (1, 0, 0)

    await service.start()
    assert (await ground.deliver(service, retried)).said in (PROCESSED, IGNORED)
    for event in (retried, silent):
        row = await ground.settled(event)
        assert row.failures == 0, "a vanished holder is no failure of the handler"
        assert row.attempt == row.abandoned + 1 >= 2


async def test_killed_after_the_completion(ground: Ground, tmp_path: Path) -> None:
    """A death between the commit and the answer: the effect stands, and the retry is told so."""
    service, retried, silent = await killed_at("commit", ground, tmp_path)
    for event in (retried, silent):
        await ground.settled(event)

    await service.start()
    assert (await ground.deliver(service, retried)).said == IGNORED
    for event in (retried, silent):
        assert (await ground.settled(event)).counts == (1, 0, 0)


async def test_an_event_that_kills_its_process_dies_alone(ground: Ground, tmp_path: Path) -> None:
    """An event that aborts every process it meets ends dead; the neighbours it took down complete once each."""
    service = ground.service(SHORT_LEASE | {"abandoned_most": 2}, workers=2)
    await service.start()
    gate = tmp_path / "gate"
    neighbours = [sample("hold", gate=str(gate)) for _ in range(6)]
    in_flight = [asyncio.create_task(post(service.url, event.body)) for event in neighbours]
    for event in neighbours:
        await ground.settled(event, Status.PROCESSING)

    poison = sample("abort")
    await unanswered(service, poison)
    gate.touch()
    row = await ground.settled(poison, Status.DEAD)
    assert row.counts == (2, 0, 2)
    assert row.last_error is not None
    assert "abandoned" in row.last_error

    await asyncio.gather(*in_flight, return_exceptions=True)
    for event in neighbours:
        assert (await ground.settled(event)).failures == 0
    assert (await ground.deliver(service, sample())).said == PROCESSED, "the supervisor restarted its workers"
    ground.empty_redis()  # or the marker answers, and the ledger is not asked
    again = await ground.deliver(service, poison)
    assert (again.said, again.reason) == (IGNORED, f"Event {poison.id} is dead: replay it")
