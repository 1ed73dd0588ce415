"""Handlers with limits of their own: slots, a rate, a deadline, a backoff, a time to give up, a priority."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import cycle
from random import choices
from types import SimpleNamespace

import pytest

from firstclaim import Context, Event
from firstclaim.event import Delivery
from firstclaim.inbox.limited import Look
from firstclaim.inbox.limits import Limits
from firstclaim.inbox.rate import Rate
from firstclaim.inbox.redis_server import RedisServer, connect
from firstclaim.observability.handler_metrics import limit_metrics
from firstclaim.outcome import Kind
from firstclaim.status import Status
from tests.integration.conftest import MakeWorld
from tests.integration.test_keys import Shop, began, of, recovered
from tests.integration.world import World, until

TYPE, OTHER = "customer.subscription.updated", "charge.refunded"


@pytest.fixture
async def shop() -> Shop:
    """A handler whose gate is closed."""
    return Shop()


async def statuses(world: World) -> Counter[str]:
    """How many events are in each status."""
    return Counter(
        {
            row["status"]: row["events"]
            for row in await world.database.fetch(
                "SELECT status, count(*) AS events FROM firstclaim.stripe_events GROUP BY status"
            )
        }
    )


@asynccontextmanager
async def deliveries(world: World, given: Sequence[Delivery]) -> AsyncIterator[list[Kind]]:
    """Deliver them one after the other, without waiting for those that run; their outcomes are there at the end."""
    kinds: list[Kind] = []
    tasks = [asyncio.create_task(world.pipeline.deliver(each)) for each in given]
    yield kinds
    kinds += [(await each).kind for each in tasks]


# -- slots --------------------------------------------------------------------------------------------


async def test_a_handler_runs_in_no_more_slots_than_its_own(make_world: MakeWorld, shop: Shop) -> None:
    """Beyond them events are recorded and not claimed, and other handlers have the other slots."""
    world = await make_world({TYPE: shop.handle, OTHER: shop.handle}, options={TYPE: {"slots": 2}})
    before = limit_metrics(TYPE).refused["slots"]._value.get()
    async with deliveries(world, [of(None) for _ in range(7)]) as kinds:

        async def recorded() -> bool:
            return await statuses(world) == {"processing": 2, "pending": 5}

        await until(recorded)
        for _ in range(3):
            await world.pipeline.recover(await world.ledger.survey())
        assert await statuses(world) == {"processing": 2, "pending": 5}, "recovery keeps to it too"
        await began(shop, 2)
        async with deliveries(world, [of(None, OTHER)]):
            await began(shop, 3)
            shop.gate.set()
    assert Counter(kinds) == {Kind.PROCESSED: 2, Kind.DEFERRED: 5}
    assert limit_metrics(TYPE).refused["slots"]._value.get() == before + 5
    await recovered(world, completed=8)
    assert shop.most[None] <= 3
    assert await world.database.fetchval("SELECT sum(failures + abandoned) FROM firstclaim.stripe_events") == 0


async def test_a_free_slot_of_its_own_wakes_recovery(make_world: MakeWorld, shop: Shop) -> None:
    """What was recorded because the handler's slots were taken begins when one is free, not a round later."""
    world = await make_world({TYPE: shop.handle}, options={TYPE: {"slots": 1}})
    async with deliveries(world, [of(None), of(None)]):

        async def recorded() -> bool:
            return await statuses(world) == {"processing": 1, "pending": 1}

        await until(recorded)
        await world.pipeline.recover(await world.ledger.survey())
        world.slots.work.clear()
        shop.gate.set()
        await asyncio.wait_for(world.slots.work.wait(), 5)
    await world.pipeline.recover()
    await recovered(world, completed=2)


async def test_what_was_abandoned_before_keeps_to_the_limit_too(make_world: MakeWorld, shop: Shop) -> None:
    """Such an event of a limited handler is found by the look of its own handler, and runs within its slots."""
    world = await make_world({TYPE: shop.handle}, options={TYPE: {"slots": 1}})
    suspect = of(None)
    await world.ledger.record(suspect, due_in_seconds=-1)
    await world.change(suspect.event.id, abandoned=1)
    async with deliveries(world, [of(None)]):
        await began(shop, 1)
        await world.pipeline.recover(await world.ledger.survey())
        assert await world.status(suspect.event.id) is Status.PENDING
        shop.gate.set()
    await recovered(world, completed=2)
    assert shop.most[None] == 1


# -- the rate -----------------------------------------------------------------------------------------


async def test_a_rate_holds_across_processes(make_world: MakeWorld, shop: Shop) -> None:
    """Two processes let through no more together than one may; the rest is recorded, and begins as time goes on."""
    shop.gate.set()
    worlds = [await make_world({TYPE: shop.handle}, options={TYPE: {"per_second": 5}}) for _ in range(2)]
    loop = asyncio.get_running_loop()
    began_at = loop.time()
    async with (
        deliveries(worlds[0], [of(None) for _ in range(4)]) as first,
        deliveries(worlds[1], [of(None) for _ in range(4)]) as second,
    ):
        pass
    assert Counter(first + second)[Kind.PROCESSED] <= 1 + 5 * (loop.time() - began_at)
    await recovered(*worlds, completed=8)
    assert loop.time() - began_at >= 7 / 5
    assert await worlds[0].database.fetchval("SELECT sum(failures + abandoned) FROM firstclaim.stripe_events") == 0
    assert await worlds[0].database.fetchval("SELECT max(attempt) FROM firstclaim.stripe_events") == 1, "none in vain"


async def test_the_count_spreads_a_rate_evenly(world: World) -> None:
    """A tenth of a second's worth at once, one at least; then as many as time has passed for."""
    slow = Rate(world.redis_server, world.settings.redis_prefix, "shop.slow", 0.1)
    assert (await slow.take(500)).events == 1
    refused = await slow.take(1)
    assert (refused.events, 9 < refused.wait_seconds <= 10) == (0, True)
    rate = Rate(world.redis_server, world.settings.redis_prefix, "shop.handle", 100)
    loop, began_at, taken = asyncio.get_running_loop(), asyncio.get_running_loop().time(), 0
    while taken < 40:
        granted = await rate.take(500)
        taken += granted.events
        await asyncio.sleep(granted.wait_seconds)
        assert taken <= 10 + 100 * (loop.time() - began_at) + 1
    assert loop.time() - began_at < 5, "and no slower"


async def test_an_odd_count_limits_nothing_for_long(world: World) -> None:
    """A value that is no number, a key of another type, without a TTL or with a longer one does not stop a handler."""
    rate = Rate(world.redis_server, world.settings.redis_prefix, "shop.handle", 100)
    await world.redis.set(rate._key, "junk")
    assert (await rate.take(1)).events == 1
    await world.redis.delete(rate._key)
    await world.redis.rpush(rate._key, "junk")
    assert (await rate.take(1)).events == 1
    await world.redis.set(rate._key, "0", ex=3600)
    assert (await rate.take(1)).wait_seconds <= 0.01


async def test_without_redis_nothing_begins_and_everything_is_recorded(make_world: MakeWorld, shop: Shop) -> None:
    """The count cannot be read: no event is let through uncounted, and each is in the ledger."""
    shop.gate.set()
    world = await make_world({TYPE: shop.handle}, options={TYPE: {"per_second": 1000}})
    away = RedisServer(connect("redis://127.0.0.1:1", timeout_seconds=0.2), breaker_seconds=1)
    next(iter(world.pipeline._limits))._rate = Rate(away, world.settings.redis_prefix, "shop.handle", 1000)
    given = of(None)
    assert (await world.pipeline.deliver(given)).kind is Kind.DEFERRED
    assert (await world.row(given.event.id))["status"] == Status.PENDING
    assert await world.pipeline.recover(await world.ledger.survey()) in (True, False)
    assert shop.order == []
    await away.close()


# -- deadline, backoff, giving up ---------------------------------------------------------------------


async def test_a_handler_has_a_deadline_of_its_own(make_world: MakeWorld, shop: Shop) -> None:
    """It fails past it, and Postgres ends its transaction as long after it as the settings say."""
    seen: list[str] = []

    async def handle(event: Event, context: Context) -> str:
        rows = await context.fetch("SELECT current_setting('idle_in_transaction_session_timeout')")
        seen.append(rows[0][0])
        await shop.gate.wait()
        return "never"

    world = await make_world({TYPE: handle}, options={TYPE: {"deadline": 0.5}})
    given = of(None)
    assert (await world.pipeline.deliver(given)).kind is Kind.FAILED
    assert "its deadline of 0.5 s" in (await world.row(given.event.id))["last_error"]
    assert seen == ["60500ms"], "180 s - 120 s later than the deadline"


@pytest.mark.parametrize("failures", [0, 9])
async def test_a_handler_has_a_backoff_of_its_own(make_world: MakeWorld, failures: int) -> None:
    """Its first wait and its longest."""

    async def fail(event: Event, context: Context) -> str:
        raise RuntimeError("no")

    world = await make_world({TYPE: fail}, options={TYPE: {"backoff": (100, 400)}})
    given = of(None)
    await world.ledger.record(given, due_in_seconds=0)
    await world.change(given.event.id, failures=failures)
    assert (await world.pipeline.deliver(given)).kind is Kind.FAILED
    whole = 400 if failures else 100
    assert whole / 2 - 5 <= (await world.row(given.event.id))["due_in"] <= whole


async def test_a_handler_has_a_time_of_its_own_to_give_up(make_world: MakeWorld) -> None:
    """The row says it from the first failure on; past it a failure is the last, and before it is not."""

    async def fail(event: Event, context: Context) -> str:
        raise RuntimeError("no")

    world = await make_world({TYPE: fail, OTHER: fail}, options={TYPE: {"give_up": 600}})
    given, other = of(None), of(None, OTHER)
    assert (await world.pipeline.deliver(given)).kind is Kind.FAILED
    assert (await world.pipeline.deliver(other)).kind is Kind.FAILED
    assert 590 < (await world.row(given.event.id))["give_up_in"] <= 600
    assert (await world.row(other.event.id))["give_up_in"] > 250_000
    await world.pipeline.deliver(given)
    row = await world.row(given.event.id)
    assert (row["status"], row["failures"]) == (Status.FAILED, 2)
    assert 590 < row["give_up_in"] <= 600, "it is corrected once"
    await world.change(given.event.id, give_up_at=-1.0)
    await world.pipeline.deliver(given)
    assert await world.status(given.event.id) is Status.DEAD


# -- priority -----------------------------------------------------------------------------------------


async def test_scarce_slots_go_to_the_higher_priority_first(
    make_world: MakeWorld, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one slot and due events of both, most of the first that run are of the higher, and some of the other."""
    drawn = cycle([0.1, 0.4, 0.7, 0.8])  # three of four are below the share of the higher
    monkeypatch.setattr("firstclaim.inbox.limits.random", SimpleNamespace(random=lambda: next(drawn), choices=choices))
    shop.gate.set()
    world = await make_world({TYPE: shop.handle, OTHER: shop.handle}, options={TYPE: {"priority": 5}}, handler_slots=1)
    kinds: dict[str, str] = {}
    for number in range(40):
        each = of(None, OTHER if number % 2 else TYPE)
        kinds[each.event.id] = each.event.type
        await world.ledger.record(each, due_in_seconds=-100 if number % 2 else -1)
    await recovered(world, completed=40)
    first = Counter(kinds[each] for each in shop.order[:20])
    assert first[TYPE] > 10
    assert first[OTHER] >= 1


def _looks(world: World) -> list[Look]:
    return [Look(limited, due=["evt"] * 50, most=50) for limited in world.pipeline._limits]


async def test_no_priority_keeps_the_others_waiting(make_world: MakeWorld, shop: Shop) -> None:
    """Of many slots each level gets its part, equal ones in proportion, and none goes unused."""
    types = {"a": 10, "b": 0, "c": -10}
    world = await make_world(
        dict.fromkeys(types, shop.handle),
        options={name: {"priority": priority, "slots": 50} for name, priority in types.items()},
        handler_slots=50,
    )
    shares: Counter[int | str] = Counter()
    for _ in range(100):
        looks = _looks(world)
        others = Limits.share_out(looks, 10, 50)
        assert others + sum(look.share for look in looks) == 10
        shares.update({look.limited.options.priority: look.share for look in looks})
        shares["others"] += others
    assert shares[10] > shares[0] + shares["others"] > shares[-10] > 0
    assert abs(shares[0] - shares["others"]) < 120
    looks = _looks(world)
    assert Limits.share_out(looks, 1000, 5) == 5
    assert [look.share for look in looks] == [50, 50, 50]


# -- all together -------------------------------------------------------------------------------------


async def test_events_of_handlers_without_options_are_looked_for_as_ever(make_world: MakeWorld, shop: Shop) -> None:
    """A process without options has one backlog for all; one with them looks for the others apart."""
    plain = await make_world({TYPE: shop.handle})
    assert plain.pipeline._singles is plain.pipeline._backlog is plain.pipeline._abandoned
    assert not list(plain.pipeline._limits)
    mixed = await make_world({TYPE: shop.handle, OTHER: shop.handle}, options={TYPE: {"slots": 1}})
    shop.gate.set()
    suspects = [of(None, each) for each in (TYPE, OTHER, TYPE, OTHER)]
    for number, each in enumerate(suspects):
        await mixed.ledger.record(each, due_in_seconds=-1)
        await mixed.change(each.event.id, abandoned=number // 2)
    await recovered(mixed, completed=4)
    for each in suspects:
        assert await mixed.effects(each.event.id) == 1
