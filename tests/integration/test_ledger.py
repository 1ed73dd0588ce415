"""The ledger's statements on a real Postgres: who wins a row, and that whoever lost it changes nothing."""

import asyncio
import os
import re
import socket
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import asyncpg
import pytest

from firstclaim.errors import LedgerUnavailable, Rejected
from firstclaim.event import Delivery, parse_event
from firstclaim.inbox import statements
from firstclaim.inbox.claim import Claim, HandlerTransaction
from firstclaim.inbox.due import ReturnedEvent
from firstclaim.inbox.existing_row import ExistingRow
from firstclaim.inbox.ledger import Ledger, Recorded
from firstclaim.operations.commands import Commands
from firstclaim.postgres.handler_connections import HandlerConnection
from firstclaim.postgres.statement import Statement
from firstclaim.status import TAKEABLE, Status
from tests.hostile import bodies
from tests.integration.conftest import MakeWorld
from tests.integration.world import NOTHING, World, delivery, due, effect, explained, until

SETTLED = (Status.COMPLETED, Status.IGNORED, Status.DEAD)
LEASE_SECONDS = 60.0
GIVE_UP_SECONDS = 3 * 86_400
LONG_AGO = datetime(2000, 1, 1, tzinfo=UTC)


def near(seconds: float, wanted: float) -> bool:
    """Within the time that a busy machine takes to look."""
    return wanted - 20 < seconds <= wanted


# -- the two ways in ----------------------------------------------------------------------------------


async def test_the_first_claim_wins(world: World) -> None:
    """The row is `processing`, attempt 1, due when its lease is over, with everything the event says about itself."""
    given = delivery(account="acct_1", livemode=True, api_version="2026-10-28.clover")
    claim = await world.ledger.claim(given)
    assert isinstance(claim, Claim)
    assert (claim.event_id, claim.attempt, claim.failures, claim.abandoned) == (given.event.id, 1, 0, 0)
    assert claim.body == given.body
    assert claim.epoch == await world.ledger.read_epoch() is not None
    row = await world.row(given.event.id)
    assert (row["status"], row["attempt"], row["failures"], row["abandoned"]) == ("processing", 1, 0, 0)
    assert (row["type"], row["account"], row["livemode"]) == ("invoice.payment_failed", "acct_1", True)
    assert (row["api_version"], row["object_id"]) == ("2026-10-28.clover", given.event.object_id)
    assert row["created_at"] == given.event.created
    assert (row["action"], row["last_error"], row["settled_at"]) == (None, None, None)
    assert near(row["due_in"], LEASE_SECONDS)
    assert near(row["give_up_in"], GIVE_UP_SECONDS)


@pytest.mark.parametrize("status", Status)
async def test_a_second_claim_finds_the_row(world: World, status: Status) -> None:
    """Whatever its state, it is told and not changed; the body of another delivery does not replace the first."""
    given = await world.state_of(delivery(), status)
    before = await world.row(given.event.id)
    again = Delivery(given.event, given.body + b"\n")
    assert await world.ledger.claim(again) == ExistingRow(status, 0, await world.ledger.read_epoch())
    assert unchanged(before, await world.row(given.event.id))
    assert await stored_body(world, given.event.id) == given.body


async def test_what_nothing_wants_is_settled_as_it_is_inserted(world: World) -> None:
    """No handler for its type: `ignored` at once, in one statement, never `processing`."""
    given = delivery()
    assert await world.ledger.ignore(given) is None
    row = await world.row(given.event.id)
    assert (row["status"], row["attempt"], row["action"]) == ("ignored", 1, "ignored")
    assert row["settled_at"] is not None


@pytest.mark.parametrize("due_in", [0.0, 20.0])
async def test_a_record_waits_for_recovery(world: World, due_in: float) -> None:
    """Whoever may not dispatch leaves a `pending` row of attempt 0, due now or when the other's lock has run out."""
    given = delivery()
    assert await world.ledger.record(given, due_in_seconds=due_in) == Recorded(await world.ledger.read_epoch())
    row = await world.row(given.event.id)
    assert (row["status"], row["attempt"], row["failures"], row["settled_at"]) == ("pending", 0, 0, None)
    assert near(row["due_in"], due_in)
    assert await stored_body(world, given.event.id) == given.body


@pytest.mark.parametrize("status", Status)
async def test_a_record_changes_nothing_that_is_there(world: World, status: Status) -> None:
    """It answers by the row, and leaves even its `due_at` alone."""
    given = await world.state_of(delivery(), status)
    before = await world.row(given.event.id)
    assert await world.ledger.record(given, due_in_seconds=500) == ExistingRow(
        status, 0, await world.ledger.read_epoch()
    )
    assert unchanged(before, await world.row(given.event.id))


@pytest.mark.parametrize("status", [None, *Status])
async def test_fifty_claims_at_once_have_one_winner(make_world: MakeWorld, status: Status | None) -> None:
    """Fifty connections insert the same new id together: one `Claim`, 49 find it; over an old row all fifty do."""
    world = await make_world(ingest_connections=50)
    given = delivery()
    if status is not None:
        await world.state_of(given, status)
    won = await asyncio.gather(*(world.ledger.claim(given) for _ in range(50)))
    assert sum(isinstance(each, Claim) for each in won) == (status is None)
    found = {each.status for each in won if isinstance(each, ExistingRow)}
    assert found == {Status.PROCESSING if status is None else status}
    assert await world.database.fetchval("SELECT count(*) FROM firstclaim.stripe_events") == 1
    assert await world.database.fetchval("SELECT count(*) FROM firstclaim.stripe_event_payloads") == 1


def storable() -> dict[str, bytes]:
    """Those of the hostile bodies that are events."""
    found = {}
    for name, body in bodies().items():
        try:
            parse_event(body)
        except Rejected:
            continue
        found[name] = body
    return found


STORABLE = storable()


@pytest.mark.parametrize("name", STORABLE)
async def test_a_hostile_body_is_stored_byte_for_byte(world: World, name: str) -> None:
    """NUL, huge numbers, duplicate keys, odd instants: what was signed is what comes back, and can be dispatched."""
    body = STORABLE[name]
    event = parse_event(body)
    await world.ledger.record(Delivery(event, body), due_in_seconds=0)
    assert await stored_body(world, event.id) == body
    assert (await world.row(event.id))["created_at"] == event.created
    [claim] = await world.ledger.take_over([event.id])
    assert claim.body == body
    assert parse_event(claim.body) == event


async def test_an_insert_does_not_wait_for_a_running_handler(world: World) -> None:
    """A duplicate of an event whose row is locked by its handler is answered at once, as is every take-over of it."""
    claim = await world.claim()
    given = same(claim)
    async with world.locked(claim.event_id), asyncio.timeout(5):
        assert await world.ledger.claim(given) == ExistingRow(Status.PROCESSING, 1, claim.epoch)
        assert await world.ledger.record(given, due_in_seconds=0) == ExistingRow(Status.PROCESSING, 1, claim.epoch)
        assert await world.ledger.take_over([claim.event_id]) == []
        assert await world.ledger.return_abandoned(10) == []
        assert await due(world, 10, abandoned=False) == []


# -- taking over --------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", TAKEABLE)
@pytest.mark.parametrize("due_at", [-3600.0, 3600.0])
async def test_what_nobody_works_on_is_taken_over(world: World, status: Status, due_at: float) -> None:
    """Pending or failed, whatever its `due_at` (Stripe paces its own retries): the next attempt, nothing charged."""
    given = await world.state_of(delivery(), status)
    await world.change(given.event.id, attempt=6, failures=3, abandoned=2, due_at=due_at, last_error="earlier")
    [claim] = await world.ledger.take_over([given.event.id])
    assert (claim.event_id, claim.attempt, claim.failures, claim.abandoned) == (given.event.id, 7, 3, 2)
    assert claim.body == given.body
    row = await world.row(given.event.id)
    assert (row["status"], row["attempt"], row["failures"], row["abandoned"]) == ("processing", 7, 3, 2)
    assert near(row["due_in"], LEASE_SECONDS)


@pytest.mark.parametrize("status", [Status.PROCESSING, *SETTLED])
async def test_what_is_owned_or_settled_is_not_taken_over(world: World, status: Status) -> None:
    """Not even past its lease: giving up on a vanished holder is another statement."""
    given = await world.state_of(delivery(), status)
    await world.change(given.event.id, due_at=-3600.0)
    before = await world.row(given.event.id)
    assert await world.ledger.take_over([given.event.id, "evt_unknown"]) == []
    assert unchanged(before, await world.row(given.event.id))


async def test_a_locked_row_is_skipped(world: World) -> None:
    """Of two rows one is in somebody's hands: the other is taken, and nobody waits."""
    first, second = [await world.state_of(delivery(), Status.PENDING) for _ in range(2)]
    async with world.locked(first.event.id), asyncio.timeout(5):
        claims = await world.ledger.take_over([first.event.id, second.event.id])
    assert [claim.event_id for claim in claims] == [second.event.id]
    assert await world.status(first.event.id) is Status.PENDING


async def test_of_fifty_at_once_one_takes_it_over(make_world: MakeWorld) -> None:
    """However many come for a row together, its attempt rises by one."""
    world = await make_world(ingest_connections=50)
    given = await world.state_of(delivery(), Status.FAILED)
    taken = await asyncio.gather(*(world.ledger.take_over([given.event.id]) for _ in range(50)))
    assert sum(map(len, taken)) == 1
    assert (await world.row(given.event.id))["attempt"] == 1


@pytest.mark.parametrize("plan", ["default", "SET enable_hashjoin = off", "SET enable_nestloop = off"])
async def test_five_ids_are_five_claims(world: World, plan: str) -> None:
    """Of 200 takeable rows exactly those asked for are claimed, under every plan."""
    if plan != "default":  # before the pool's first connection, which will have it
        await world.database.execute(f"ALTER ROLE CURRENT_USER IN DATABASE {await name_of(world)} {plan}")
    try:
        given = [delivery() for _ in range(200)]
        for each in given:
            await world.ledger.record(each, due_in_seconds=0)
        await world.database.execute("ANALYZE firstclaim.stripe_events")
        wanted = {each.event.id for each in given[:5]}
        assert {claim.event_id for claim in await world.ledger.take_over(sorted(wanted))} == wanted
        assert (
            await world.database.fetchval("SELECT count(*) FROM firstclaim.stripe_events WHERE status = 'processing'")
            == 5
        )
    finally:
        await world.database.execute(f"ALTER ROLE CURRENT_USER IN DATABASE {await name_of(world)} RESET ALL")


async def test_an_expired_payload_is_no_reason_to_skip(world: World) -> None:
    """A row whose body is gone is claimed all the same: whoever dispatches says what to do about it."""
    given = await world.state_of(delivery(), Status.PENDING)
    await world.database.execute("DELETE FROM firstclaim.stripe_event_payloads")
    [claim] = await world.ledger.take_over([given.event.id])
    assert claim.body is None


# -- abandoned ----------------------------------------------------------------------------------------


async def returned(world: World) -> list[tuple[str, Status, int]]:
    """Make abandoned events due again: the id, the status and the abandonments of each."""
    return [(event.event_id, event.status, event.times) for event in await world.ledger.return_abandoned(10)]


async def test_an_abandoned_event_is_named_with_its_process(world: World) -> None:
    """The log says which process vanished, and in which attempt at what."""
    claim = await world.claim()
    await world.change(claim.event_id, due_at=-0.1)
    process = f"{socket.gethostname()}:{os.getpid()}"
    [event] = await world.ledger.return_abandoned(10)
    assert event == ReturnedEvent(claim.event_id, claim.type, 1, process, Status.PENDING, 1)


async def test_a_vanished_holder_is_given_up_on(world: World) -> None:
    """Past its lease and unlocked: pending again, after a backoff, the abandonment counted and nothing else."""
    claim = await world.claim()
    await world.change(claim.event_id, due_at=-0.1, failures=2)
    assert await returned(world) == [(claim.event_id, Status.PENDING, 1)]
    row = await world.row(claim.event_id)
    assert (row["status"], row["attempt"], row["failures"], row["abandoned"]) == ("pending", 1, 2, 1)
    assert row["last_error"] == "attempt 1 was abandoned: its process vanished or froze"
    assert -15 < row["due_in"] <= 5  # the first backoff: 2.5 to 5 s from then
    assert await world.ledger.return_abandoned(10) == []


@pytest.mark.parametrize(("abandoned", "whole"), [(1, 10), (4, 80), (6, 320)])
async def test_every_abandonment_doubles_the_wait(world: World, abandoned: int, whole: float) -> None:
    """Between half of the doubled backoff and all of it, by the database's clock."""
    claim = await world.claim()
    await world.change(claim.event_id, due_at=-0.1, abandoned=abandoned)
    before: Any = await world.database.fetchval("SELECT clock_timestamp()")
    await world.ledger.return_abandoned(10)
    after: Any = await world.database.fetchval("SELECT clock_timestamp()")
    due = (await world.row(claim.event_id))["due_at"]
    assert whole / 2 <= (due - before).total_seconds()
    assert (due - after).total_seconds() <= whole


async def test_the_wait_is_capped(make_world: MakeWorld) -> None:
    """However often: never longer than the longest backoff."""
    world = await make_world(backoff_first_seconds=10.0, backoff_most_seconds=20.0, abandoned_most=1000)
    claim = await world.claim()
    await world.change(claim.event_id, due_at=-0.1, abandoned=900)
    assert await returned(world) == [(claim.event_id, Status.PENDING, 901)]
    assert (await world.row(claim.event_id))["due_in"] <= 20


async def test_a_poison_event_is_dead_at_the_eighth(world: World) -> None:
    """An event that ends its process each time is not tried for ever."""
    claim = await world.claim()
    await world.change(claim.event_id, due_at=-0.1, abandoned=6)
    assert await returned(world) == [(claim.event_id, Status.PENDING, 7)]
    await world.settle(claim.event_id, Status.PROCESSING)
    await world.change(claim.event_id, due_at=-0.1)
    assert await returned(world) == [(claim.event_id, Status.DEAD, 8)]
    assert (await world.row(claim.event_id))["settled_at"] is not None
    assert await world.ledger.return_abandoned(10) == []


async def test_a_holder_within_its_lease_is_left_alone(world: World) -> None:
    """A claim that waits for a handler slot is not abandoned."""
    claim = await world.claim()
    assert await world.ledger.return_abandoned(10) == []
    assert await world.status(claim.event_id) is Status.PROCESSING


async def test_a_slow_handler_is_not_abandoned(world: World) -> None:
    """However late: while its transaction holds the row, it is alive. When that ends, the row is given up on."""
    claim = await world.claim()
    await world.change(claim.event_id, due_at=-3600.0)
    async with world.locked(claim.event_id), asyncio.timeout(5):
        assert await world.ledger.return_abandoned(10) == []
    await until(lambda: world.ledger.return_abandoned(10))  # once the server has noticed the closed connection


@pytest.mark.parametrize(("before", "given_up"), [(0, Status.PENDING), (7, Status.DEAD)])
@pytest.mark.parametrize(
    ("settle", "status", "failures"),
    [
        (lambda ledger, claim: ledger.fail_if_held(claim, "late", due_in_seconds=5), Status.FAILED, 1),
        (lambda ledger, claim: ledger.kill_if_held(claim, "late"), Status.DEAD, 1),
        (lambda ledger, claim: ledger.release_if_held(claim), Status.PENDING, 0),
    ],
    ids=["fail", "kill", "release"],
)
async def test_a_holder_that_was_given_up_on_and_is_alive_has_the_last_word(
    world: World,
    settle: Callable[[Ledger, Claim], Awaitable[Status | None]],
    status: Status,
    failures: int,
    before: int,
    given_up: Status,
) -> None:
    """Past its lease its row looks abandoned for the moment between its transaction's end and its word of it."""
    claim = replace(await world.claim(), abandoned=before)
    await world.change(claim.event_id, due_at=-0.1, abandoned=before)
    assert await returned(world) == [(claim.event_id, given_up, before + 1)]
    assert await settle(world.ledger, claim) is status
    row = await world.row(claim.event_id)
    assert (row["status"], row["attempt"], row["failures"], row["abandoned"]) == (status, 1, failures, before)
    assert (row["settled_at"] is not None) is (status is Status.DEAD)


async def test_a_holder_that_was_taken_over_has_nothing_to_say(world: World) -> None:
    """Once another has begun, the attempt is another, also when that one waits again; the abandonment stays counted."""
    claim = await world.claim()
    await world.change(claim.event_id, due_at=-0.1)
    await world.ledger.return_abandoned(10)
    (taken,) = await world.ledger.take_over([claim.event_id])
    assert (taken.attempt, taken.abandoned) == (2, 1)
    for status in (Status.PROCESSING, Status.PENDING):
        await world.settle(claim.event_id, status)
        before = await world.row(claim.event_id)
        assert await world.ledger.fail_if_held(claim, "late", due_in_seconds=5) is None
        assert unchanged(before, await world.row(claim.event_id))


@pytest.mark.parametrize("status", [each for each in Status if each is not Status.PROCESSING])
async def test_only_a_claim_can_be_abandoned(world: World, status: Status) -> None:
    """What waits or is settled is nobody's, however old."""
    given = await world.state_of(delivery(), status)
    await world.change(given.event.id, due_at=-3600.0)
    assert await world.ledger.return_abandoned(10) == []


@pytest.mark.parametrize("plans", [(), ("hashjoin", "mergejoin", "hashagg", "sort", "material")])
async def test_as_many_as_asked_the_oldest_first(world: World, plans: tuple[str, ...]) -> None:
    """Of ten abandoned rows three, those that are late the longest, also where the planner has only loops left."""
    async with world.components.ingest.acquire(60) as connection:
        for plan in plans:
            await connection.execute(f"SET enable_{plan} = off")
    claims = [await world.claim() for _ in range(10)]
    for number, claim in enumerate(claims):
        await world.change(claim.event_id, due_at=-100.0 + number)
    events = await world.ledger.return_abandoned(3)
    assert {event.event_id for event in events} == {claim.event_id for claim in claims[:3]}


# -- what is due --------------------------------------------------------------------------------------


async def test_due_is_the_oldest_first(world: World) -> None:
    """Pending and failed alike, by `due_at`, as many as asked; what is not due yet, owned or settled is not in it."""
    ages = {delivery().event.id: age for age in (5.0, 1.0, 4.0, 2.0, 3.0)}
    for number, (event_id, age) in enumerate(ages.items()):
        await world.state_of(delivery(event_id), TAKEABLE[number % 2])
        await world.change(event_id, due_at=-age)
    for status in Status:
        other = await world.state_of(delivery(), status)
        await world.change(other.event.id, due_at=3600.0 if status in TAKEABLE else -3600.0)
    oldest_first = sorted(ages, key=lambda event_id: -ages[event_id])
    assert await due(world, 10, abandoned=False) == oldest_first
    assert await due(world, 2, abandoned=False) == oldest_first[:2]
    assert await due(world, 0, abandoned=False) == []
    assert await due(world, 10, abandoned=True) == []


async def test_those_abandoned_before_are_due_apart(world: World) -> None:
    """What may end its process again is never fetched among others."""
    well, suspect = [await world.state_of(delivery(), Status.PENDING) for _ in range(2)]
    await world.change(suspect.event.id, abandoned=1)
    assert await due(world, 10, abandoned=False) == [well.event.id]
    assert await due(world, 10, abandoned=True) == [suspect.event.id]


async def test_looking_for_due_events_reads_the_index(world: World) -> None:
    """Ten thousand rows that are not due yet, or settled, cost nothing: the clock is a condition of the index."""
    await world.database.execute(
        """
        INSERT INTO firstclaim.stripe_events
               (event_id, type, livemode, created_at, status, attempt, received_at, due_at, give_up_at, settled_at)
        SELECT 'evt_' || n, 't', false, now(), CASE WHEN n % 2 = 0 THEN 'failed' ELSE 'completed' END, 1, now(),
               now() + make_interval(secs => 3600 * (1 - n % 2 * 2)), now(), CASE WHEN n % 2 = 1 THEN now() END
          FROM generate_series(1, 10000) AS n
        """
    )
    await world.database.execute("ANALYZE firstclaim.stripe_events")
    looks: list[tuple[Statement, str, dict[str, Any]]] = [
        (
            statements.DUE[False],
            "stripe_events_waiting",
            {"limit": 5, "types": ["t"], "livemodes": [False], "starts": [None], "left_out": []},
        ),
        (
            statements.DUE[True],
            "stripe_events_waiting_abandoned",
            {"limit": 5, "types": ["t"], "livemodes": [False], "starts": [None], "left_out": []},
        ),
        (
            statements.RETURN_ABANDONED,
            "stripe_events_processing",
            {"limit": 5, "most": 8, "first": 5.0, "longest": 3600.0},
        ),
    ]
    async with world.components.ingest.acquire(60) as connection:
        for statement, index, parameters in looks:
            plan = await explained(connection, statement, **parameters)
            assert index in plan
            by_type = r"\(type = .*" if index != "stripe_events_processing" else ""
            assert re.search(rf"Index Cond: \(.*{by_type}due_at <=", plan)


# -- guarded: nothing by id alone ---------------------------------------------------------------------

Change = Callable[[Ledger, Claim], Awaitable[Status | None]]
CHANGES: dict[str, Change] = {
    "fail": lambda ledger, claim: ledger.fail_if_held(claim, "new", due_in_seconds=5),
    "kill": lambda ledger, claim: ledger.kill_if_held(claim, "new"),
    "release": lambda ledger, claim: ledger.release_if_held(claim),
}


@pytest.mark.parametrize("change", CHANGES)
async def test_whoever_was_taken_over_changes_nothing(world: World, change: str) -> None:
    """A stale attempt, of a process that froze and came back: every guarded change leaves its successor's row alone."""
    stale = await world.claim()
    await world.ledger.fail_if_held(stale, "old", due_in_seconds=0)
    [fresh] = await world.ledger.take_over([stale.event_id])
    before = await world.row(stale.event_id)
    assert await CHANGES[change](world.ledger, stale) is None
    assert unchanged(before, await world.row(stale.event_id))
    assert await CHANGES[change](world.ledger, fresh) is not None


@pytest.mark.parametrize("status", [each for each in Status if each is not Status.PROCESSING])
@pytest.mark.parametrize("change", CHANGES)
async def test_only_what_is_held_can_be_changed(world: World, change: str, status: Status) -> None:
    """The right attempt, and another status: what is waiting or settled already stays so, `completed` above all."""
    claim = await world.claim()
    await world.settle(claim.event_id, status)
    before = await world.row(claim.event_id)
    assert await CHANGES[change](world.ledger, claim) is None
    assert unchanged(before, await world.row(claim.event_id))


async def test_a_failure_is_counted_and_tried_again(world: World) -> None:
    """`failed`, due after its wait, with what happened; the attempt stays what it was."""
    claim = await world.claim()
    assert await world.ledger.fail_if_held(claim, "ValueError: no", due_in_seconds=500) is Status.FAILED
    row = await world.row(claim.event_id)
    assert (row["status"], row["attempt"], row["failures"], row["abandoned"]) == ("failed", 1, 1, 0)
    assert (row["last_error"], row["settled_at"]) == ("ValueError: no", None)
    assert near(row["due_in"], 500)


async def test_a_failure_after_three_days_is_the_last(world: World) -> None:
    """When Stripe itself has given up: dead. A thousand failures before that are not."""
    claim = await world.claim()
    await world.change(claim.event_id, failures=1000, give_up_at=30.0)
    assert await world.ledger.fail_if_held(claim, "no", due_in_seconds=0) is Status.FAILED
    [claim] = await world.ledger.take_over([claim.event_id])
    await world.change(claim.event_id, give_up_at=-0.1)
    assert await world.ledger.fail_if_held(claim, "no", due_in_seconds=0) is Status.DEAD
    row = await world.row(claim.event_id)
    assert (row["status"], row["failures"]) == ("dead", 1002)
    assert row["settled_at"] is not None


async def test_each_attempt_that_did_not_succeed_is_noted(make_world: MakeWorld) -> None:
    """By whom, from when to when, how it ended and why; a success adds none, nor does what was released."""
    world = await make_world(abandoned_most=1)
    claim = await world.claim()
    await world.ledger.fail_if_held(claim, "ValueError: no", due_in_seconds=0)
    [claim] = await world.ledger.take_over([claim.event_id])
    await world.ledger.release_if_held(claim)
    [claim] = await world.ledger.take_over([claim.event_id])
    await world.change(claim.event_id, due_at=-0.1)
    await world.ledger.return_abandoned(10)
    await world.settle(claim.event_id, Status.PENDING)
    [claim] = await world.ledger.take_over([claim.event_id])
    await world.ledger.kill_if_held(claim, "Permanent: never")
    async with Commands.connect(world.url, 10) as operations:
        found = await operations.attempts(claim.event_id)
        done = await world.claim()
        await world.dispatch(effect, done)
        assert await operations.attempts(done.event_id) == []
    assert [(each.attempt, each.outcome, each.error) for each in found] == [
        (1, "failed", "ValueError: no"),
        (3, "abandoned", "attempt 3 was abandoned: its process vanished or froze"),
        (4, "dead", "Permanent: never"),
    ]
    assert {each.process for each in found} == {f"{socket.gethostname()}:{os.getpid()}"}
    times = [time for each in found for time in (each.began_at, each.ended_at) if time is not None]
    assert len(times) == 6
    assert times == sorted(times)


async def test_who_takes_its_row_back_was_not_abandoned(world: World) -> None:
    """The note goes with the charge; how the attempt really ended is what stays."""
    claim = await world.claim()
    await world.change(claim.event_id, due_at=-0.1)
    await world.ledger.return_abandoned(10)
    await world.ledger.fail_if_held(claim, "ValueError: late", due_in_seconds=0)
    async with Commands.connect(world.url, 10) as operations:
        [found] = await operations.attempts(claim.event_id)
    assert (found.outcome, found.error) == ("failed", "ValueError: late")


async def test_another_attempts_note_stays(world: World) -> None:
    """Whoever was taken over for good changes nothing of what is noted."""
    stale = await world.claim()
    await world.change(stale.event_id, due_at=-0.1)
    await world.ledger.return_abandoned(10)
    [_] = await world.ledger.take_over([stale.event_id])
    assert await world.ledger.fail_if_held(stale, "late", due_in_seconds=0) is None
    async with Commands.connect(world.url, 10) as operations:
        [found] = await operations.attempts(stale.event_id)
    assert (found.attempt, found.outcome) == (1, "abandoned")


async def test_killed_is_dead(world: World) -> None:
    """At once, whatever time was left, with the reason."""
    claim = await world.claim()
    assert await world.ledger.kill_if_held(claim, "Permanent: not ours") is Status.DEAD
    row = await world.row(claim.event_id)
    assert (row["status"], row["failures"], row["last_error"]) == ("dead", 1, "Permanent: not ours")
    assert row["settled_at"] is not None


async def test_released_is_pending_and_nothing_is_charged(world: World) -> None:
    """Not begun, or interrupted by us: due now, counts as they were, and the next attempt is the next number."""
    claim = await world.claim()
    await world.change(claim.event_id, failures=3, abandoned=1)
    assert await world.ledger.release_if_held(claim) is Status.PENDING
    row = await world.row(claim.event_id)
    assert (row["status"], row["attempt"], row["failures"], row["abandoned"]) == ("pending", 1, 3, 1)
    assert near(row["due_in"], 0)
    [again] = await world.ledger.take_over([claim.event_id])
    assert again.attempt == 2


async def mark(seat: HandlerConnection, claim: Claim, held: HandlerTransaction) -> None:
    """Write the completion mark, and do not commit yet."""
    await statements.COMPLETE.fetch(
        seat.driver,
        event_id=claim.event_id,
        attempt=claim.attempt,
        xid=held.xid,
        action="done",
        synchronous_commit=seat.synchronous_commit,
    )


async def test_a_failure_waits_for_a_transaction_that_may_commit(world: World) -> None:
    """An ambiguous COMMIT: the guarded update waits for the old backend, then sees what became of it."""
    claim = await world.claim()
    async with world.seat() as seat:
        held = await world.ledger.hold(seat, claim)
        assert held is not None
        await mark(seat, claim, held)
        failing = asyncio.create_task(world.ledger.fail_if_held(claim, "COMMIT lost", due_in_seconds=5))
        await until_somebody_waits(world)
        assert not failing.done()
        await seat.commit(NOTHING)
        assert await failing is None
    row = await world.row(claim.event_id)
    assert (row["status"], row["action"], row["failures"]) == ("completed", "done", 0)


# -- inside a handler's transaction -------------------------------------------------------------------


async def test_the_row_is_held_and_completed_in_one_transaction(world: World) -> None:
    """Locked from the first statement on, with its timeouts; completed by the last; seen by nobody before COMMIT."""
    claim = await world.claim()
    async with world.seat() as seat:
        held = await world.ledger.hold(seat, claim)
        assert held is not None
        settings = {
            name: await seat.driver.fetchval(f"SHOW {name}")
            for name in ("idle_in_transaction_session_timeout", "statement_timeout", "synchronous_commit")
        }
        assert settings == {
            "idle_in_transaction_session_timeout": "3min",
            "statement_timeout": "3min",
            "synchronous_commit": "on",
        }
        assert held.pid == seat.driver.get_server_pid()
        with pytest.raises(asyncpg.LockNotAvailableError):
            await world.database.fetch("SELECT FROM firstclaim.stripe_events FOR UPDATE NOWAIT")
        assert await world.status(claim.event_id) is Status.PROCESSING
        assert await world.ledger.complete_if_held(seat, claim, held, "done")
        assert await seat.driver.fetchval("SHOW statement_timeout") == "9s"
    row = await world.row(claim.event_id)
    assert (row["status"], row["action"], row["last_error"]) == ("completed", "done", None)
    assert row["settled_at"] is not None
    assert await world.ledger.committed(held)


@pytest.mark.parametrize("status", [None, *(each for each in Status if each is not Status.PROCESSING)])
async def test_nothing_is_held_that_is_not_ours(world: World, status: Status | None) -> None:
    """A stale attempt (None: taken over), or a row that is settled or waiting: stop before the handler starts."""
    claim = await world.claim()
    if status is None:
        await world.change(claim.event_id, attempt=2)
    else:
        await world.settle(claim.event_id, status)
    async with world.seat() as seat:
        assert await world.ledger.hold(seat, claim) is None
        transaction = HandlerTransaction(await xid_of(seat.driver), 0, LONG_AGO, LONG_AGO)
        assert not await world.ledger.complete_if_held(seat, claim, transaction, "done")


async def test_a_row_in_anothers_hands_is_not_held(world: World) -> None:
    """Locked by another transaction: not waited for."""
    claim = await world.claim()
    async with world.locked(claim.event_id), world.seat() as seat, asyncio.timeout(5):
        assert await world.ledger.hold(seat, claim) is None


async def test_no_other_transaction_can_complete(world: World) -> None:
    """The same claim, on the same connection, after the handler ended the transaction that was begun: refused."""
    claim = await world.claim()
    async with world.seat() as seat:
        held = await world.ledger.hold(seat, claim)
        assert held is not None
        await seat.commit(NOTHING)
        assert not await world.ledger.complete_if_held(seat, claim, held, "done")
        await seat.begin(NOTHING)
        assert not await world.ledger.complete_if_held(seat, claim, held, "done")
    assert await world.status(claim.event_id) is Status.PROCESSING


async def test_what_became_of_a_transaction(world: World) -> None:
    """Committed or not, the server knows afterwards."""
    async with world.seat() as seat:
        for commits in (True, False):
            held = await world.ledger.hold(seat, await world.claim())
            assert held is not None
            await (seat.commit(NOTHING) if commits else seat.roll_back())
            assert await world.ledger.committed(held) is commits


async def test_a_server_that_was_started_or_crashed_since_cannot_tell(world: World) -> None:
    """Another transaction may have the same id then: that it committed is no sign of ours."""
    async with world.seat() as seat:
        held = await world.ledger.hold(seat, await world.claim())
        await seat.commit(NOTHING)
    assert held is not None
    assert await world.ledger.committed(held)
    assert not await world.ledger.committed(replace(held, server_started_at=LONG_AGO)), "another start of the server"
    assert not await world.ledger.committed(replace(held, began_at=LONG_AGO)), "before its last recovery in place"


async def test_ending_a_transaction_ends_that_one_only(world: World) -> None:
    """Given up on, its backend goes, and the row with it is free; a backend in another transaction stays."""
    claim = await world.claim()
    other = await asyncpg.connect(world.url)
    try:
        await other.execute("BEGIN")
        xid: str = await other.fetchval(
            "SELECT pg_current_xact_id()::text FROM firstclaim.stripe_events WHERE event_id = $1 FOR UPDATE",
            claim.event_id,
        )
        pid = other.get_server_pid()
        await world.ledger.end(HandlerTransaction(str(int(xid) + 1), pid, LONG_AGO, LONG_AGO))
        assert await other.fetchval("SELECT 1") == 1
        await world.ledger.end(HandlerTransaction(xid, pid, LONG_AGO, LONG_AGO))
        running = "SELECT count(*) = 0 FROM pg_stat_activity WHERE pid = $1"
        await until(lambda: world.database.fetchval(running, pid))
    finally:
        other.terminate()
    await world.database.fetch("SELECT FROM firstclaim.stripe_events FOR UPDATE")


# -- what the tables refuse ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ("status = 'done'", asyncpg.CheckViolationError),
        ("status = 'Pending'", asyncpg.CheckViolationError),
        ("attempt = -1", asyncpg.CheckViolationError),
        ("failures = -1", asyncpg.CheckViolationError),
        ("abandoned = -1", asyncpg.CheckViolationError),
        ("status = 'completed'", asyncpg.CheckViolationError),
        ("status = 'dead'", asyncpg.CheckViolationError),
        ("status = 'ignored'", asyncpg.CheckViolationError),
        ("settled_at = clock_timestamp()", asyncpg.CheckViolationError),
        ("due_at = NULL", asyncpg.NotNullViolationError),
        ("give_up_at = NULL", asyncpg.NotNullViolationError),
        ("status = NULL", asyncpg.NotNullViolationError),
        ("livemode = NULL", asyncpg.NotNullViolationError),
        ("event_id = NULL", asyncpg.NotNullViolationError),
    ],
)
async def test_the_table_refuses_states_that_cannot_be(
    world: World, change: str, error: type[asyncpg.PostgresError]
) -> None:
    """No other status, no negative count, nothing settled without its instant: for whoever writes by hand, too."""
    await world.claim()
    with pytest.raises(error):
        await world.database.execute(f"UPDATE firstclaim.stripe_events SET {change}")


async def test_there_is_one_row_per_event_and_one_epoch(world: World) -> None:
    """The primary keys that all of this rests on; ids are compared byte by byte."""
    claim = await world.claim(delivery("evt_a"))
    copy = "INSERT INTO firstclaim.stripe_events SELECT * FROM firstclaim.stripe_events"
    with pytest.raises(asyncpg.UniqueViolationError):
        await world.database.execute(copy)
    with pytest.raises(asyncpg.UniqueViolationError):
        await world.database.execute(
            "INSERT INTO firstclaim.ledger_epoch (id, rotated_at) VALUES (gen_random_uuid(), now())"
        )
    with pytest.raises(asyncpg.CheckViolationError):
        await world.database.execute("INSERT INTO firstclaim.ledger_epoch VALUES (false, gen_random_uuid(), now())")
    for other in ("evt_A", "evt_a.", "EVT_a"):
        assert isinstance(await world.ledger.claim(delivery(other)), Claim)
    assert await world.ledger.claim(same(claim)) == ExistingRow(Status.PROCESSING, 1, claim.epoch)


async def test_one_bad_statement_promises_nothing(world: World) -> None:
    """What Postgres refuses is `LedgerUnavailable`, without the value, and the next statement works."""
    given = delivery()
    too_long = Delivery(given.event, given.body)
    await world.database.execute(
        "ALTER TABLE firstclaim.stripe_event_payloads ADD CONSTRAINT none CHECK (octet_length(body) < 1)"
    )
    try:
        with pytest.raises(LedgerUnavailable) as refused:
            await world.ledger.claim(too_long)
        assert given.event.id not in str(refused.value)
        assert await world.ledger.find(given.event.id) is None
    finally:
        await world.database.execute("ALTER TABLE firstclaim.stripe_event_payloads DROP CONSTRAINT none")
    assert isinstance(await world.ledger.claim(given), Claim)


# -- helpers ------------------------------------------------------------------------------------------


def unchanged(before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Whether no column differs; how far instants are away does, a little."""
    return all(before[name] == after[name] for name in before if name not in ("due_in", "give_up_in"))


def same(claim: Claim) -> Delivery:
    """The delivery that was claimed, once more."""
    assert claim.body is not None
    return Delivery(parse_event(claim.body), claim.body)


async def stored_body(world: World, event_id: str) -> Any:
    return await world.database.fetchval(
        "SELECT body FROM firstclaim.stripe_event_payloads WHERE event_id = $1", event_id
    )


async def name_of(world: World) -> Any:
    return await world.database.fetchval("SELECT quote_ident(current_database())")


async def xid_of(connection: Any) -> Any:
    return await connection.fetchval("SELECT pg_current_xact_id()::text")


async def until_somebody_waits(world: World) -> None:
    """Until another session waits for a lock; each round is an answer of the server."""
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    await until(lambda: world.database.fetchval(waiting))
