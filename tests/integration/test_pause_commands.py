"""What `firstclaim pause`, `resume` and `events replay` say about pauses, beside a process that obeys them."""

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest
from typer.testing import CliRunner

from firstclaim.cli.commands import app
from firstclaim.operations import pauses
from firstclaim.operations.commands import Commands
from firstclaim.status import Status
from tests.integration.conftest import MakeWorld
from tests.integration.world import World, delivery, effect, until
from tests.operator import CONNECT_SECONDS, OPERATOR
from tests.pages import logging_as_served

PAID, REFUNDED = "invoice.paid", "charge.refunded"


@pytest.fixture
async def world(make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    """A database that the commands use, too. Nothing is paused at the end."""
    world = await make_world({PAID: effect, REFUNDED: effect}, {})
    monkeypatch.setenv("DATABASE_URL", world.url)
    monkeypatch.setenv("COLUMNS", "200")  # an error is wrapped in a box
    yield world
    await world.database.execute("DELETE FROM firstclaim.operator_pauses; DELETE FROM firstclaim.operator_actions")


async def paused(world: World, *patterns: str) -> None:
    """Each is paused."""
    async with Commands.connect(world.url, CONNECT_SECONDS) as operations:
        for pattern in patterns:
            await pauses.pause(operations, OPERATOR, pattern)


async def command(*arguments: str, code: int = 0) -> str:
    """What the command writes; it ends by itself, with this exit code."""
    with logging_as_served():  # a command configures the log, for a process of its own
        async with asyncio.timeout(30):
            done = await asyncio.to_thread(CliRunner().invoke, app, list(arguments))
    assert done.exit_code == code, done.output
    return done.output


async def test_types_that_another_pause_covers(world: World) -> None:
    """They have no pause of their own, and are paused: `resume` names each pause that covers them."""
    await paused(world, "handler:*", "*")
    said = await command("resume", "handler:bad", code=1)
    assert "handler:bad has no pause of its own, and is paused by handler:* and *" in said
    assert "to end that, firstclaim resume 'handler:*' and firstclaim resume '*'" in said
    assert "is still paused by *: to end that, firstclaim resume '*'" in await command("resume", "handler:*")
    await command("resume", "*")
    assert "handler:bad is not paused" in await command("resume", "handler:bad", code=1)


async def test_narrower_pauses_that_are_left(world: World) -> None:
    """What else holds events of the resumed types is named, with the command that ends it."""
    await paused(world, "invoice.*", "invoice.paid", "charge.refunded")
    left = "some of its types are still paused by invoice.paid: to end that, firstclaim resume invoice.paid"
    assert left in await command("resume", "invoice.*")
    said = await command("resume", "invoice.*", code=1)
    assert "invoice.* has no pause of its own; some of its types are paused by invoice.paid" in said


async def test_an_old_pause_is_resumed(world: World) -> None:
    """A name that no pause can have any more is no reason to keep it."""
    await paused(world, "handler:bad,handler:good")
    assert "0 events have waited" in await command("resume", "handler:bad,handler:good")
    assert "call the command once for each" in await command("resume", "handler:bad,handler:good", code=2)


@pytest.mark.parametrize(
    ("types", "hints"),
    [
        ("charge.succeded", ["matches charge.succeded (did you mean charge.succeeded?)"]),
        ("good", ["matches good", "a handler is paused as handler:good, a task as task:good"]),
        ("invoice.*", []),
        ("*", []),
        ("task:nope", []),
        ("handler:nope", []),
    ],
)
async def test_a_pause_of_an_unknown_type(world: World, types: str, hints: list[str]) -> None:
    """It is made, because Stripe may have newer types, and a note says that none of stripe-python's matches."""
    said = await command("pause", types)
    assert f"paused {types}; 0 events are being handled right now" in said
    assert ("note: no event type of stripe-python" in said) is bool(hints)
    for hint in hints:
        assert hint in said


async def test_the_list_of_pauses_has_columns(world: World) -> None:
    """A long pattern moves the second column of all lines, not of its own alone."""
    await paused(world, PAID, "handler:shop.handlers.invoices.send_receipt")
    lines = (await command("pauses")).splitlines()
    assert [line.split()[0] for line in lines] == [PAID, "handler:shop.handlers.invoices.send_receipt"]
    assert len({line.index(f" by {OPERATOR}") for line in lines}) == 1


async def test_a_type_for_an_id(world: World) -> None:
    """What was given a type as an id names the option for types; an id that is unknown is only that."""
    for event_type in ("handler:bad", "invoice.*"):
        assert f"--type {event_type} of `events list`" in await command("events", "show", event_type, code=1)
        assert f"; --type {event_type} selects by type" in await command("events", "replay", event_type, code=1)
    for subcommand in ("show", "replay"):
        assert "--type" not in await command("events", subcommand, "evt_unknown", code=1)


@pytest.mark.parametrize("wait", [[], ["--wait"]])
async def test_a_replay_of_what_is_paused(world: World, wait: list[str]) -> None:
    """It says what waits, for which pause, and how to end that; with --wait it ends, and not all were completed."""
    for event_id, event_type in (("evt_held", PAID), ("evt_done", REFUNDED)):
        await world.state_of(delivery(event_id, event_type), Status.DEAD)
    await paused(world, "invoice.*", "task:*")
    dry = await command("events", "replay", "--status", "dead", "--type", f"{PAID},{REFUNDED}", "--dry-run")
    held = f"1 event will wait, because its type is paused: invoice.*, by {OPERATOR}, now"
    assert held in dry
    assert "task:*" not in dry
    said = await command("events", "replay", "evt_held", "--count", "1", *wait, code=1 if wait else 0)
    assert held in said
    assert f"1 event waits, because its type is paused: invoice.*, by {OPERATOR}" in said
    assert "To end that: firstclaim resume 'invoice.*'" in said
    assert "due now" not in said
    assert ("1 pending" in said.splitlines()) is bool(wait)


async def test_a_replay_beside_what_is_paused(world: World) -> None:
    """What no pause holds is due, and only that."""
    for event_id, event_type in (("evt_held", PAID), ("evt_due", REFUNDED)):
        await world.state_of(delivery(event_id, event_type), Status.DEAD)
    await paused(world, PAID)
    said = await command("events", "replay", "evt_held", "evt_due", "--count", "2")
    assert "1 event is due now" in said
    assert "1 event waits" in said


async def test_a_replay_waits_for_what_is_handled(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A claimed event goes on in a pause: --wait waits for it, and ends when it has ended."""
    for event_id, event_type in (("evt_held", PAID), ("evt_runs", REFUNDED)):
        await world.state_of(delivery(event_id, event_type), Status.DEAD)
    await paused(world, PAID)
    looks: list[int] = []
    look = pauses.paused_pending

    async def counted(operations: Commands, event_ids: Sequence[str]) -> pauses.Paused:
        held = await look(operations, event_ids)
        looks.append(held.events)
        return held

    monkeypatch.setattr(pauses, "paused_pending", counted)
    waiting = asyncio.create_task(command("events", "replay", "evt_held", "evt_runs", "--count", "2", "--wait", code=1))

    async def looked() -> bool:
        return len(looks) > 0

    async def looked_again() -> bool:
        return len(looks) > 2

    await until(looked)
    await world.settle("evt_runs", Status.PROCESSING)
    looks.clear()
    await until(looked_again)
    assert not waiting.done()
    await world.settle("evt_runs", Status.COMPLETED)
    said = await waiting
    assert "1 event waits" in said
