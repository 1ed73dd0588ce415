"""Looking through the ledger on a real server: what is found, how far was looked, and by which index."""

import re
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from itertools import pairwise

import pytest

from firstclaim.errors import StatementTimeout
from firstclaim.inbox.statements import statement
from firstclaim.operations import queries as queries_module
from firstclaim.operations import search as browsing_module
from firstclaim.operations.queries import Selection
from firstclaim.operations.search import PINS, LedgerSearch, Place, Search
from firstclaim.status import Status
from tests.integration.world import World, delivery

FAR = Search(Selection())


@pytest.fixture
async def browsing(world: World) -> AsyncIterator[LedgerSearch]:
    """As the page asks."""
    async with world.components.admin.borrow(60) as connection:
        yield LedgerSearch(connection)


async def event(world: World, status: Status = Status.COMPLETED, *, age: float = 0, **data: object) -> str:
    """The id of an event that came so many seconds ago."""
    given = await world.state_of(delivery(data={"object": data}), status)
    await world.change(given.event.id, received_at=-age)
    return given.event.id


async def fill(world: World) -> None:
    """Add 20000 completed events, of which one in a thousand is dead instead: enough for the planner to use indexes."""
    await world.database.execute(
        """
        INSERT INTO stripe_events (event_id, type, livemode, created_at, status, attempt, received_at, due_at,
                                   give_up_at, settled_at)
        SELECT 'evt_x' || n, 'invoice.paid', true, now(), CASE WHEN n % 1000 = 0 THEN 'dead' ELSE 'completed' END, 1,
               now() - n * interval '1 minute', now(), now(), now()
          FROM generate_series(1, 20000) AS n
        """
    )
    await world.database.execute("ANALYZE stripe_events")


async def ids(browsing: LedgerSearch, search: Search, most: int = 50, place: Place | None = None) -> list[str]:
    return [each.event_id for each in (await browsing.page(search, place, most)).events]


async def test_pages_follow_each_other(world: World, browsing: LedgerSearch) -> None:
    """Each event once, the newest first, also where several came in the same instant and more come meanwhile."""
    made = [await event(world, age=1000 - number // 3) for number in range(10)]
    await world.database.execute("UPDATE stripe_events SET received_at = date_trunc('second', received_at)")
    seen: list[str] = []
    place: Place | None = None
    while True:
        found = await browsing.page(FAR, place, 3)
        seen += [each.event_id for each in found.events]
        await event(world)  # it came later, and moves nothing
        if (place := found.more) is None:
            break
    assert sorted(seen) == sorted(made)
    rows = await world.database.fetch(
        "SELECT event_id FROM stripe_events WHERE event_id = ANY($1) ORDER BY received_at DESC, event_id DESC", made
    )
    assert seen == [row["event_id"] for row in rows]


async def test_an_object_is_found(world: World, browsing: LedgerSearch) -> None:
    """By its whole id, beside other filters; a part of it finds nothing."""
    mine = await event(world, id="in_mine")
    await event(world, id="in_other")
    failed = await event(world, Status.FAILED, age=9, id="in_mine")
    assert await ids(browsing, Search(Selection(), "in_mine")) == [mine, failed]
    assert await ids(browsing, Search(Selection(statuses=[Status.FAILED]), "in_mine")) == [failed]
    assert await ids(browsing, Search(Selection(), "in_min")) == []
    assert await ids(browsing, Search(Selection(), "in_%")) == []


async def test_a_customer_is_found_in_payloads(world: World, browsing: LedgerSearch) -> None:
    """As the object itself and as a value anywhere; not as the beginning of another's id, nor without a payload."""
    itself = await event(world, age=3, id="cus_mine")
    inside = await event(world, age=2, id="in_1", customer="cus_mine")
    deep = await event(world, age=1, id="in_2", customer=None, lines=[{"metadata": {"who": "cus_mine"}}])
    await event(world, id="in_3", customer="cus_mine2", note="cus_mine is in here")
    search = Search(Selection(), "cus_mine", customer=True)
    assert await ids(browsing, search) == [deep, inside, itself]
    await world.database.execute("DELETE FROM stripe_event_payloads")
    assert await ids(browsing, search) == [itself]


async def test_it_is_told_how_far_was_looked(
    world: World, browsing: LedgerSearch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among so many of the newest; the next page looks among so many more, until the ledger's end."""
    monkeypatch.setattr(browsing_module, "PAYLOADS_MOST", 3)
    old = await event(world, age=100, customer="cus_mine")
    others = [await event(world, age=number + 1, customer="cus_other") for number in range(4)]
    search = Search(Selection(), "cus_mine", customer=True)
    first = await browsing.page(search, None, 50)
    assert first.events == []
    assert first.more is not None
    assert first.more.event_id == others[2]
    assert first.looked_until == first.more.received_at
    second = await browsing.page(search, first.more, 50)
    assert [each.event_id for each in second.events] == [old]
    assert second.more is None
    assert second.looked_until is None


async def test_what_can_be_replayed_is_named(world: World, browsing: LedgerSearch) -> None:
    """Failed and dead ones that match, and no others, whatever was asked for; no more than are wanted."""
    dead, failed = await event(world, Status.DEAD, age=1), await event(world, Status.FAILED, age=2)
    for status in (Status.COMPLETED, Status.PENDING, Status.PROCESSING, Status.IGNORED):
        await event(world, status)
    assert await browsing.replayable(FAR, 9) == [dead, failed]
    assert await browsing.replayable(FAR, 1) == [dead]
    assert await browsing.replayable(Search(Selection(statuses=[Status.FAILED, Status.COMPLETED])), 9) == [failed]
    assert await browsing.replayable(Search(Selection(statuses=[Status.COMPLETED])), 9) == []
    assert await browsing.replayable(Search(Selection(event_ids=[dead])), 9) == [dead]


async def test_arrivals_by_the_hour(world: World, browsing: LedgerSearch) -> None:
    """So many hours, the empty ones too, by what the events are now; what is older is not there."""
    for age, status in (
        (0.0, Status.DEAD),
        (0.0, Status.COMPLETED),
        (2 * 3600.0, Status.COMPLETED),
        (9e5, Status.DEAD),
    ):
        await event(world, status, age=age)
    hours = (await browsing.hourly_counts(24)).hours
    assert len(hours) == 24
    assert {later - earlier for (earlier, _), (later, _) in pairwise(hours)} == {timedelta(hours=1)}
    assert [sum(counts.values()) for _, counts in hours[-3:]] == [1, 0, 2]
    assert hours[-1][1] == {Status.DEAD: 1, Status.COMPLETED: 1}
    assert sum(sum(counts.values()) for _, counts in hours) == 3


async def test_open_events_are_counted_by_indexes(world: World, browsing: LedgerSearch) -> None:
    """Unfinished and dead events, each once, without a scan of the events that are done."""
    for status in Status:
        await event(world, status)
    assert await browsing.count_open() == {each: 1 for each in Status if each not in (Status.COMPLETED, Status.IGNORED)}
    await fill(world)
    explain = replace(queries_module._COUNT_OPEN, sql=f"EXPLAIN {queries_module._COUNT_OPEN.sql}")
    plan = "\n".join(row[0] for row in await browsing._fetch(explain))
    assert {"stripe_events_due", "stripe_events_unsuccessful"} <= set(re.findall(r"stripe_events_\w+", plan)), plan
    assert "Seq Scan" not in plan


async def test_a_question_that_takes_too_long_is_ended(browsing: LedgerSearch) -> None:
    """By the server, after the time that its connection allows; the connection is good for the next one."""
    await browsing._connection.execute("SET statement_timeout = '50ms'")
    with pytest.raises(StatementTimeout):
        await browsing._fetch(statement("SELECT pg_sleep(20)"))
    assert await browsing.count_open() == {}


async def test_its_connections_are_pinned(world: World, browsing: LedgerSearch) -> None:
    """Those of the page and no others; what every connection of ours has they have too."""
    pins = {**PINS, "synchronous_commit": "on"}
    assert {name: await browsing._connection.fetchval("SELECT current_setting($1)", name) for name in pins} == pins
    async with world.components.ingest.borrow(10) as connection:
        assert await connection.fetchval("SELECT current_setting('statement_timeout')") == "0"


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
    world: World, browsing: LedgerSearch, monkeypatch: pytest.MonkeyPatch, search: Search, index: str
) -> None:
    """Each kind of list begins at an index, of a ledger that is large enough for one, and sorts nothing."""
    for name in ("OBJECTS_MOST", "PAYLOADS_MOST"):
        monkeypatch.setattr(browsing_module, name, 100)
    await fill(world)
    query = browsing_module._PAGE if search.object_id is None else browsing_module._PAGE_LOOKED_FOR
    explain = replace(query, sql=f"EXPLAIN {query.sql}")
    found = "\n".join(row[0] for row in await browsing._fetch(explain, **search.values(None), most=51))
    assert index in found, found
    assert not re.search("Seq Scan|Hash" if index == "stripe_events_pkey" else "Seq Scan|Hash|Sort", found), found
