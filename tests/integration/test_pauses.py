"""Paused types: recorded and answered, not dispatched, not charged, not given up; and dispatched once resumed."""

from collections.abc import AsyncIterator

import pytest

from firstclaim import BatchContext, Context, Event
from firstclaim.operations import pauses
from firstclaim.operations.commands import Commands
from firstclaim.outcome import Kind
from firstclaim.shutdown import Shutdown
from firstclaim.status import Status
from tests.integration.conftest import MakeWorld
from tests.integration.world import World, delivery, effect, effects, until
from tests.operator import GIVE_UP_SECONDS, OPERATOR

SINGLE, BATCH, OTHER = "invoice.paid", "invoice.payment_failed", "charge.refunded"
DAY = 86_400.0


async def act(event: Event, context: Context) -> str:
    """One effect."""
    await effect(event, context)
    return "acted"


async def act_all(events: list[Event], context: BatchContext) -> str:
    """One effect for each."""
    await effects(events, context)
    return "acted"


@pytest.fixture
async def running(make_world: MakeWorld) -> AsyncIterator[World]:
    """A process, whose recovery runs only as the test calls it. Nothing is paused at the end."""
    world = await make_world({SINGLE: act, OTHER: act}, {BATCH: act_all})
    yield world
    await world.database.execute("DELETE FROM firstclaim.operator_pauses; DELETE FROM firstclaim.operator_actions")


async def paused(world: World, pattern: str) -> bool:
    """`firstclaim pause`; the process has learned it by then."""
    async with Commands.connect(world.url, 5) as operations:
        new = await pauses.pause(operations, OPERATOR, pattern)
    await world.pipeline.start()
    return new


async def resumed(world: World, pattern: str) -> int | None:
    """`firstclaim resume`; the process has learned it by then."""
    async with Commands.connect(world.url, 5) as operations:
        waited = await pauses.resume(operations, OPERATOR, pattern, give_up_seconds=GIVE_UP_SECONDS)
    await world.pipeline.start()
    return waited


async def recovered(world: World, event_id: str) -> None:
    """Rounds of recovery, until the event is completed."""

    async def completed() -> bool:
        await world.pipeline.recover(await world.ledger.survey())
        return await world.status(event_id) is Status.COMPLETED

    await until(completed)


@pytest.mark.parametrize("event_type", [SINGLE, BATCH])
async def test_a_paused_event_waits_and_is_dispatched_once_it_is_resumed(running: World, event_type: str) -> None:
    """It is answered 202, a duplicate 200; neither recovery nor a duplicate starts it; resumed, it completes once."""
    assert await paused(running, "invoice.*")
    given = delivery("evt_paused", event_type)
    result = await running.pipeline.deliver(given)
    assert (result.kind, result.reason) == (Kind.DEFERRED, "Recorded; dispatched when its type is no longer paused")
    assert (await running.pipeline.deliver(given)).kind is Kind.DUPLICATE
    for abandoned in (0, 1):  # the two kinds of looks
        await running.change("evt_paused", abandoned=abandoned)
        await running.pipeline.recover(await running.ledger.survey())
        await running.pipeline.recover()
    row = await running.row("evt_paused")
    assert (row["status"], row["attempt"], row["failures"]) == (Status.PENDING, 0, 0)
    assert (await running.pipeline.deliver(delivery(type=OTHER))).kind is Kind.PROCESSED
    assert await resumed(running, "invoice.*") == 1
    await recovered(running, "evt_paused")
    assert await running.effects("evt_paused") == 1


async def test_a_failed_event_waits_too(running: World) -> None:
    """A delivery that finds the row of a paused event leaves it alone, also without the marker."""
    given = await running.state_of(delivery(type=SINGLE), Status.FAILED)
    assert await paused(running, SINGLE)
    assert (await running.pipeline.deliver(given)).kind is Kind.DEFERRED
    assert await running.status(given.event.id) is Status.FAILED
    assert await running.effects(given.event.id) == 0


async def test_a_paused_event_is_not_given_up(running: World) -> None:
    """Past its time to give up it still waits; resumed, it has its whole time again, and others keep theirs."""
    long_ago = await running.state_of(delivery("evt_old", SINGLE), Status.FAILED)
    other = await running.state_of(delivery("evt_other", OTHER), Status.FAILED)
    for each in (long_ago, other):
        await running.change(each.event.id, give_up_at=-2 * DAY)
    assert await paused(running, SINGLE)
    survey = await running.ledger.survey()
    await running.pipeline.give_up_unwanted(survey, 10)
    assert await running.status("evt_old") is Status.FAILED
    assert await resumed(running, SINGLE) == 1
    assert (await running.row("evt_old"))["give_up_in"] == pytest.approx(GIVE_UP_SECONDS, abs=60)
    assert (await running.row("evt_other"))["give_up_in"] < 0


async def test_pauses_are_listed_and_audited(running: World) -> None:
    """A pause has its operator and its time; pausing or resuming twice changes nothing; the audit has each change."""
    assert await paused(running, SINGLE)
    assert not await paused(running, SINGLE)
    assert await paused(running, "*")
    async with Commands.connect(running.url, 5) as operations:
        assert [(each.pattern, each.operator) for each in await pauses.paused(operations)] == [
            (SINGLE, OPERATOR),
            ("*", OPERATOR),
        ]
    assert running.components.pauses.patterns == {SINGLE, "*"}
    assert await resumed(running, "invoice.*") is None
    assert await resumed(running, "*") == 0
    assert running.components.pauses.patterns == {SINGLE}
    rows = await running.database.fetch(
        "SELECT action, selection, changed FROM firstclaim.operator_actions ORDER BY at"
    )
    assert [tuple(row) for row in rows] == [
        ("pause", SINGLE, 1),
        ("pause", SINGLE, 0),
        ("pause", "*", 1),
        ("resume", "*", 0),
    ]


async def test_a_process_knows_the_pauses_before_its_first_delivery(running: World) -> None:
    """A process that starts reads them first: its first delivery of a paused type is not dispatched."""
    async with Commands.connect(running.url, 5) as operations:
        await pauses.pause(operations, OPERATOR, SINGLE)
    async with running.components.running(Shutdown(0, 5)):
        assert (await running.pipeline.deliver(delivery(type=SINGLE))).kind is Kind.DEFERRED


async def test_a_round_of_recovery_learns_of_a_pause(running: World) -> None:
    """The statement that a round makes anyway has the pauses too."""
    async with Commands.connect(running.url, 5) as operations:
        await pauses.pause(operations, OPERATOR, SINGLE)
    await running.components.recovery._round()
    assert running.components.pauses.cover(SINGLE)


async def test_the_end_of_a_pause_is_about_its_own_events_alone(running: World) -> None:
    """A comma separates nothing in the pattern of a pause. (`handler:bad,handler:good` was accepted as one.)"""
    await running.state_of(delivery("evt_never_paused", SINGLE), Status.FAILED)
    await running.change("evt_never_paused", give_up_at=DAY)
    assert await paused(running, f"{OTHER},{SINGLE}")
    assert (await running.pipeline.deliver(delivery(type=SINGLE))).kind is Kind.PROCESSED
    assert await resumed(running, f"{OTHER},{SINGLE}") == 0
    assert (await running.row("evt_never_paused"))["give_up_in"] == pytest.approx(DAY, abs=60)
