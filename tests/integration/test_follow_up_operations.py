"""What operators see and do with follow-ups: lists, the page, replay, pauses, pruning, and what does not count them."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from typer.testing import CliRunner

from firstclaim import Context, Event, TaskContext, on, task
from firstclaim.cli.commands import app
from firstclaim.operations import pauses
from firstclaim.operations import prune as prune_module
from firstclaim.operations.commands import Commands
from firstclaim.operations.prune import Retention, count_prunable, prune
from firstclaim.operations.search import LedgerSearch
from firstclaim.operations.selection import Selection
from firstclaim.registry import Handler, handlers_of
from firstclaim.status import Status
from tests.blocks import block
from tests.integration.conftest import MakeWorld
from tests.integration.test_follow_ups import Tasks, enqueues, follow_ups, named, recovered
from tests.integration.test_follow_ups import task as task_handler
from tests.integration.world import World, delivery, effect
from tests.operator import CONNECT_SECONDS, OPERATOR, replay
from tests.pages import ON, logging_as_served, site_of, visitor

TYPE = "invoice.payment_failed"
DAY = 86_400.0


@pytest.fixture
async def world(make_world: MakeWorld) -> AsyncIterator[World]:
    """Two handlers for one type, one of which enqueues a task; the page is switched on."""
    declared = [named("one", enqueues), named("two", effect), task_handler("send", Tasks().run)]
    world = await make_world(declared=declared, **ON)
    yield world
    await world.database.execute("DELETE FROM firstclaim.operator_pauses")


async def family(world: World) -> tuple[str, str, str]:
    """An event, the row of its handler `one`, and the task that this has enqueued; all are completed."""
    given = delivery()
    await world.pipeline.deliver(given)
    rows = {row["type"]: row["event_id"] for row in await follow_ups(world, given.event.id)}
    await recovered(world, *rows.values())
    [sent] = await follow_ups(world, rows["handler:one"])
    await recovered(world, sent["event_id"])
    return given.event.id, rows["handler:one"], sent["event_id"]


@pytest.mark.parametrize("payload", [False, True])
async def test_the_command_shows_the_family(world: World, payload: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`events show` names the follow-ups of a row and the row that it follows, in words and as JSON."""
    event_id, handler_id, task_id = await family(world)
    async with Commands.connect(world.url, CONNECT_SECONDS) as operations:
        assert {each.type for each in (await operations.history(event_id)).follow_ups} == {
            "handler:one",
            "handler:two",
        }
        [sent] = (await operations.history(handler_id)).follow_ups
        assert (sent.event_id, sent.parent_id, sent.type) == (task_id, handler_id, "task:send")
        timeline = await operations.timeline(sent)
        assert timeline[0].text == f"enqueued by {handler_id}"
        for pattern, count in (("task:*", 1), ("handler:*", 2), ("handler:one,task:send", 2), ("*", 4)):
            assert len(await operations.list_events(Selection(type=pattern), 9)) == count
    monkeypatch.setenv("DATABASE_URL", world.url)
    options = ["--payload"] if payload else []
    shown = await _command("events", "show", handler_id, *options)
    assert "follow-up" in shown
    assert task_id in shown
    assert "duplicates" not in shown
    found = json.loads(await _command("events", "show", task_id, "--json", *options))
    assert (found["parent_id"], found["follow_ups"]) == (handler_id, [])
    if payload:
        assert json.loads(found["payload"])["event"] == event_id


async def _command(*arguments: str) -> str:
    with logging_as_served():  # a command configures the log, for a process of its own
        done = await asyncio.to_thread(CliRunner().invoke, app, list(arguments))
    assert done.exit_code == 0, done.output
    return done.output


async def test_the_page_links_both_ways(world: World) -> None:
    """The event's page lists its follow-ups, theirs lead back; what only Stripe knows is not offered for them."""
    event_id, handler_id, task_id = await family(world)
    browser = visitor(site_of(world))
    async with browser.client:
        await browser.log_in()
        _, page = await browser.get(f"/admin/events/{event_id}")
        assert f"/admin/events/{handler_id}" in page.links
        assert "Follow-ups" in page.text
        _, page = await browser.get(f"/admin/events/{handler_id}")
        assert {f"/admin/events/{event_id}", f"/admin/events/{task_id}"} <= set(page.links)
        assert "In Stripe" not in page.text
        _, page = await browser.get(f"/admin/events/{task_id}")
        assert f"/admin/events/{handler_id}" in page.links
        assert "Deliveries" not in page.text
        _, page = await browser.get(f"/admin/events?q={task_id}")
        assert f"/admin/events/{task_id}" in page.links
        _, page = await browser.get("/admin")
        assert "handler:one" in page.text


async def test_a_dead_follow_up_is_replayed_by_itself(world: World) -> None:
    """A replay of its row runs it again, and nothing else."""
    event_id, handler_id, task_id = await family(world)
    await world.settle(task_id, Status.DEAD)
    assert await replay(world.url, [task_id]) == [task_id]
    await recovered(world, task_id)
    assert await world.effects(task_id) == 2
    assert (await world.row(event_id))["attempt"] == (await world.row(handler_id))["attempt"] == 1


async def test_a_task_and_a_handler_are_paused_by_name(world: World) -> None:
    """A paused handler's row waits and its neighbour completes; a paused task waits, too; a pause of all holds all."""
    async with Commands.connect(world.url, CONNECT_SECONDS) as operations:
        await pauses.pause(operations, OPERATOR, "handler:two")
        await pauses.pause(operations, OPERATOR, "task:*")
    await world.pipeline.start()
    given = delivery()
    await world.pipeline.deliver(given)
    rows = {row["type"]: row["event_id"] for row in await follow_ups(world, given.event.id)}
    await recovered(world, rows["handler:one"])
    [sent] = await follow_ups(world, rows["handler:one"])
    await world.pipeline.recover(await world.ledger.survey())
    assert await world.status(rows["handler:two"]) is Status.PENDING
    assert await world.status(sent["event_id"]) is Status.PENDING


async def test_a_follow_up_is_kept_as_long_as_its_event(world: World) -> None:
    """Pruned before its event, it would be written and run again by a replay of that; afterwards it goes, too."""
    event_id, handler_id, task_id = await family(world)
    for row_id in (handler_id, task_id):
        await world.change(row_id, settled_at=-100 * DAY, received_at=-101 * DAY)
    async with Commands.connect(world.url, CONNECT_SECONDS) as operations:
        assert (await count_prunable(operations, Retention(90, 90)))[1] == 0
        assert await _pruned(operations) == 0
        await world.change(event_id, settled_at=-100 * DAY, received_at=-102 * DAY)
        assert (await count_prunable(operations, Retention(90, 90)))[1] == await _pruned(operations) == 3
        assert await operations.find(task_id) is None


# What is left of a tree in which each row has enqueued the next two, by the row that is too young.
TREE = 31
LEFT = [(None, 0), (1, 31), (2, 15), (4, 7)]


@pytest.mark.parametrize("batch", [3, 100])
@pytest.mark.parametrize(("young", "left"), LEFT)
async def test_a_prune_deletes_all_generations(
    world: World, monkeypatch: pytest.MonkeyPatch, batch: int, young: int | None, left: int
) -> None:
    """One run takes each row that is old enough, with its follow-ups and theirs; what has a parent, stays."""
    monkeypatch.setattr(prune_module, "BATCH", batch)
    await plant(world, young)
    async with Commands.connect(world.url, CONNECT_SECONDS) as operations:
        assert (await count_prunable(operations, Retention(90, 90)))[1] == TREE - left
        assert await _pruned(operations) == TREE - left
        assert (await count_prunable(operations, Retention(90, 90)))[1] == 0
    assert await world.database.fetchval("SELECT count(*) FROM firstclaim.stripe_events") == left


@pytest.mark.parametrize("batch", [3, 100])
@pytest.mark.parametrize(("locked", "left"), LEFT[1:])
async def test_a_locked_row_keeps_its_follow_ups(
    world: World, monkeypatch: pytest.MonkeyPatch, batch: int, locked: int, left: int
) -> None:
    """It may be being replayed: it stays, and so does all that it has written, until the next run."""
    monkeypatch.setattr(prune_module, "BATCH", batch)
    await plant(world, None)
    async with Commands.connect(world.url, CONNECT_SECONDS) as operations:
        async with world.database.transaction():
            lock = "SELECT FROM firstclaim.stripe_events WHERE event_id = $1 FOR UPDATE"
            await world.database.execute(lock, f"evt_{locked}")
            assert await _pruned(operations) == TREE - left
        assert await _pruned(operations) == left


async def plant(world: World, young: int | None) -> None:
    """A tree of completed rows, evt_1 to evt_31, that are old enough, but for one."""
    await world.database.execute(
        """
        INSERT INTO firstclaim.stripe_events
               (event_id, type, livemode, created_at, status, attempt, received_at, due_at, give_up_at, settled_at,
                parent_id)
        SELECT 'evt_' || n, 'task:loop', true, now(), 'completed', 1, at, at, at,
               CASE n WHEN $1 THEN now() ELSE at END, CASE WHEN n > 1 THEN 'evt_' || n / 2 END
          FROM generate_series(1, 31) AS n, LATERAL (SELECT now() - interval '100 days' + n * interval '1 s') AS t (at)
        """,
        young,
    )


async def _pruned(operations: Commands) -> int:
    return sum([batch.rows async for batch in prune(operations, OPERATOR, Retention(90, 90))])


async def test_follow_ups_are_no_sign_of_deliveries(world: World) -> None:
    """They neither shorten the gap since the last event nor count among the events of the chart."""
    event_id, _, _ = await family(world)
    await world.change(event_id, received_at=-1000.0)
    async with LedgerSearch.connect(world.url, CONNECT_SECONDS) as ledger:
        assert isinstance(ledger, LedgerSearch)
        gaps = await ledger.gaps()
        assert gaps.open_seconds == pytest.approx(1000, abs=30)
        counts = await ledger.counts(await ledger.last(3600))
        assert sum(number for _, bar in counts.bars for number in bar.values()) == 1


async def test_what_no_build_has_a_task_for_is_given_up(world: World, make_world: MakeWorld) -> None:
    """A day after its time to give up, a process without the task makes the row dead, and says so."""
    given = delivery()
    await world.pipeline.deliver(given)
    rows = {row["type"]: row["event_id"] for row in await follow_ups(world, given.event.id)}
    await world.change(rows["handler:two"], give_up_at=-2 * DAY)
    other = await make_world(declared=[named("one", enqueues)])
    await other.pipeline.give_up_unwanted(await other.ledger.survey(), 10)
    row = await world.row(rows["handler:two"])
    assert (row["status"], row["last_error"]) == (
        Status.DEAD,
        "no running build has a handler for handler:two: replay it once one has",
    )
    assert await world.status(rows["handler:one"]) is Status.PENDING


# -- the pages ----------------------------------------------------------------------------------------

PAGE = "docs/how-to/several-handlers.md"


def _declared(code: str, **names: Any) -> tuple[dict[str, Any], list[Handler]]:
    """The names of a block, and what it declares."""
    defined = {"Context": Context, "Event": Event, "TaskContext": TaskContext, "on": on, "task": task, **names}
    defined["__name__"] = __name__
    before = list(globals().get("__firstclaim_handlers__", []))
    exec(code, defined)  # noqa: S102
    return defined, globals()["__firstclaim_handlers__"][len(before) :]


async def test_the_page_s_handlers_run(make_world: MakeWorld) -> None:
    """Both handlers of the page get the event, each under a key of its own."""
    noted: list[str] = []

    class Crm:
        def note_payment(self, invoice: str, *, idempotency_key: str) -> None:
            noted.append(idempotency_key)

    _, declared = _declared(block(PAGE, "several"), crm=Crm())
    world = await make_world(declared=declared)
    await world.database.execute("CREATE TABLE access (customer text)")
    given = delivery(type="invoice.paid")
    await world.pipeline.deliver(given)
    rows = {row["type"]: row["event_id"] for row in await follow_ups(world, given.event.id)}
    await recovered(world, *rows.values())
    assert noted == [rows["handler:crm"]]
    assert await world.database.fetchval("SELECT count(*) FROM access") == 1
    await world.database.execute("DROP TABLE access")


async def test_the_page_s_loop_declares_a_handler_each(make_world: MakeWorld) -> None:
    """Each target has a row, and gets the event."""
    posted: list[str] = []

    async def post(url: str, payload: Any, key: str) -> None:
        posted.append(url)

    targets = {"crm": "https://crm.example", "shop": "https://shop.example"}
    _, declared = _declared(block(PAGE, "loop"), TARGETS=targets, post=post)
    world = await make_world(declared=declared)
    given = delivery(type="invoice.paid")
    await world.pipeline.deliver(given)
    await recovered(world, *[row["event_id"] for row in await follow_ups(world, given.event.id)])
    assert sorted(posted) == sorted(targets.values())


def test_the_handlers_of_a_function_know_their_names() -> None:
    """A function that is declared under a name is found by it."""
    defined, _ = _declared(block(PAGE, "several"), crm=None)
    assert [each.name for each in handlers_of(defined["tell_crm"])] == ["crm"]
