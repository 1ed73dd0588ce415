"""What an operator reads from the ledger and changes in it, on a real server."""

import re
from collections.abc import AsyncIterator

import pytest

from firstclaim.errors import SchemaOutdated
from firstclaim.operations import audit as audit_module
from firstclaim.operations import commands as operations_module
from firstclaim.operations import prune as prune_module
from firstclaim.operations.commands import BATCH, Commands
from firstclaim.operations.prune import Pruned, Retention, count_prunable, prune
from firstclaim.operations.queries import STATEMENT_SECONDS
from firstclaim.operations.selection import Selection
from firstclaim.status import Status
from tests.integration.test_ledger import near, unchanged
from tests.integration.world import World, delivery
from tests.operator import GIVE_UP_SECONDS, OPERATOR, replay, rotate

DAY = 86_400.0


@pytest.fixture
async def operations(world: World, module_database: str) -> AsyncIterator[Commands]:
    """On a connection of its own."""
    async with Commands.connect(module_database, 5) as operations:
        yield operations


async def event(world: World, status: Status, *, settled_days: float = 0) -> str:
    """The id of a new event in that status, settled so many days ago if it is settled."""
    given = await world.state_of(delivery(), status)
    if settled_days:
        await world.age(given.event.id, settled_days)
    return given.event.id


async def replayed(operations: Commands, selection: Selection, *, repeat_completed: bool = False) -> list[str]:
    chosen = await operations.select_candidates(selection)
    batches = operations.replay(
        chosen, selection.filters, OPERATOR, give_up_seconds=GIVE_UP_SECONDS, repeat_completed=repeat_completed
    )
    return [event_id async for batch in batches for event_id in batch]


async def pruned(operations: Commands, payload_days: int, row_days: int, *, include_dead: bool = False) -> list[int]:
    batches = prune(operations, OPERATOR, Retention(payload_days, row_days, include_dead))
    total = sum([batch async for batch in batches], Pruned())
    return [total.payloads, total.rows]


async def audit(world: World) -> list[tuple[str, str, str, int | None]]:
    """The audit."""
    rows = await world.database.fetch(
        "SELECT operator, action, selection, changed FROM firstclaim.operator_actions ORDER BY at"
    )
    return [tuple(row) for row in rows]


# -- queries -------------------------------------------------------------------------------------------


async def test_every_condition_must_hold(world: World, operations: Commands) -> None:
    """Id, status, type, prefix, account and age select events, alone and together; the newest is first."""
    old, dead, other = [await event(world, each) for each in (Status.COMPLETED, Status.DEAD, Status.COMPLETED)]
    await world.change(old, received_at=-3600.0, account="acct_1")
    await world.change(dead, received_at=-60.0, type="invoice_paid")
    await world.change(other, type="customer.subscription.deleted")
    for selection, expected in (
        (Selection(), [other, dead, old]),
        (Selection([dead, "evt_unknown"]), [dead]),
        (Selection(statuses=[Status.COMPLETED]), [other, old]),
        (Selection(type="customer.subscription.*"), [other]),
        (Selection(type="customer.*"), [other]),
        (Selection(type="customer.subscription"), []),
        (Selection(type="invoice%"), []),
        (Selection(type="invoice.paid"), []),
        (Selection(account="acct_1"), [old]),
        (Selection(older_than_seconds=600), [old]),
        (Selection(newer_than_seconds=600), [other, dead]),
        (Selection(newer_than_seconds=600, statuses=[Status.DEAD]), [dead]),
    ):
        assert [each.event_id for each in await operations.list_events(selection, 10)] == expected, selection
        assert sum((await operations.count(selection)).values()) == len(expected), selection
    assert [each.event_id for each in await operations.list_events(Selection(), 1)] == [other]


async def test_one_event_is_found_with_its_payload(world: World, operations: Commands) -> None:
    """The row and the signed bytes are returned, and None for an event that the ledger does not have."""
    given = await world.state_of(delivery(), Status.DEAD)
    found = await operations.find(given.event.id)
    assert found is not None
    assert (found.status, found.type, found.attempt) == (Status.DEAD, given.event.type, 0)
    assert await operations.payload(given.event.id) == given.body
    assert await operations.find("evt_unknown") is None
    assert await operations.payload("evt_unknown") is None


async def test_the_backlog_counts_what_is_due(world: World, operations: Commands) -> None:
    """It counts due events, the age of the oldest, claims past their lease, and events that were abandoned before."""
    empty = await operations.backlog()
    assert (empty.due, empty.oldest_due_seconds) == (0, None)
    late, later, processing = [await event(world, s) for s in (Status.FAILED, Status.PENDING, Status.PROCESSING)]
    await event(world, Status.COMPLETED)
    await world.change(late, due_at=-100.0, abandoned=2)
    await world.change(later, due_at=100.0)
    await world.change(processing, due_at=-1.0)
    found = await operations.backlog()
    assert await operations.count(Selection()) == {
        each: 1 for each in Status if each not in (Status.IGNORED, Status.DEAD)
    }
    assert (found.due, found.past_their_lease, found.abandoned_before) == (1, 1, 1)
    assert found.oldest_due_seconds == pytest.approx(100, abs=20)


# -- replay -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [Status.PENDING, Status.FAILED, Status.DEAD, Status.IGNORED])
async def test_a_replay_begins_anew(world: World, status: Status) -> None:
    """It is due now, with counts of 0 and three days to succeed; the attempt, the fencing token, is kept."""
    given = await world.state_of(delivery(), status)
    await world.change(
        given.event.id, attempt=9, failures=4, abandoned=8, due_at=3600.0, give_up_at=-3600.0, last_error="why"
    )
    assert await replay(world.url, [given.event.id, "evt_unknown"]) == [given.event.id]
    row = await world.row(given.event.id)
    assert (row["status"], row["attempt"], row["failures"], row["abandoned"]) == ("pending", 9, 0, 0)
    assert row["settled_at"] is None
    assert near(row["due_in"], 0)
    assert near(row["give_up_in"], GIVE_UP_SECONDS)


@pytest.mark.parametrize("status", [Status.PROCESSING, Status.COMPLETED])
async def test_a_replay_never_doubles(world: World, status: Status) -> None:
    """An event that is being handled, or that is completed, is not changed."""
    given = await world.state_of(delivery(), status)
    before = await world.row(given.event.id)
    assert await replay(world.url, [given.event.id]) == []
    assert unchanged(before, await world.row(given.event.id))


@pytest.mark.parametrize("what", ["ended", "tried"])
async def test_what_changed_since_it_was_chosen_is_left(world: World, operations: Commands, what: str) -> None:
    """An event that ended, was tried again, or was received after the selection is not replayed."""
    given, other = await event(world, Status.FAILED), await event(world, Status.FAILED)
    selection = Selection(type="invoice.*")
    chosen = await operations.select_candidates(selection)
    if what == "ended":
        await world.settle(given, Status.COMPLETED)
    else:
        await world.change(given, attempt=2)
    before = [await world.row(each) for each in (given, await event(world, Status.FAILED))]
    batches = operations.replay(chosen, selection.filters, OPERATOR, give_up_seconds=9, repeat_completed=True)
    assert [batch async for batch in batches] == [[other]]
    for row in before:
        assert unchanged(row, await world.row(row["event_id"]))


async def test_a_replay_waits_for_nobody(world: World, operations: Commands) -> None:
    """A locked row is skipped, and the others are replayed at once."""
    locked, other = [await event(world, Status.DEAD) for _ in range(2)]
    async with world.locked(locked):
        assert await replayed(operations, Selection(statuses=[Status.DEAD])) == [other]
    assert await world.status(locked) is Status.DEAD


async def test_a_prune_beside_a_replay(world: World, operations: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    """An event whose payload is pruned before its batch runs is not changed, because it could not be handled."""
    monkeypatch.setattr(operations_module, "BATCH", 1)
    old = [await event(world, Status.IGNORED, settled_days=100) for _ in range(3)]
    selection = Selection(old)
    batches = operations.replay(
        await operations.select_candidates(selection), selection.filters, OPERATOR, give_up_seconds=9
    )
    [first] = await anext(batches)
    async with Commands.connect(world.url, 10) as others:
        assert await pruned(others, 90, 400) == [2, 0]
    assert [batch async for batch in batches] == [[], []]
    assert {each: await world.status(each) for each in old} == {
        each: Status.PENDING if each == first else Status.IGNORED for each in old
    }


async def test_a_replay_by_selection(world: World, operations: Commands) -> None:
    """Only selected events that may be replayed are, and the audit has the operator, the selection and the number."""
    dead = [await event(world, Status.DEAD) for _ in range(3)]
    others = [await event(world, each) for each in (Status.FAILED, Status.COMPLETED, Status.PROCESSING)]
    before = [await world.row(each) for each in others]
    assert sorted(await replayed(operations, Selection(statuses=[Status.DEAD]))) == sorted(dead)
    assert {await world.status(each) for each in dead} == {Status.PENDING}
    for row in before:
        assert (await world.row(row["event_id"]))["status"] == row["status"]
    [(operator, action, selection, changed)] = await audit(world)
    assert (operator, action, changed) == (OPERATOR, "replay", 3)
    assert sorted(selection.split(" ")[:3]) == sorted(dead)
    assert selection.endswith(" filter: status=dead")


async def test_the_audit_of_a_large_replay(world: World, operations: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more events than its row may name, it has the filters alone; ids that an operator has typed are kept."""
    monkeypatch.setattr(audit_module, "NAMED_MOST", 1)
    dead = sorted([await event(world, Status.DEAD) for _ in range(2)])
    await replayed(operations, Selection(statuses=[Status.DEAD]))
    await replayed(operations, Selection(dead))
    (_, _, first, _), (_, _, second, _) = await audit(world)
    assert first == "status=dead"
    assert sorted(second.split(" ")) == dead


async def test_completed_events_are_replayed_only_with_repeat_completed(world: World, operations: Commands) -> None:
    """They are replayed only with `repeat_completed`; an event that is being handled never is."""
    completed, processing = await event(world, Status.COMPLETED), await event(world, Status.PROCESSING)
    assert await replayed(operations, Selection()) == []
    assert await replayed(operations, Selection(), repeat_completed=True) == [completed]
    assert await world.status(completed) is Status.PENDING
    assert await world.status(processing) is Status.PROCESSING


async def test_what_has_no_payload_is_not_replayed(world: World, operations: Commands) -> None:
    """An event without its payload could not be dispatched, and would be dead for a new reason."""
    dead = await event(world, Status.DEAD)
    await world.database.execute("DELETE FROM firstclaim.stripe_event_payloads")
    assert await replayed(operations, Selection([dead])) == []
    assert await world.status(dead) is Status.DEAD


async def test_many_are_replayed_in_batches(world: World, operations: Commands) -> None:
    """More events than one transaction takes are each replayed once."""
    template = await event(world, Status.DEAD)
    for table, columns in (
        (
            "firstclaim.stripe_events",
            "type, livemode, created_at, status, attempt, received_at, due_at, give_up_at, settled_at",
        ),
        ("firstclaim.stripe_event_payloads", "body"),
    ):
        await world.database.execute(
            f"""
            INSERT INTO {table} (event_id, {columns})
            SELECT 'evt_' || number, {columns} FROM {table}, generate_series(1, $2) AS number WHERE event_id = $1
            """,
            template,
            BATCH * 2,
        )
    done = await replayed(operations, Selection(statuses=[Status.DEAD]))
    assert (len(done), len(set(done))) == (BATCH * 2 + 1, BATCH * 2 + 1)
    assert await operations.count(Selection()) == {Status.PENDING: BATCH * 2 + 1}


async def test_actions_on_an_event_are_found_by_its_id(world: World, operations: Commands) -> None:
    """Actions that named the event are found, and none that named an id with the same beginning."""
    dead = await event(world, Status.DEAD)
    await replayed(operations, Selection([dead, "evt_other"]))
    [action] = await operations.actions_on(dead)
    assert (action["operator"], action["action"]) == (OPERATOR, "replay")
    assert await operations.actions_on("evt_othe") == []


async def test_nothing_named_is_nothing(world: World, operations: Commands) -> None:
    """An empty list of ids selects no event, not every event."""
    await event(world, Status.DEAD)
    assert await operations.count(Selection([])) == {}
    assert Selection().is_empty
    assert not Selection([]).is_empty


# -- rotate -------------------------------------------------------------------------------------------


async def test_a_ledger_that_is_not_migrated_is_left_alone(world: World) -> None:
    """Without the audit's table nothing is changed, and the error names the command to run."""
    before = await world.database.fetchval("SELECT id FROM firstclaim.ledger_epoch")
    version = await world.database.fetchval("SELECT version_num FROM firstclaim.ledger_revision")
    await world.database.execute("UPDATE firstclaim.ledger_revision SET version_num = '0002'")
    try:
        with pytest.raises(SchemaOutdated, match="firstclaim migrate"):
            await rotate(world.url)
    finally:
        await world.database.execute("UPDATE firstclaim.ledger_revision SET version_num = $1", version)
    assert await world.database.fetchval("SELECT id FROM firstclaim.ledger_epoch") == before


async def test_the_server_ends_what_a_command_gave_up(world: World, operations: Commands) -> None:
    """A statement has the same limit on the server: that of a killed command would hold its locks for ever."""
    limit = await operations._connection.fetchval(
        "SELECT extract(epoch FROM current_setting('statement_timeout')::interval)"
    )
    assert limit == STATEMENT_SECONDS


# -- prune --------------------------------------------------------------------------------------------


async def test_old_payloads_go_and_older_rows(world: World, operations: Commands) -> None:
    """Payloads and rows are pruned by their age since they were settled, and the audit has the count."""
    ages = {days: await event(world, Status.COMPLETED, settled_days=days) for days in (1, 40, 100)}
    for days in (40, 100):
        await world.database.execute(
            "INSERT INTO firstclaim.stripe_event_attempts VALUES ($1, 1, 'failed', NULL, NULL, now(), '')", ages[days]
        )
        await world.database.execute("INSERT INTO firstclaim.stripe_event_duplicates VALUES ($1, 1, now())", ages[days])
    assert await count_prunable(operations, Retention(30, 90)) == (2, 1)
    assert await pruned(operations, 30, 90) == [1, 1]
    assert [each.event_id for each in await operations.list_events(Selection(), 9)] == [ages[1], ages[40]]
    assert await operations.payload(ages[40]) is None
    assert await operations.payload(ages[1]) is not None
    assert await world.database.fetchval("SELECT count(*) FROM firstclaim.stripe_event_payloads") == 1
    for table in ("attempts", "duplicates"):
        left = await world.database.fetchval(f"SELECT array_agg(event_id) FROM firstclaim.stripe_event_{table}")
        assert left == [ages[40]], table
    assert await audit(world) == [(OPERATOR, "prune", "payloads=30d rows=90d", 2)]
    assert await pruned(operations, 30, 90) == [0, 0]


@pytest.mark.parametrize("undated", [False, True])
@pytest.mark.parametrize("index", ["stripe_event_payloads_received", "stripe_events_received", None])
async def test_old_payloads_and_rows_are_found_in_any_ledger(
    world: World, operations: Commands, monkeypatch: pytest.MonkeyPatch, undated: bool, index: str | None
) -> None:
    """Batch after batch, also payloads from before schema 0015, and where a large ledger lacks an index."""
    monkeypatch.setattr(prune_module, "BATCH", 2)
    old = [await event(world, Status.COMPLETED, settled_days=days) for days in (500, 100, 500, 100, 100)]
    kept = [await event(world, Status.COMPLETED, settled_days=10) for _ in range(3)]
    if undated:
        await world.database.execute("UPDATE firstclaim.stripe_event_payloads SET received_at = NULL")
    definition = await world.database.fetchval("SELECT indexdef FROM pg_indexes WHERE indexname = $1", index)
    if index:
        await world.database.execute(f"DROP INDEX firstclaim.{index}")
    try:
        assert await pruned(operations, 90, 400) == [3, 2]
    finally:
        await world.database.execute(definition or "SELECT")
    left = await world.database.fetch("SELECT event_id FROM firstclaim.stripe_event_payloads")
    assert {row[0] for row in left} == set(kept)
    assert {each.event_id for each in await operations.list_events(Selection(), 9)} == {*kept, old[1], *old[3:]}


async def test_a_prune_looks_only_at_what_is_old(world: World, operations: Commands) -> None:
    """The oldest are found by an index, not by a walk through all: the plan says so."""
    await world.database.execute("SET enable_seqscan = off; SET enable_bitmapscan = off")  # of a table that is small
    for statements, index in (
        (prune_module._PRUNE_PAYLOADS, "stripe_event_payloads_received"),
        (prune_module._PRUNE_ROWS, "stripe_events_received"),
    ):
        values = {"after": "", "after_at": None, "limit": 500, "keep_payloads": False}
        sql, bound = statements["old"].on(operations._connection, values | Retention(90, 400).parameters(90))
        plan = await world.database.fetch(f"EXPLAIN {sql}", *bound)
        scans = [row[0] for row in plan if index in row[0]]
        assert any(re.search(r"Index (Only )?Scan using", line) for line in scans), plan


async def test_what_is_unfinished_is_never_pruned(world: World, operations: Commands) -> None:
    """An unfinished event is kept at any age, and a dead one unless `include_dead` is given."""
    kept = {each: await event(world, each) for each in (Status.PENDING, Status.PROCESSING, Status.FAILED)}
    for each in kept.values():
        await world.change(each, received_at=-1000 * DAY, due_at=-900 * DAY, give_up_at=-900 * DAY)
    dead = await event(world, Status.DEAD, settled_days=1000)
    ignored = await event(world, Status.IGNORED, settled_days=1000)
    assert await pruned(operations, 1, 35) == [0, 1]
    assert await operations.find(ignored) is None
    assert await operations.find(dead) is not None
    assert await pruned(operations, 1, 35, include_dead=True) == [0, 1]
    assert await operations.find(dead) is None
    assert {await world.status(each) for each in kept.values()} == set(kept)


async def test_rows_are_kept_while_stripe_may_resend(operations: Commands) -> None:
    """Rows are kept for at least 35 days, because a deleted row detects no duplicate."""
    with pytest.raises(ValueError, match="at least 35 days"):
        await pruned(operations, 1, 34)


async def test_what_another_has_locked_is_left(world: World, operations: Commands) -> None:
    """A locked row keeps its payload, and the prune does not wait for it."""
    locked, other = [await event(world, Status.COMPLETED, settled_days=100) for _ in range(2)]
    async with world.locked(locked):
        assert await pruned(operations, 1, 35) == [0, 1]
    assert await operations.find(other) is None
    assert await operations.payload(locked) is not None
