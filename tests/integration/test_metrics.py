"""What `/metrics` asks of the ledger, on a real server."""

import asyncio

import pytest

from firstclaim.errors import LedgerUnavailable
from firstclaim.operations.queries import Backlog, Queries
from firstclaim.postgres.connection import Pool
from firstclaim.status import Status
from firstclaim.web.metrics import _Kept
from tests.integration.conftest import MakeWorld
from tests.integration.world import World, delivery


async def test_many_scrapes_ask_once(world: World) -> None:
    """However many come at once, and until the answer is too old; then the next one asks anew."""
    asked: list[Backlog] = []

    async def ask(inspection: Queries) -> Backlog:
        asked.append(await inspection.backlog())
        return asked[-1]

    kept = _Kept(world.components.metrics_pool, ask, 60)
    assert await asyncio.gather(*(kept.get() for _ in range(20))) == asked * 20
    await world.state_of(delivery(), Status.PENDING)
    kept._kept_until -= 61
    again = await kept.get()
    assert again is not None
    assert (len(asked), again.due) == (2, asked[0].due + 1)


async def test_a_slow_ledger_is_not_waited_for(make_world: MakeWorld) -> None:
    """Both connections of its own are taken: nothing is told, and a delivery goes its way meanwhile."""
    world = await make_world(answer_budget_seconds=0.3)
    kept = _Kept(world.components.metrics_pool, lambda inspection: inspection.backlog(), 60)
    async with world.components.metrics_pool.borrow(60), world.components.metrics_pool.borrow(60):
        looking = asyncio.create_task(kept.get())
        assert await world.ledger.record(delivery(), due_in_seconds=0) is None
        assert await looking is None


async def test_a_look_that_is_given_up_puts_no_marker_in_doubt(world: World) -> None:
    """Its connection is lost with it; a duplicate is told by its marker all the same, and asks no ledger."""
    await world.ledger.read_epoch()
    confirmed = world.claims.epoch.current
    assert confirmed is not None
    for pool in (world.components.metrics_pool, world.components.admin):
        lost = asyncio.Event()
        with pytest.raises(LedgerUnavailable):
            await _look_for_too_long(pool, lost)
        await lost.wait()
    assert world.claims.epoch.current == confirmed


async def _look_for_too_long(pool: Pool, lost: asyncio.Event) -> None:
    async with pool.borrow(0.1) as connection:
        connection.add_termination_listener(lambda _: lost.set())
        await connection.execute("SELECT pg_sleep(60)")
