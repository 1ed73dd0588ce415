"""Handlers with a key: no two events of one key run at once, in the whole fleet; what waits costs nobody anything."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import asyncpg
import pytest

from firstclaim import Context, Event
from firstclaim.errors import LedgerUnavailable
from firstclaim.event import Delivery
from firstclaim.handler_options import lock_number
from firstclaim.inbox.backlog import Backlog
from firstclaim.inbox.dispatch import KEY_IS_TAKEN
from firstclaim.observability.handler_metrics import limit_metrics
from firstclaim.outcome import Kind
from firstclaim.status import Status
from tests.integration.conftest import MakeWorld
from tests.integration.world import World, delivery, effect, until
from tests.pages import ON, logged_in

TYPE, OTHER = "customer.subscription.updated", "charge.refunded"
KEYED = {TYPE: {"key": "customer"}}


@dataclass(slots=True)
class Shop:
    """A handler that counts how many events of each customer it has at once, and waits while `gate` is closed."""

    gate: asyncio.Event = field(default_factory=asyncio.Event)
    running: Counter[str | None] = field(default_factory=Counter)
    most: Counter[str | None] = field(default_factory=Counter)
    order: list[str] = field(default_factory=list)

    async def handle(self, event: Event, context: Context) -> str:
        customer = event.data["object"]["customer"]
        self.order.append(event.id)
        self.running[customer] += 1
        self.most[customer] = max(self.most[customer], self.running[customer])
        try:
            await self.gate.wait()
            await effect(event, context)
        finally:
            self.running[customer] -= 1
        return "kept"


@pytest.fixture
async def shop() -> Shop:
    """A handler whose gate is closed."""
    return Shop()


def of(customer: str | None, type: str = TYPE) -> Delivery:  # noqa: A002
    """A delivery of an event of this customer."""
    return delivery(type=type, data={"object": {"customer": customer}})


async def began(shop: Shop, number: int) -> None:
    """Wait until the handler has begun so many events."""

    async def seen() -> bool:
        return len(shop.order) >= number

    await until(seen)


async def recovered(*worlds: World, completed: int) -> None:
    """Rounds of recovery in each process, until so many events are completed."""

    async def done() -> bool:
        for world in worlds:
            await world.pipeline.recover(await world.ledger.survey())
        found: int = await worlds[0].database.fetchval(
            "SELECT count(*) FROM firstclaim.stripe_events WHERE status = 'completed'"
        )
        return found == completed

    await until(done)


@asynccontextmanager
async def taken(world: World, customer: str) -> AsyncIterator[None]:
    """Another process of the fleet has this key while the block runs."""
    other = await asyncpg.connect(world.url)
    try:
        await other.execute("BEGIN")
        await other.execute("SELECT pg_advisory_xact_lock($1)", lock_number("firstclaim", customer))
        yield
    finally:
        await other.close()


async def test_another_process_does_not_run_a_second_event_of_a_key(make_world: MakeWorld, shop: Shop) -> None:
    """It answers 202 at once, charges nothing, holds no slot, and the event runs when the first has ended."""
    first, second = [await make_world({TYPE: shop.handle}, options=KEYED) for _ in range(2)]
    running = asyncio.create_task(first.pipeline.deliver(of("cus_1")))
    await began(shop, 1)
    waiting = of("cus_1")
    answer = await second.pipeline.deliver(waiting)
    assert (answer.kind, answer.reason) == (Kind.DEFERRED, KEY_IS_TAKEN)
    row = await first.row(waiting.event.id)
    assert (row["status"], row["attempt"], row["failures"], row["abandoned"]) == (Status.PENDING, 1, 0, 0)
    assert 0 < row["due_in"] <= 1
    assert second.slots.free == second.slots.size
    assert await first.value(waiting.event.id) is None, "its next delivery must reach the ledger"
    shop.gate.set()
    assert (await running).kind is Kind.PROCESSED
    await recovered(first, second, completed=2)
    assert await first.effects(waiting.event.id) == 1
    assert shop.most == {"cus_1": 1}


async def test_the_lock_of_a_key_is_not_waited_for(make_world: MakeWorld, shop: Shop) -> None:
    """A key that another transaction has for long costs no slot, no connection and no charge."""
    world = await make_world({TYPE: shop.handle}, options=KEYED, handler_slots=1)
    shop.gate.set()
    before = limit_metrics(TYPE).waits["fleet"]._value.get()
    async with taken(world, "cus_1"):
        waiting = of("cus_1")
        async with asyncio.timeout(5):
            assert (await world.pipeline.deliver(waiting)).kind is Kind.DEFERRED
            assert (await world.pipeline.deliver(of("cus_2"))).kind is Kind.PROCESSED, "another key has the slot"
        assert (await world.row(waiting.event.id))["failures"] == 0
    assert limit_metrics(TYPE).waits["fleet"]._value.get() == before + 1
    await recovered(world, completed=2)


async def test_a_process_runs_the_events_of_a_key_in_the_order_of_their_coming(
    make_world: MakeWorld, shop: Shop
) -> None:
    """Those that wait are recorded and not claimed; each that ends wakes the next one, before their time is over."""
    world = await make_world({TYPE: shop.handle}, options=KEYED)
    running = asyncio.create_task(world.pipeline.deliver(of("cus_1")))
    await began(shop, 1)
    waiting = [of("cus_1") for _ in range(5)]
    for each in waiting:
        assert (await world.pipeline.deliver(each)).kind is Kind.DEFERRED
        assert (await world.row(each.event.id))["attempt"] == 0, "nothing was claimed"
    assert (await world.pipeline.deliver(waiting[0])).kind is Kind.DUPLICATE
    assert world.slots.free == world.slots.size - 1
    world.slots.work.clear()
    shop.gate.set()
    await running
    await asyncio.wait_for(world.slots.work.wait(), 5)
    await recovered(world, completed=6)
    assert shop.order[1:] == [each.event.id for each in waiting]
    assert shop.most == {"cus_1": 1}


async def test_an_event_without_a_key_waits_for_nobody(make_world: MakeWorld, shop: Shop) -> None:
    """Null is no key: two such events run at once, and so do two of different keys."""
    world = await make_world({TYPE: shop.handle}, options=KEYED)
    running = [asyncio.create_task(world.pipeline.deliver(of(each))) for each in (None, None, "cus_1", "cus_2")]
    await began(shop, 4)
    shop.gate.set()
    assert {(await each).kind for each in running} == {Kind.PROCESSED}
    assert shop.most[None] == 2


def _raises(event: Event) -> str | None:
    raise LookupError("no such customer")


def _exits(event: Event) -> str | None:
    raise SystemExit(3)


def _is_cancelled(event: Event) -> str | None:
    raise asyncio.CancelledError


@pytest.mark.parametrize(
    ("key", "error"),
    [
        (_raises, "LookupError"),
        (_exits, "the key's function raised SystemExit"),
        (_is_cancelled, "the key's function raised CancelledError"),
        (lambda _: 7, "the key's function gave int; expected a text of 1 to 1000 characters, or None for no key"),
        (lambda _: "", "the key's function gave a text of 0 characters; expected"),
        ("custmer", 'key="custmer": data.object of customer.subscription.updated has no such field; write a function'),
        ("items", 'key="items": data.object.items gave list; expected a text'),
    ],
)
async def test_a_key_that_cannot_be_read_is_a_failure_of_its_event(
    make_world: MakeWorld, shop: Shop, key: object, error: str
) -> None:
    """It says what was found and expected, is retried like any failure, and neither stops the process nor locks."""
    world = await make_world({TYPE: shop.handle}, options={TYPE: {"key": key}})
    given = delivery(type=TYPE, data={"object": {"customer": "cus_1", "items": []}})
    assert (await world.pipeline.deliver(given)).kind is Kind.FAILED
    row = await world.row(given.event.id)
    assert (row["status"], row["failures"]) == (Status.FAILED, 1)
    assert error in row["last_error"]
    assert shop.order == []
    assert world.slots.free == world.slots.size


async def test_what_waits_for_its_key_keeps_recovery_from_nothing_else(make_world: MakeWorld, shop: Shop) -> None:
    """Hundred due events of a key that another process has: each is tried once, and the others are dispatched."""
    world = await make_world({TYPE: shop.handle, OTHER: shop.handle}, options=KEYED)
    shop.gate.set()
    async with taken(world, "cus_1"):
        waiting = [of("cus_1") for _ in range(100)]
        for each in waiting:
            await world.ledger.record(each, due_in_seconds=-10)
        other = of("cus_9", OTHER)
        await world.ledger.record(other, due_in_seconds=0)
        await recovered(world, completed=1)
        for _ in range(40):
            await world.pipeline.recover(await world.ledger.survey())
        attempts: int = await world.database.fetchval("SELECT sum(attempt) FROM firstclaim.stripe_events")
        assert attempts <= 101 + 20, "what waits is left out of the looks; only one event of the key is tried again"
        charged = await world.database.fetchval(
            "SELECT count(*) FROM firstclaim.stripe_events WHERE failures > 0 OR abandoned > 0"
        )
        assert charged == 0
    await recovered(world, completed=101)
    assert shop.most["cus_1"] == 1
    assert await world.database.fetchval("SELECT count(*) FROM effects") == 101


async def test_a_failure_gives_the_key_to_the_next(make_world: MakeWorld) -> None:
    """An event that fails does not hold its key while it waits for its retry."""

    async def fail(event: Event, context: Context) -> str:
        raise RuntimeError("no")

    world = await make_world({TYPE: fail}, options=KEYED)
    assert (await world.pipeline.deliver(of("cus_1"))).kind is Kind.FAILED
    assert (await world.pipeline.deliver(of("cus_1"))).kind is Kind.FAILED, "not deferred: it had the key"


async def test_a_shutdown_releases_what_waits_for_its_key(make_world: MakeWorld, shop: Shop) -> None:
    """The event that runs is released like any other, and those that wait are in the ledger, for another process."""
    world = await make_world({TYPE: shop.handle}, options=KEYED)
    running = asyncio.create_task(world.pipeline.deliver(of("cus_1")))
    await began(shop, 1)
    waiting = of("cus_1")
    await world.pipeline.deliver(waiting)
    await world.pipeline.drain(0)
    assert (await running).kind is Kind.UNAVAILABLE or running.done()
    rows = await world.database.fetch("SELECT status, failures, abandoned FROM firstclaim.stripe_events")
    assert {tuple(row) for row in rows} == {("pending", 0, 0)}


# -- a turn is never lost, and is no reason to begin ------------------------------------------------------


@asynccontextmanager
async def behind(world: World, shop: Shop, *given: Delivery) -> AsyncIterator[None]:
    """These wait for the key of `cus_1` behind an event that runs while the block does; then it ends."""
    begun = len(shop.order)
    shop.gate.clear()
    running = asyncio.create_task(world.pipeline.deliver(of("cus_1")))
    await began(shop, begun + 1)
    for each in given:
        assert (await world.pipeline.deliver(each)).kind is Kind.DEFERRED
    yield
    shop.gate.set()
    assert (await running).kind is Kind.PROCESSED


async def rounds(world: World) -> None:
    """As many rounds of recovery as a few turns need."""
    for _ in range(8):
        await world.pipeline.recover(await world.ledger.survey())


async def test_what_waits_for_its_key_is_paused_like_any_other(make_world: MakeWorld, shop: Shop) -> None:
    """A pause holds it too, although its turn comes; nothing is claimed, and it runs once the pause is over."""
    world = await make_world({TYPE: shop.handle}, options=KEYED)
    waiting = [of("cus_1") for _ in range(2)]
    async with behind(world, shop, *waiting):
        world.pipeline.pause(replace(await world.ledger.survey(), paused=[TYPE]))
    for _ in range(8):
        await world.pipeline.recover(None)
    assert len(shop.order) == 1
    assert [(await world.row(each.event.id))["attempt"] for each in waiting] == [0, 0]
    world.pipeline.pause(await world.ledger.survey())
    await recovered(world, completed=3)


async def test_a_turn_is_no_reason_to_retry_before_the_backoff(make_world: MakeWorld, shop: Shop) -> None:
    """What another process has tried meanwhile, in vain, is due when that says, and the next one has the turn."""
    world = await make_world({TYPE: shop.handle}, options=KEYED)
    tried, following = of("cus_1"), of("cus_1")
    async with behind(world, shop, tried, following):
        await world.change(tried.event.id, status="failed", attempt=1, failures=1, due_at=3600.0)
    await recovered(world, completed=2)
    await rounds(world)
    assert shop.order[1:] == [following.event.id]


async def test_a_handler_at_its_limit_keeps_no_key_from_others(make_world: MakeWorld, shop: Shop) -> None:
    """Its event has the turn and may not begin for a hundred seconds: one of another handler goes first."""
    slow = {"key": "customer", "per_second": 0.01}
    world = await make_world({TYPE: shop.handle, OTHER: shop.handle}, options={**KEYED, OTHER: slow})
    shop.gate.set()
    assert (await world.pipeline.deliver(of("cus_2", OTHER))).kind is Kind.PROCESSED
    limited, following = of("cus_1", OTHER), of("cus_1")
    async with behind(world, shop, limited, following):
        pass
    await recovered(world, completed=3)
    await rounds(world)
    assert shop.order[2:] == [following.event.id]
    assert (await world.row(limited.event.id))["attempt"] == 0


async def test_a_turn_that_is_not_used_passes_on(make_world: MakeWorld, shop: Shop) -> None:
    """An event that is dead before its handler is called, or has another key by now, keeps none of its key waiting."""
    changed: set[str] = set()
    key = lambda event: None if event.id in changed else event.data["object"]["customer"]  # noqa: E731
    world = await make_world({TYPE: shop.handle}, options={TYPE: {"key": key}})
    expired, other, following = of("cus_1"), of("cus_1"), of("cus_1")
    async with behind(world, shop, expired, other, following):
        await world.database.execute(
            "DELETE FROM firstclaim.stripe_event_payloads WHERE event_id = $1", expired.event.id
        )
        changed.add(other.event.id)
    await recovered(world, completed=3)
    assert shop.order[1:] == [other.event.id, following.event.id]
    assert await world.status(expired.event.id) is Status.DEAD


async def test_a_look_that_fails_loses_no_turn(
    make_world: MakeWorld, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Postgres is away for the look that finds the next event of a key: the look after it finds it too."""
    world = await make_world({TYPE: shop.handle}, options=KEYED)
    async with behind(world, shop, of("cus_1"), of("cus_1")):
        pass
    for method in ("ready", "look"):
        survey = await world.ledger.survey()
        with monkeypatch.context() as away:
            away.setattr(Backlog, method, _unreachable)
            with pytest.raises(LedgerUnavailable):
                await world.pipeline.recover(survey)
    await recovered(world, completed=3)


async def _unreachable(*_: object, **__: object) -> list[str]:
    raise LedgerUnavailable("away")


async def test_the_page_of_an_event_says_that_it_waits_for_its_key(make_world: MakeWorld, shop: Shop) -> None:
    """As long as another event of it is being handled, and without the key's value."""
    world = await make_world({TYPE: shop.handle}, options=KEYED, **ON)
    waiting, other = of("cus_1"), of("cus_2")
    for each in (waiting, other):
        await world.ledger.record(each, due_in_seconds=3600)
    async with logged_in(world) as admin:
        said = "; an event of the same key is being handled, and it waits for that"
        async with taken(world, "cus_1"):
            page = (await admin.get(f"/admin/events/{waiting.event.id}"))[1]
            assert said in page.text
            assert "cus_1" not in page.text
            assert said not in (await admin.get(f"/admin/events/{other.event.id}"))[1].text
        await until(lambda: _free(world, "cus_1"))
        assert said not in (await admin.get(f"/admin/events/{waiting.event.id}"))[1].text


async def _free(world: World, customer: str) -> bool:
    got: bool = await world.database.fetchval(
        "SELECT pg_try_advisory_xact_lock($1)", lock_number("firstclaim", customer)
    )
    return got
