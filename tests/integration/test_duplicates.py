"""How often an event was delivered again: counted without a cost for the duplicate, written in groups."""

import asyncio
from typing import Any

import pytest

from firstclaim.inbox.duplicates import Duplicates
from firstclaim.operations.commands import Commands
from firstclaim.operations.deliveries import Deliveries
from firstclaim.postgres.connection import PinnedConnection
from firstclaim.status import Status
from tests.integration.conftest import MakeWorld
from tests.integration.world import World, delivery, effect


async def read(world: World, event_id: str) -> Deliveries:
    async with Commands.connect(world.url, 10) as operations:
        return await operations.deliveries(event_id)


async def test_duplicates_are_counted_whoever_detects_them(make_world: MakeWorld) -> None:
    """By a copy in flight in this process, by the marker, and by the ledger; with the time of the last one."""
    world = await make_world({"*": effect})
    given = delivery()
    await asyncio.gather(*(world.pipeline.deliver(given) for _ in range(3)))
    await world.pipeline.deliver(given)
    await world.redis.flushdb()
    await world.pipeline.deliver(given)
    await world.components.duplicates.write()
    found = await read(world, given.event_id)
    received_at = (await world.row(given.event_id))["received_at"]
    assert found.duplicates == 4
    assert found.last_duplicate_at is not None
    assert found.last_duplicate_at > received_at


async def test_the_counts_of_all_events_are_one_statement(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many duplicates there are, of however many events; and none, if there was no duplicate."""
    sent: list[str] = []
    fetch = PinnedConnection.fetch

    async def counting(connection: PinnedConnection, *arguments: Any, **options: Any) -> Any:
        sent.append(arguments[0])
        return await fetch(connection, *arguments, **options)

    given = [delivery() for _ in range(20)]
    for each in given:
        await world.pipeline.deliver(each)
    duplicates = Duplicates(world.ledger)
    for each in given * 50:
        duplicates.note(each.event_id)
    with monkeypatch.context() as patched:
        patched.setattr(PinnedConnection, "fetch", counting)
        await duplicates.write()
        await duplicates.write()
    assert len(sent) == 1
    assert [(await read(world, each.event_id)).duplicates for each in given] == [50] * 20


async def test_the_counts_of_several_processes_are_added(world: World) -> None:
    """The last time is the latest of them, whichever was written last."""
    given = await world.state_of(delivery(), Status.COMPLETED)
    now = 1000.0
    first, second = (Duplicates(world.ledger, lambda: now) for _ in range(2))
    first.note(given.event_id)
    now += 600
    second.note(given.event_id)
    second.note(given.event_id)
    await second.write()
    before = await read(world, given.event_id)
    await first.write()
    after = await read(world, given.event_id)
    assert (before.duplicates, after.duplicates) == (2, 3)
    assert before.last_duplicate_at == after.last_duplicate_at


async def test_a_count_is_never_too_high(world: World) -> None:
    """What a failed statement may have written is not written again; an unknown event gets no row."""
    given = await world.state_of(delivery(), Status.COMPLETED)
    duplicates = Duplicates(world.ledger)
    duplicates.note(given.event_id)
    await world.database.execute("ALTER TABLE firstclaim.stripe_event_duplicates RENAME TO away")
    await duplicates.write()
    await world.database.execute("ALTER TABLE firstclaim.away RENAME TO stripe_event_duplicates")
    duplicates.note("evt_unknown")
    await duplicates.write()
    assert await world.database.fetchval("SELECT count(*) FROM firstclaim.stripe_event_duplicates") == 0


async def test_the_headers_of_the_first_delivery_are_kept(world: World) -> None:
    """Those of the delivery that recorded the event, not of a later one."""
    given = delivery()
    given.headers = [(b"user-agent", b"Stripe/1.0"), (b"stripe-signature", b"t=17,v1=abc")]
    await world.pipeline.deliver(given)
    again = delivery(given.event_id)
    again.headers = [(b"user-agent", b"curl")]
    await world.pipeline.deliver(again)
    assert (await read(world, given.event_id)).headers == ["user-agent: Stripe/1.0", "stripe-signature: t=17"]
    assert (await read(world, (await world.state_of(delivery(), Status.DEAD)).event_id)).headers is None
