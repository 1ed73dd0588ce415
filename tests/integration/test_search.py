"""Search in the ledger on a real server: what it finds, how far back it reads, and by which index."""

import re
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from itertools import pairwise

import pytest

from firstclaim.errors import StatementTimeout
from firstclaim.operations import queries as queries_module
from firstclaim.operations import search as search_module
from firstclaim.operations.search import PINS, Cursor, LedgerSearch, Search
from firstclaim.operations.selection import Selection
from firstclaim.postgres.statement import statement
from firstclaim.status import Status
from tests.integration.world import World, delivery

EVERYTHING = Search(Selection())


@pytest.fixture
async def ledger(world: World) -> AsyncIterator[LedgerSearch]:
    """On a connection of the admin page."""
    async with world.components.admin.acquire(60) as connection:
        yield LedgerSearch(connection)


async def event(world: World, status: Status = Status.COMPLETED, *, age: float = 0, **data: object) -> str:
    """The id of a new event that was received so many seconds ago."""
    given = await world.state_of(delivery(data={"object": data}), status)
    await world.change(given.event.id, received_at=-age)
    return given.event.id


async def fill(world: World) -> None:
    """Add 20000 completed events, of which one in a thousand is dead instead: enough for the planner to use indexes."""
    await world.database.execute(
        """
        INSERT INTO firstclaim.stripe_events
               (event_id, type, livemode, created_at, status, attempt, received_at, due_at, give_up_at, settled_at)
        SELECT 'evt_x' || n, 'invoice.paid', true, now(), CASE WHEN n % 1000 = 0 THEN 'dead' ELSE 'completed' END, 1,
               now() - n * interval '1 minute', now(), now(), now()
          FROM generate_series(1, 20000) AS n
        """
    )
    await world.database.execute("ANALYZE firstclaim.stripe_events")


async def ids(ledger: LedgerSearch, search: Search, limit: int = 50, cursor: Cursor | None = None) -> list[str]:
    return [each.event_id for each in (await ledger.page(search, cursor, limit)).events]


async def test_pages_follow_each_other(world: World, ledger: LedgerSearch) -> None:
    """Each event is listed once, the newest first, also if several were received at once and more come meanwhile."""
    made = [await event(world, age=1000 - number // 3) for number in range(10)]
    await world.database.execute("UPDATE firstclaim.stripe_events SET received_at = date_trunc('second', received_at)")
    seen: list[str] = []
    cursor: Cursor | None = None
    while True:
        found = await ledger.page(EVERYTHING, cursor, 3)
        seen += [each.event_id for each in found.events]
        await event(world)  # it is newer, and shifts no page
        if (cursor := found.next_cursor) is None:
            break
    assert sorted(seen) == sorted(made)
    rows = await world.database.fetch(
        "SELECT event_id FROM firstclaim.stripe_events WHERE event_id = ANY($1) "
        "ORDER BY received_at DESC, event_id DESC",
        made,
    )
    assert seen == [row["event_id"] for row in rows]


async def test_an_object_is_found(world: World, ledger: LedgerSearch) -> None:
    """An object is found by its whole id, with or without other filters; a part of the id finds nothing."""
    mine = await event(world, id="in_mine")
    await event(world, id="in_other")
    failed = await event(world, Status.FAILED, age=9, id="in_mine")
    assert await ids(ledger, Search(Selection(), "in_mine")) == [mine, failed]
    assert await ids(ledger, Search(Selection(statuses=[Status.FAILED]), "in_mine")) == [failed]
    assert await ids(ledger, Search(Selection(), "in_min")) == []
    assert await ids(ledger, Search(Selection(), "in_%")) == []


async def test_a_customer_is_found_in_payloads(world: World, ledger: LedgerSearch) -> None:
    """A customer's id is found as the object and as a value in the payload, but not as the beginning of another id."""
    itself = await event(world, age=3, id="cus_mine")
    inside = await event(world, age=2, id="in_1", customer="cus_mine")
    deep = await event(world, age=1, id="in_2", customer=None, lines=[{"metadata": {"who": "cus_mine"}}])
    await event(world, id="in_3", customer="cus_mine2", note="cus_mine is in here")
    search = Search(Selection(), "cus_mine", customer=True)
    assert await ids(ledger, search) == [deep, inside, itself]
    await world.database.execute("DELETE FROM firstclaim.stripe_event_payloads")
    assert await ids(ledger, search) == [itself]


async def test_a_page_says_how_far_back_it_read(
    world: World, ledger: LedgerSearch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page reads a limited number of the newest events; the next page continues, until the end of the ledger."""
    monkeypatch.setattr(search_module, "PAYLOADS_MOST", 3)
    old = await event(world, age=100, customer="cus_mine")
    others = [await event(world, age=number + 1, customer="cus_other") for number in range(4)]
    search = Search(Selection(), "cus_mine", customer=True)
    first = await ledger.page(search, None, 50)
    assert first.events == []
    assert first.next_cursor is not None
    assert first.next_cursor.event_id == others[2]
    assert first.scanned_until == first.next_cursor.received_at
    second = await ledger.page(search, first.next_cursor, 50)
    assert [each.event_id for each in second.events] == [old]
    assert second.next_cursor is None
    assert second.scanned_until is None


async def test_failed_and_dead_events_are_listed_for_a_replay(world: World, ledger: LedgerSearch) -> None:
    """Only failed and dead events that match are listed, whatever the filter, and no more than the limit."""
    dead, failed = await event(world, Status.DEAD, age=1), await event(world, Status.FAILED, age=2)
    for status in (Status.COMPLETED, Status.PENDING, Status.PROCESSING, Status.IGNORED):
        await event(world, status)
    assert await ledger.replayable(EVERYTHING, 9) == [dead, failed]
    assert await ledger.replayable(EVERYTHING, 1) == [dead]
    assert await ledger.replayable(Search(Selection(statuses=[Status.FAILED, Status.COMPLETED])), 9) == [failed]
    assert await ledger.replayable(Search(Selection(statuses=[Status.COMPLETED])), 9) == []
    assert await ledger.replayable(Search(Selection(event_ids=[dead])), 9) == [dead]


async def test_events_are_counted_by_bars(world: World, ledger: LedgerSearch) -> None:
    """Every bar is counted, the empty ones too, by the events' current status; older events are left out."""
    for age, status in (
        (0.0, Status.DEAD),
        (0.0, Status.COMPLETED),
        (2 * 3600.0, Status.COMPLETED),
        (9e5, Status.DEAD),
    ):
        await event(world, status, age=age)
    within = await ledger.last(86_400)
    counts = await ledger.counts(within)
    assert counts.step == timedelta(minutes=30)
    assert len(counts.bars) in (48, 49)
    assert {later - earlier for (earlier, _), (later, _) in pairwise(counts.bars)} == {counts.step}
    assert counts.bars[0][0] <= within.since < counts.bars[1][0]
    assert counts.bars[-1][0] < within.until <= counts.bars[-1][0] + counts.step
    assert [sum(each.values()) for _, each in counts.bars[-5:]] == [1, 0, 0, 0, 2]
    assert counts.bars[-1][1] == {Status.DEAD: 1, Status.COMPLETED: 1}
    assert sum(sum(each.values()) for _, each in counts.bars) == 3


async def test_open_events_are_counted_by_indexes(world: World, ledger: LedgerSearch) -> None:
    """Unfinished and dead events, each once, without a scan of the events that are done."""
    for status in Status:
        await event(world, status)
    assert await ledger.count_open() == {each: 1 for each in Status if each not in (Status.COMPLETED, Status.IGNORED)}
    await fill(world)
    explain = replace(queries_module._COUNT_OPEN, sql=f"EXPLAIN {queries_module._COUNT_OPEN.sql}")
    plan = "\n".join(row[0] for row in await ledger.fetch(explain))
    assert {"stripe_events_due", "stripe_events_unsuccessful"} <= set(re.findall(r"stripe_events_\w+", plan)), plan
    assert "Seq Scan" not in plan


async def test_a_statement_that_takes_too_long_is_ended(ledger: LedgerSearch) -> None:
    """The server ends it after the connection's timeout, and the connection can be used for the next statement."""
    await ledger._connection.execute("SET statement_timeout = '50ms'")
    with pytest.raises(StatementTimeout):
        await ledger.fetch(statement("SELECT pg_sleep(20)"))
    assert await ledger.count_open() == {}


async def test_its_connections_are_pinned(world: World, ledger: LedgerSearch) -> None:
    """The page's connections have `PINS` beside the settings that all connections have; other pools do not."""
    pins = {**PINS, "synchronous_commit": "on"}
    assert {name: await ledger._connection.fetchval("SELECT current_setting($1)", name) for name in pins} == pins
    async with world.components.ingest.acquire(10) as connection:
        shown = await connection.fetchval("SELECT current_setting('statement_timeout')")
    assert shown != PINS["statement_timeout"]


@pytest.mark.parametrize(
    ("search", "index"),
    [
        (Search(Selection()), "stripe_events_received"),
        (Search(Selection(newer_than_seconds=60)), "stripe_events_received"),
        (Search(Selection(statuses=[Status.DEAD])), "stripe_events_unsuccessful"),
        (Search(Selection(statuses=[Status.FAILED, Status.DEAD], type="invoice.*")), "stripe_events_unsuccessful"),
        (Search(Selection(event_ids=["evt_1"])), "stripe_events_pkey"),
        (Search(Selection(), "in_1"), "stripe_events_received"),
        (Search(Selection(), "cus_1", customer=True), "stripe_events_received"),
    ],
)
async def test_no_page_reads_the_whole_ledger(
    world: World, ledger: LedgerSearch, monkeypatch: pytest.MonkeyPatch, search: Search, index: str
) -> None:
    """In a ledger large enough for indexes, each kind of list reads an index and sorts nothing."""
    for name in ("OBJECTS_MOST", "PAYLOADS_MOST"):
        monkeypatch.setattr(search_module, name, 100)
    await fill(world)
    query = search_module._PAGE if search.object_id is None else search_module._PAGE_MATCHING
    explain = replace(query, sql=f"EXPLAIN {query.sql}")
    plan = "\n".join(row[0] for row in await ledger.fetch(explain, **search.parameters(None), limit=51))
    assert index in plan, plan
    assert not re.search("Seq Scan|Hash" if index == "stripe_events_pkey" else "Seq Scan|Hash|Sort", plan), plan
