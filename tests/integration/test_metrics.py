"""The queries of `/metrics` on the ledger, on a real server."""

import asyncio

import pytest

from firstclaim.errors import LedgerUnavailable
from firstclaim.inbox.ledger import Recorded
from firstclaim.operations.queries import Backlog, Queries
from firstclaim.postgres.pool import Pool
from firstclaim.status import Status
from firstclaim.web.metrics import _CachedQuery
from tests.integration.conftest import MakeWorld
from tests.integration.world import World, delivery


async def test_many_scrapes_query_once(world: World) -> None:
    """Concurrent and later scrapes share one query until its result expires; then the next scrape queries again."""
    results: list[Backlog] = []

    async def query(queries: Queries) -> Backlog:
        results.append(await queries.backlog())
        return results[-1]

    cached = _CachedQuery(world.components.metrics_pool, query, 60)
    assert await asyncio.gather(*(cached.get() for _ in range(20))) == results * 20
    await world.state_of(delivery(), Status.PENDING)
    cached._expires_at -= 61
    again = await cached.get()
    assert again is not None
    assert (len(results), again.due) == (2, results[0].due + 1)


async def test_a_slow_ledger_is_not_waited_for(make_world: MakeWorld) -> None:
    """While both metrics connections are in use, the query returns None, and deliveries are not delayed."""
    world = await make_world(answer_budget_seconds=0.3)
    cached = _CachedQuery(world.components.metrics_pool, lambda queries: queries.backlog(), 60)
    async with world.components.metrics_pool.acquire(60), world.components.metrics_pool.acquire(60):
        scrape = asyncio.create_task(cached.get())
        assert isinstance(await world.ledger.record(delivery(), due_in_seconds=0), Recorded)
        assert await scrape is None


async def test_a_read_that_times_out_casts_no_doubt_on_markers(world: World) -> None:
    """A metrics or admin query that times out loses its connection, and the confirmed epoch stays confirmed."""
    await world.ledger.read_epoch()
    confirmed = world.claims._epoch.current
    assert confirmed is not None
    for pool in (world.components.metrics_pool, world.components.admin):
        lost = asyncio.Event()
        with pytest.raises(LedgerUnavailable):
            await _query_for_too_long(pool, lost)
        await lost.wait()
    assert world.claims._epoch.current == confirmed


async def _query_for_too_long(pool: Pool, lost: asyncio.Event) -> None:
    async with pool.acquire(0.1) as connection:
        connection.add_termination_listener(lambda _: lost.set())
        await connection.execute("SELECT pg_sleep(60)")
