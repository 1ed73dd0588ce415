"""Groups of failures on a real server: what is counted, which events they select, and what older builds leave."""

import re
from collections.abc import AsyncIterator

import pytest

from firstclaim import Context, Event, Permanent, Retry
from firstclaim.operations.commands import Commands
from firstclaim.operations.failure_groups import GROUPS, FailureGroup, Ungrouped
from firstclaim.operations.prune import Pruned, Retention, count_prunable, prune
from firstclaim.operations.search import LedgerSearch
from firstclaim.operations.selection import Selection
from firstclaim.status import Status
from tests.integration.test_commands import audit, replayed
from tests.integration.world import Function, World, delivery, effect, explained
from tests.operator import OPERATOR


@pytest.fixture
async def operations(world: World, module_database: str) -> AsyncIterator[Commands]:
    """On a connection of its own."""
    async with Commands.connect(module_database, 5) as operations:
        yield operations


async def declines(event: Event, context: Context) -> None:
    raise ValueError(f"no card of {event.id}")


async def refuses(event: Event, context: Context) -> None:
    if event.type == "invoice.paid":
        raise Permanent(f"never {event.id}")
    raise Permanent(f"not {event.id}")


async def waits(event: Event, context: Context) -> None:
    raise Retry("later")


async def fail(world: World, function: Function, type: str = "invoice.payment_failed") -> str:  # noqa: A002
    """The id of a new event whose first attempt ends with `function`."""
    claim = await world.claim(delivery(type=type))
    await world.dispatch(function, claim)
    return claim.event_id


async def again(world: World, event_id: str, function: Function) -> None:
    """A further attempt at the event."""
    [claim] = await world.ledger.take_over([event_id])
    await world.dispatch(function, claim)


async def group_of(operations: Commands, function: Function) -> FailureGroup:
    """The only group of that handler."""
    name = f"{function.__module__}.{function.__qualname__}"
    [found] = [each for each in await operations.failure_groups(10) if each.handler == name]
    return found


async def ids(operations: Commands, group: str) -> set[str]:
    """The events that a selection of that group finds."""
    return {each.event_id for each in await operations.list_events(Selection(group=group), 100)}


async def test_a_retry_that_was_asked_for_counts_as_that(world: World) -> None:
    """An event whose handler asked for a retry counts as that, unless it is dead; its timeline says so."""
    asked, failed = await fail(world, waits), await fail(world, declines)
    twice = await fail(world, declines)
    await again(world, twice, waits)
    over = await fail(world, waits)
    await world.change(over, give_up_at=-1.0)
    await again(world, over, waits)
    assert [await world.status(each) for each in (asked, twice, over)] == [Status.FAILED, Status.FAILED, Status.DEAD]
    async with world.components.admin.acquire(60) as connection:
        ledger = LedgerSearch(connection)
        traffic = await ledger.traffic(await ledger.last(3600), lambda *_: "*")
        event = await ledger.find(twice)
        assert event is not None
        timeline = await ledger.timeline(event)
        await world.settle(failed, Status.COMPLETED)
        await world.settle(over, Status.COMPLETED)
        later = await ledger.traffic(await ledger.last(3600), lambda *_: "*")
    [found] = traffic.handlers
    assert (found.events, found.failed, found.dead, found.retries) == (4, 1, 1, 2)
    assert (found.unsuccessful, found.success) == (2, 0.0)
    assert found.last_error is not None
    assert "later" in found.last_error  # of the dead event, which is the newest
    assert [each.kind for each in timeline] == ["received", "failed", "retry"]
    assert re.fullmatch(r"attempt 2 on \S+: asked for a retry after \d+\.\d\d s: Retry: later", timeline[2].text)
    [found] = later.handlers
    assert (found.completed, found.retries, found.success, found.last_error) == (2, 2, 1.0, None)


async def test_failures_of_one_line_are_one_group(world: World, operations: Commands) -> None:
    """Handler, class and line are named and counted; the group that failed last comes first; no message is in it."""
    first, second = await fail(world, declines), await fail(world, declines)
    await again(world, first, declines)
    dead = [await fail(world, refuses), await fail(world, refuses, "invoice.paid")]
    latest, other, declined = await operations.failure_groups(10)
    assert [latest.example_id, other.example_id] == dead[::-1]
    assert declined.handler == f"{__name__}.declines"
    assert declined.error_class == "ValueError"
    assert declined.place is not None
    assert declined.place.startswith("tests/integration/test_failure_groups.py:")
    assert declined.place.endswith(" in declines")
    assert (declined.failures, declined.events_failed, declined.events_dead) == (3, 2, 0)
    assert (latest.failures, latest.events_failed, latest.events_dead) == (1, 0, 1)
    assert declined.example_id == first
    assert declined.first_seen_at < declined.last_seen_at < other.last_seen_at
    assert await ids(operations, declined.group) == {first, second}
    stored = await world.database.fetch(
        "SELECT failure_group, handler, error_class, place FROM firstclaim.stripe_event_attempts"
    )
    assert "evt_" not in str(stored)
    assert len(await operations.failure_groups(1)) == 1


async def test_only_failures_within_the_time_are_counted(world: World, operations: Commands) -> None:
    """An older failure counts for the first time only; a group without a newer one is left out."""
    old, new = await fail(world, declines), await fail(world, declines)
    await fail(world, refuses)
    await world.database.execute(
        "UPDATE firstclaim.stripe_event_attempts SET ended_at = ended_at - interval '1 hour'"
        " WHERE event_id = $1 OR error_class = 'Permanent'",
        old,
    )
    [found] = await operations.failure_groups(10, newer_than_seconds=60)
    assert (found.failures, found.example_id) == (1, new)
    assert (found.last_seen_at - found.first_seen_at).total_seconds() > 3500
    assert len(await operations.failure_groups(10)) == 2


async def test_an_event_is_in_the_group_of_its_last_failure(world: World, operations: Commands) -> None:
    """Another failure moves it, success ends it, and so does an attempt that was abandoned; the counts stay."""
    moved, completed, abandoned = [await fail(world, declines) for _ in range(3)]
    group = (await group_of(operations, declines)).group
    await again(world, moved, refuses)
    await again(world, completed, effect)
    [claim] = await world.ledger.take_over([abandoned])
    await world.change(claim.event_id, due_at=-1.0)
    assert [each.event_id for each in await world.ledger.return_abandoned(10)] == [abandoned]
    assert await ids(operations, group) == set()
    assert await ids(operations, (await group_of(operations, refuses)).group) == {moved}
    assert (await group_of(operations, declines)).failures == 3


async def test_a_retry_that_was_asked_for_is_no_failure(world: World, operations: Commands) -> None:
    """It belongs to a group only if the event is dead of it."""
    event_id = await fail(world, waits)
    assert await operations.failure_groups(10) == []
    await world.change(event_id, give_up_at=-1.0)
    await again(world, event_id, waits)
    found = await group_of(operations, waits)
    assert (found.error_class, found.failures, found.events_dead) == ("Retry", 1, 1)


async def test_a_group_is_replayed_and_nothing_else(world: World, operations: Commands) -> None:
    """Its events are due now, the audit and the history of each have it, and events of another group stay dead."""
    mine, other = await fail(world, refuses), await fail(world, refuses, "invoice.paid")
    [group] = [each.group for each in await operations.failure_groups(10) if each.example_id == mine]
    assert await replayed(operations, Selection(group=group)) == [mine]
    assert (await world.status(mine), await world.status(other)) == (Status.PENDING, Status.DEAD)
    assert await audit(world) == [(OPERATOR, "replay", f"{mine} filter: group={group}", 1)]
    for event_id, replays in ((mine, [f"replay by {OPERATOR}"]), (other, [])):
        row = await operations.find(event_id)
        assert row is not None
        assert [each.text for each in await operations.timeline(row) if each.kind == "replay"] == replays
    assert not Selection(group=group).is_empty


async def test_a_group_is_pruned_and_nothing_else(world: World, operations: Commands) -> None:
    """Its dead events are deleted once they are old enough, those of another group are kept."""
    mine, other = await fail(world, refuses), await fail(world, refuses, "invoice.paid")
    [group] = [each.group for each in await operations.failure_groups(10) if each.example_id == mine]
    for each in (mine, other):
        await world.age(each, 100)
    retention = Retention(30, 90, include_dead=True, group=group)
    assert await count_prunable(operations, retention) == (1, 1)
    assert [batch async for batch in prune(operations, OPERATOR, retention)] == [Pruned(rows=1)]
    assert [each.event_id for each in await operations.list_events(Selection(), 9)] == [other]
    assert await audit(world) == [(OPERATOR, "prune", f"payloads=30d rows=90d dead group={group}", 1)]
    assert [each.example_id for each in await operations.failure_groups(10)] == [other]


async def test_the_rows_of_an_older_build_are_in_no_group(world: World, operations: Commands) -> None:
    """A build from before this schema goes on writing its columns; how many of its events are left out is said."""
    event_id = await fail(world, declines)
    await world.database.execute(
        "INSERT INTO firstclaim.stripe_event_attempts (event_id, attempt, outcome, process, began_at, ended_at, error)"
        " VALUES ($1, 2, 'failed', NULL, NULL, clock_timestamp(), 'x')",
        event_id,
    )
    found = await group_of(operations, declines)
    assert (found.failures, found.events_failed) == (1, 0)
    assert await ids(operations, found.group) == set()
    assert await operations.ungrouped() == Ungrouped(failed=1, dead=0)
    await fail(world, refuses)
    assert await operations.ungrouped() == Ungrouped(failed=1, dead=0)
    await world.state_of(delivery(), Status.DEAD)
    words = (await operations.ungrouped()).words
    assert words.startswith("1 failed and 1 dead events are in no group: an older build")
    assert Ungrouped(0, 0).words == ""


async def test_the_groups_are_found_by_their_index(world: World, operations: Commands) -> None:
    """Neither the list nor a selection reads all attempts of a large ledger."""
    await world.database.execute(
        """
        INSERT INTO firstclaim.stripe_event_attempts
               (event_id, attempt, outcome, ended_at, error, failure_group, handler, error_class)
        SELECT 'evt_' || n, 1, 'failed', clock_timestamp(), '', 'group_' || n % 20, 'h', 'E'
          FROM generate_series(1, 20000) AS n
        """
    )
    await world.database.execute("ANALYZE firstclaim.stripe_event_attempts")
    plan = await explained(operations._connection, GROUPS, newer=60.0, limit=10)
    assert "stripe_event_attempts_group" in plan
    assert "Seq Scan on stripe_event_attempts" not in plan
