"""The queries of `/metrics` on the ledger, on a real server."""

import asyncio
import re

import pytest

from firstclaim.errors import LedgerUnavailable
from firstclaim.event import Delivery
from firstclaim.inbox.ledger import Recorded
from firstclaim.operations import queries as queries_module
from firstclaim.operations.queries import Backlog, Gaps, Queries
from firstclaim.postgres.pool import Pool
from firstclaim.status import Status
from firstclaim.web.metrics import MetricsEndpoint, _CachedQuery
from tests.integration.conftest import MakeWorld
from tests.integration.world import World, delivery, effect, explained


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


# -- for how long events are due, and how often new ones come ---------------------------------------


async def seconds_due(world: World, name: str) -> dict[str, float]:
    """A gauge by the label's value, from one reading; rounded to a minute."""
    parts = world.components
    endpoint = MetricsEndpoint([], parts.metrics_pool, 20, parts.routes, parts.pauses)
    return {
        ",".join(sample.labels.values()): round(sample.value, -2)
        for family in (await endpoint.read()).collect()
        for sample in family.samples
        if sample.name == name
    }


async def is_due(world: World, seconds: float, given: Delivery, **changes: object) -> None:
    """The event waits, and has been due for so long."""
    await world.ledger.record(given, due_in_seconds=0)
    await world.change(given.event.id, due_at=-seconds, **changes)


async def test_the_oldest_due_event_of_each_handler(make_world: MakeWorld) -> None:
    """Each handler has the age of its own oldest due event, abandoned or not; without one it is 0."""
    world = await make_world({"invoice.paid": effect, "customer.subscription.*": effect, "charge.refunded": effect})
    await is_due(world, 1000, delivery(type="invoice.paid"))
    await is_due(world, 500, delivery(type="customer.subscription.deleted"))
    await is_due(world, 3000, delivery(type="customer.subscription.updated"), abandoned=1)
    settled = delivery(type="customer.subscription.updated")
    await is_due(world, 9000, settled)
    await world.settle(settled.event.id, Status.COMPLETED)
    await is_due(world, -9000, delivery(type="charge.refunded"))
    assert await seconds_due(world, "firstclaim_handler_oldest_due_seconds") == {
        "invoice.paid": 1000,
        "customer.subscription.*": 3000,
        "charge.refunded": 0,
    }
    assert await seconds_due(world, "firstclaim_unwanted_due_seconds") == {"": 0}


async def test_what_nobody_here_wants_is_one_number(make_world: MakeWorld) -> None:
    """Due events without a handler in this process, or of another mode, are one number, without a label."""
    world = await make_world({"invoice.paid": effect}, livemode="live")
    await is_due(world, 700, delivery(type="invoice.paid", livemode=False))
    assert await seconds_due(world, "firstclaim_unwanted_due_seconds") == {"": 700}
    await is_due(world, 1300, delivery(type="charge.refunded", livemode=True))
    assert await seconds_due(world, "firstclaim_unwanted_due_seconds") == {"": 1300}
    assert await seconds_due(world, "firstclaim_handler_oldest_due_seconds") == {"invoice.paid": 0}


async def test_the_oldest_due_events_are_found_by_index(world: World) -> None:
    """The age of each type's oldest event costs one descent of an index, also behind many due events."""
    await world.database.execute(
        """
        INSERT INTO firstclaim.stripe_events
               (event_id, type, livemode, created_at, status, attempt, received_at, due_at, give_up_at)
        SELECT 'evt_x' || n, 'type.' || n % 5, true, now(), 'pending', 1, now(), now() - n * interval '1 s', now()
          FROM generate_series(1, 20000) AS n
        """
    )
    await world.database.execute("ANALYZE firstclaim.stripe_events")
    async with world.components.metrics_pool.acquire(60) as connection:
        plan = await explained(connection, queries_module._OLDEST_DUE, "EXPLAIN (ANALYZE, BUFFERS)")
        assert await Queries(connection).oldest_due() == {
            (f"type.{n}", True): pytest.approx(20000 - (5 - n) % 5, abs=60) for n in range(5)
        }
    assert "Seq Scan" not in plan
    assert int(re.findall(r"shared hit=(\d+)", plan)[0]) < 200


async def test_the_gap_since_the_last_event_and_the_usual_one(world: World) -> None:
    """From 100 gaps on, the usual one is what few of the newest exceed. The open gap is not one of them."""
    async with world.components.metrics_pool.acquire(60) as connection:
        assert await Queries(connection).gaps() == Gaps(None, None)
        await _received(world, 50, gap_seconds=10, last_seconds_ago=3600)
        gaps = await Queries(connection).gaps()
        assert (round(gaps.open_seconds or 0, -2), gaps.usual_seconds) == (3600, None)
        await world.database.execute("DELETE FROM firstclaim.stripe_events")
        await _received(world, 20_000, gap_seconds=10, last_seconds_ago=3600)
        gaps = await Queries(connection).gaps()
        assert gaps.usual_seconds == pytest.approx(10)
        assert "stripe_events_received" in await explained(connection, queries_module._GAPS, events=1000, fewest=100)


async def _received(world: World, count: int, *, gap_seconds: float, last_seconds_ago: float) -> None:
    await world.database.execute(
        """
        INSERT INTO firstclaim.stripe_events
               (event_id, type, livemode, created_at, status, attempt, received_at, due_at, give_up_at, settled_at)
        SELECT 'evt_x' || n, 'invoice.paid', true, now(), 'completed', 1,
               now() - make_interval(secs => $2 + n * $3), now(), now(), now()
          FROM generate_series(0, $1 - 1) AS n
        """,
        count,
        last_seconds_ago,
        gap_seconds,
    )
    await world.database.execute("ANALYZE firstclaim.stripe_events")


async def test_a_paused_type_is_not_overdue(make_world: MakeWorld) -> None:
    """A handler with a paused type is shown as paused, and what waits for that type does not count as overdue."""
    world = await make_world({"invoice.*": effect, "charge.refunded": effect})
    await is_due(world, 1000, delivery(type="invoice.paid"))
    await is_due(world, 500, delivery(type="invoice.payment_failed"))
    world.components.pauses.update(["invoice.paid"])
    assert await seconds_due(world, "firstclaim_handler_oldest_due_seconds") == {"invoice.*": 500, "charge.refunded": 0}
    endpoint = MetricsEndpoint([], world.components.metrics_pool, 20, world.components.routes, world.components.pauses)
    [family] = [each for each in (await endpoint.read()).collect() if each.name == "firstclaim_handler_paused"]
    assert {sample.labels["handler"]: sample.value for sample in family.samples} == {
        "invoice.*": 1,
        "charge.refunded": 0,
    }
