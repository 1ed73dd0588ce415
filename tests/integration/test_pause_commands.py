"""What `firstclaim pause` and `resume` say about pauses, beside a process that obeys them."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from typer.testing import CliRunner

from firstclaim.cli.commands import app
from firstclaim.operations import pauses
from firstclaim.operations.commands import Commands
from tests.integration.conftest import MakeWorld
from tests.integration.world import World, effect
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


async def test_an_old_pause_is_resumed(world: World) -> None:
    """A name that no pause can have any more is no reason to keep it."""
    await paused(world, "handler:bad,handler:good")
    assert "0 events have waited" in await command("resume", "handler:bad,handler:good")
    assert "call the command once for each" in await command("resume", "handler:bad,handler:good", code=2)
