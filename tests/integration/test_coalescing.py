"""Deliveries that share a round trip, on real stores: one winner per new id, and nobody pays for another's trouble."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest

from firstclaim import Context, Event
from firstclaim.errors import LedgerUnavailable
from firstclaim.event import Delivery
from firstclaim.inbox.claim import Claim
from firstclaim.inbox.existing_row import ExistingRow
from firstclaim.inbox.ledger import Ledger
from firstclaim.outcome import Kind
from firstclaim.postgres.connection import PinnedConnection
from firstclaim.status import Status
from tests.integration.conftest import MakeWorld
from tests.integration.world import World, delivery, effect, until


@pytest.fixture
async def other(world: World) -> AsyncIterator[asyncpg.Connection]:
    """Another process's connection, in a transaction; it waits for nobody."""
    connection = await asyncpg.connect(world.url)
    await connection.execute("BEGIN; SET LOCAL lock_timeout = '1ms'")
    yield connection
    await connection.close()


# -- in the ledger ------------------------------------------------------------------------------------


async def test_each_new_id_of_a_batch_has_one_winner(world: World) -> None:
    """Ten copies each of ten events, given together: one claim each, the others find it, and nobody records over it."""
    given = [delivery() for _ in range(10)]
    won = await asyncio.gather(*(world.ledger.claim(each) for _ in range(10) for each in given))
    claims = [each for each in won if isinstance(each, Claim)]
    assert sorted(claim.event_id for claim in claims) == sorted(each.event.id for each in given)
    assert {claim.event_id: claim.body for claim in claims} == {each.event.id: each.body for each in given}
    assert {each.status for each in won if isinstance(each, ExistingRow)} == {Status.PROCESSING}


async def test_who_may_dispatch_goes_before_who_only_records(world: World) -> None:
    """Together in a batch, in any order: the claim wins, so that nobody has to take the row over."""
    given = delivery()
    found, won = await asyncio.gather(world.ledger.record(given, due_in_seconds=0), world.ledger.claim(given))
    assert isinstance(won, Claim)
    assert found == ExistingRow(Status.PROCESSING, 1, won.epoch)


async def test_a_server_that_does_not_answer_costs_one_timeout(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those who gathered behind inserts that time out are told at the same time: none waits for a further one."""
    world = await make_world(postgres_timeout_seconds=0.5)
    asked = 0
    fetch = PinnedConnection.fetch

    async def counting(connection: PinnedConnection, *arguments: Any, **options: Any) -> Any:
        nonlocal asked
        asked += "INSERT INTO firstclaim.stripe_events" in arguments[0]
        return await fetch(connection, *arguments, **options)

    async with world.database.transaction():
        await world.database.execute("LOCK TABLE firstclaim.stripe_events")
        monkeypatch.setattr(PinnedConnection, "fetch", counting)
        first = asyncio.create_task(world.ledger.claim(delivery()))
        await asyncio.sleep(0)
        second = asyncio.create_task(world.ledger.claim(delivery()))  # goes past the first, which is late soon

        async def all_under_way() -> bool:
            return asked == 2

        await until(all_under_way)
        others = (world.ledger.claim(delivery()) for _ in range(5))
        refused = await asyncio.gather(first, second, *others, return_exceptions=True)
    assert [type(each) for each in refused] == [LedgerUnavailable] * 7
    assert asked == 2


async def test_one_bad_row_fails_alone(world: World) -> None:
    """What Postgres will not take of one delivery is no reason to refuse the others of its batch."""
    await world.database.execute(
        "ALTER TABLE firstclaim.stripe_event_payloads ADD CONSTRAINT few CHECK (octet_length(body) < 9000)"
    )
    try:
        good = [delivery() for _ in range(10)]
        bad = Delivery(delivery().event, b" " * 9000)
        *won, refused = await asyncio.gather(
            *(world.ledger.claim(each) for each in (*good, bad)), return_exceptions=True
        )
    finally:
        await world.database.execute("ALTER TABLE firstclaim.stripe_event_payloads DROP CONSTRAINT few")
    assert [won.event_id if isinstance(won, Claim) else won for won in won] == [each.event.id for each in good]
    assert isinstance(refused, LedgerUnavailable)
    assert await world.ledger.find(bad.event.id) is None


async def test_a_batch_is_in_the_order_of_its_ids(world: World, other: asyncpg.Connection) -> None:
    """Two that insert the same ids in opposite order would wait for each other: all go from the first to the last."""
    await other.execute(INSERT, "evt_a")
    given = [delivery("evt_z"), delivery("evt_a")]
    inserting = asyncio.gather(*(world.ledger.claim(each) for each in given))
    await until(lambda: somebody_waits(world))
    await other.execute(INSERT, "evt_z")  # were it inserted already, this would wait for us, as we do for it
    await other.execute("COMMIT")
    assert {type(each) for each in await inserting} == {ExistingRow}


INSERT = """
INSERT INTO firstclaim.stripe_events
       (event_id, type, livemode, created_at, status, attempt, received_at, due_at, give_up_at)
VALUES ($1, 't', false, now(), 'pending', 0, now(), now(), now())
"""


async def somebody_waits(world: World) -> bool:
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    return bool(await world.database.fetchval(waiting))


async def test_a_row_that_is_waited_for_holds_up_no_mates(make_world: MakeWorld) -> None:
    """Its id is being inserted by a transaction that does not end: it fails in time, and the others are claimed."""
    world = await make_world(postgres_timeout_seconds=3)
    stranger = await asyncpg.connect(world.url)
    try:
        await stranger.execute("BEGIN")
        await stranger.execute(INSERT, "evt_0")
        given = [delivery(f"evt_{number}") for number in range(5)]
        refused, *won = await asyncio.gather(*(world.ledger.claim(each) for each in given), return_exceptions=True)
    finally:
        await stranger.close()
    assert isinstance(refused, LedgerUnavailable)
    assert {type(each) for each in won} == {Claim}


# -- copies in one process ----------------------------------------------------------------------------


async def handles(event: Event, context: Context) -> None:
    await effect(event, context)


async def test_a_copy_is_promised_nothing_before_the_first_is_recorded(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the first one's insert is under way, a copy waits for it, for its own budget, and then it is a 503."""
    world = await make_world({"*": handles}, answer_budget_seconds=0.5)
    inserting, go_on = asyncio.Event(), asyncio.Event()
    claim = Ledger.claim

    async def slow(ledger: Ledger, given: Delivery) -> Claim | ExistingRow:
        inserting.set()
        await go_on.wait()
        return await claim(ledger, given)

    monkeypatch.setattr(Ledger, "claim", slow)
    given = delivery()
    first = asyncio.create_task(world.pipeline.deliver(given))
    await inserting.wait()
    copies = [asyncio.create_task(world.pipeline.deliver(given)) for _ in range(3)]
    assert {(await copy).kind for copy in copies} == {Kind.UNAVAILABLE}
    go_on.set()
    await first


async def test_a_copy_of_what_could_not_be_recorded_is_told_so(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one's insert fails under the eyes of its copies: none of them is promised anything either."""
    world = await make_world({"*": handles})
    inserting, go_on = asyncio.Event(), asyncio.Event()

    async def lost(*_: object, **__: object) -> None:
        inserting.set()
        await go_on.wait()
        raise LedgerUnavailable("lost")

    given = delivery()
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "claim", lost)
        first = asyncio.create_task(world.pipeline.deliver(given))
        await inserting.wait()
        copies = [asyncio.create_task(world.pipeline.deliver(given)) for _ in range(3)]
        await asyncio.sleep(0)  # they have begun
        go_on.set()
        assert {(await each).kind for each in (first, *copies)} == {Kind.UNAVAILABLE}
    assert (await world.pipeline.deliver(given)).kind is Kind.PROCESSED
