"""Tasks with a key and with limits of their own: as handlers have them."""

import asyncio
from typing import Any

import pytest

from firstclaim import Context, Event, TaskContext
from firstclaim.event import Delivery
from firstclaim.handler_options import TaskOptions, checked
from firstclaim.registry import Handler
from firstclaim.status import Status
from tests.integration.conftest import MakeWorld
from tests.integration.test_follow_ups import follow_ups, recovered
from tests.integration.test_limits import statuses
from tests.integration.world import World, delivery, until
from tests.pages import ON, logged_in

TYPE = "invoice.payment_failed"


class Work:
    """A task that counts how many of it run at once, by payload, and waits while `gate` is closed."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.running: list[Any] = []
        self.most = 0
        self.doubled = False

    async def run(self, context: TaskContext) -> None:
        self.doubled = self.doubled or context.payload in self.running
        self.running.append(context.payload)
        self.most = max(self.most, len(self.running))
        try:
            await self.gate.wait()
        finally:
            self.running.remove(context.payload)

    async def is_full(self) -> bool:
        return len(self.running) == 2


def with_options(function: Any, options: TaskOptions) -> list[Handler]:
    return [Handler("task:send", function, exclusive=True, options=checked(options, of="@task"))]


def enqueueing(*payloads: Any) -> Any:
    async def handler(event: Event, context: Context) -> None:
        for payload in payloads:
            context.enqueue("send", payload)

    return handler


async def delivered(world: World) -> Delivery:
    given = delivery()
    await world.pipeline.deliver(given)
    return given


async def in_rounds(world: World, **wanted: int) -> None:
    """Rounds of recovery, until so many rows have each status."""

    async def done() -> bool:
        await world.pipeline.recover(await world.ledger.survey())
        return await statuses(world) == wanted

    await until(done)


async def test_no_more_of_a_task_run_than_its_slots(make_world: MakeWorld) -> None:
    """The others wait unclaimed, uncharged, and all are completed at last."""
    work = Work()
    world = await make_world({TYPE: enqueueing(*range(6))}, declared=with_options(work.run, {"slots": 2}))
    await delivered(world)
    await in_rounds(world, completed=1, processing=2, pending=4)
    for _ in range(3):
        await world.pipeline.recover(await world.ledger.survey())
    assert await statuses(world) == {"completed": 1, "processing": 2, "pending": 4}
    await until(work.is_full)
    work.gate.set()
    await in_rounds(world, completed=7)
    assert work.most == 2
    assert await world.database.fetchval("SELECT sum(failures + abandoned) FROM firstclaim.stripe_events") == 0


async def test_it_begins_as_soon_as_it_is_committed(make_world: MakeWorld) -> None:
    """The round that the COMMIT wakes finds it, without a survey of what waits."""
    work = Work()
    work.gate.set()
    world = await make_world({TYPE: enqueueing(1)}, declared=with_options(work.run, {"slots": 2}))
    await world.pipeline.recover(await world.ledger.survey())
    await delivered(world)
    assert world.slots.work.is_set()
    await world.pipeline.recover()

    async def done() -> bool:
        return await statuses(world) == {"completed": 2}

    await until(done)


@pytest.mark.parametrize("key", ["shop.id", lambda payload: payload["shop"]["id"]], ids=["path", "function"])
async def test_one_at_a_time_per_key_of_the_payload(make_world: MakeWorld, key: Any) -> None:
    """Of two payloads with one key, one runs; in two processes together. The page of the other says why it waits."""
    work = Work()
    payloads = [{"shop": {"id": each}} for each in ("a", "a", "b", "a")]
    first, second = [
        await make_world({TYPE: enqueueing(*payloads)}, declared=with_options(work.run, {"key": key}), **ON)
        for _ in range(2)
    ]
    given = await delivered(first)
    for world in (first, second):
        await world.pipeline.recover(await world.ledger.survey())
    await until(work.is_full)
    waiting = [row for row in await follow_ups(first, given.event.id) if row["status"] == "pending"]
    async with logged_in(first) as admin:
        assert "same key" in (await admin.get(f"/admin/events/{waiting[0]['event_id']}"))[1].text
    work.gate.set()
    await in_rounds(first, completed=5)
    assert not work.doubled


async def test_a_task_has_its_own_deadline_backoff_and_time_to_give_up(make_world: MakeWorld) -> None:
    """It ends at its deadline, is due again by its backoff, and is dead after its time, which begins when it is due."""
    work = Work()
    options: TaskOptions = {"deadline": 0.5, "backoff": (1000, 1000), "give_up": 5000}
    world = await make_world({TYPE: enqueueing(1)}, declared=with_options(work.run, options))
    given = await delivered(world)
    [row] = await follow_ups(world, given.event.id)
    await recovered(world, row["event_id"], status=Status.FAILED)
    [row] = await follow_ups(world, given.event.id)
    assert "its deadline of 0.5 s" in row["last_error"]
    assert 400 < row["due_in"] <= 1000
    assert 3900 < row["give_up_after"] + row["due_in"] <= 5000
    await world.change(row["event_id"], due_at=-1.0, give_up_at=-1.0)
    await recovered(world, row["event_id"], status=Status.DEAD)


async def test_a_key_that_cannot_be_read_fails_the_task(make_world: MakeWorld) -> None:
    """The follow-up is retried like any that fails, and says what was expected."""
    world = await make_world({TYPE: enqueueing({})}, declared=with_options(Work().run, {"key": "customer"}))
    given = await delivered(world)
    [row] = await follow_ups(world, given.event.id)
    await recovered(world, row["event_id"], status=Status.FAILED)
    assert "payload of task:send has no such field" in (await world.row(row["event_id"]))["last_error"]
