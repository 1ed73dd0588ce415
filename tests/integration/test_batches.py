"""Batch handlers on real stores: what gathers together commits together, and what fails, fails alone."""

import asyncio
import random
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import asyncpg
import pytest
from sqlalchemy import text

from firstclaim import BatchContext, Context, Event, Permanent, Retry
from firstclaim.event import Delivery
from firstclaim.handlers.invoices import record_payment_failures
from firstclaim.inbox.batch_dispatch import Member
from firstclaim.inbox.claim import HandlerTransaction
from firstclaim.inbox.lanes import MAX_EVENTS, MAX_LANES, Lanes
from firstclaim.inbox.ledger import Ledger
from firstclaim.inbox.slots import Place
from firstclaim.inbox.statements import GOES_ALONE
from firstclaim.outcome import Kind, Outcome
from firstclaim.postgres.connection import PinnedConnection
from firstclaim.postgres.handler_connections import HandlerConnection
from firstclaim.postgres.statement import Statement
from firstclaim.status import Status
from tests.integration.conftest import MakeWorld
from tests.integration.world import World, delivery, due, effects, until

Function = Callable[[list[Event], BatchContext], Coroutine[Any, Any, Any]]


class Recorder:
    """The batches that a handler was called with, by event id."""

    def __init__(self, work: Function = effects) -> None:
        self.batches: list[list[str]] = []
        self._work = work

    @property
    def handler(self) -> Function:
        async def handler(events: list[Event], context: BatchContext) -> Any:
            self.batches.append([event.id for event in events])
            return await self._work(events, context)

        return handler

    @property
    def sizes(self) -> list[int]:
        return [len(batch) for batch in self.batches]


def lanes(world: World) -> Lanes:
    [found] = world.pipeline._batches
    return found


async def deliver(world: World, given: Sequence[Delivery]) -> list[Outcome]:
    """Deliver all of them at once: they are inserted together, so they gather."""
    return list(await asyncio.gather(*map(world.pipeline.deliver, given)))


def deliveries(count: int) -> list[Delivery]:
    return [delivery() for _ in range(count)]


def ids(given: Sequence[Delivery]) -> list[str]:
    return [each.event.id for each in given]


# -- one transaction ----------------------------------------------------------------------------------


async def test_what_gathers_commits_together(make_world: MakeWorld) -> None:
    """One call and one transaction for all; each event has its own action, and its marker after the COMMIT."""

    async def work(events: list[Event], context: BatchContext) -> list[str]:
        await effects(events, context)
        return [f"did {event.id}" for event in events]

    seen = Recorder(work)
    world = await make_world(batch_handlers={"*": seen.handler})
    given = deliveries(10)
    outcomes = await deliver(world, given)
    assert [(each.kind, each.action) for each in outcomes] == [
        (Kind.PROCESSED, f"did {event_id}") for event_id in ids(given)
    ]
    assert seen.sizes == [10]
    xids = await world.database.fetch("SELECT DISTINCT xid FROM effects WHERE event_id = ANY($1)", ids(given))
    assert len(xids) == 1
    for event_id in ids(given):
        row = await world.row(event_id)
        assert (row["status"], row["action"], row["attempt"]) == ("completed", f"did {event_id}", 1)
        assert await world.effects(event_id) == 1
        assert (await world.value(event_id) or b"").startswith(b"recorded:")


async def test_the_markers_come_after_the_commit(make_world: MakeWorld) -> None:
    """While the handler runs, the events have their locks, and no marker."""
    values: list[bytes | None] = []

    async def handler(events: list[Event], context: BatchContext) -> None:
        values.extend([await world.value(event.id) for event in events])

    world = await make_world(batch_handlers={"*": handler})
    given = deliveries(3)
    await deliver(world, given)
    assert [(value or b"")[:8] for value in values] == [b"claimed:"] * 3
    assert [(await world.value(event_id) or b"")[:9] for event_id in ids(given)] == [b"recorded:"] * 3


async def test_the_attempts_are_by_event(make_world: MakeWorld) -> None:
    """`context.attempts` has exactly the events of the batch."""
    seen: list[dict[str, int]] = []

    async def handler(events: list[Event], context: BatchContext) -> None:
        seen.append(dict(context.attempts))

    world = await make_world(batch_handlers={"*": handler})
    given = deliveries(3)
    await deliver(world, given)
    assert seen == [dict.fromkeys(ids(given), 1)]


async def test_a_sync_batch_handler(make_world: MakeWorld) -> None:
    """A plain function gets the list in a thread of its own, and its statements go into the one transaction."""
    sizes: list[int] = []

    def handler(events: list[Event], context: BatchContext) -> str:
        sizes.append(len(events))
        for event in events:
            context.execute(
                text(
                    "INSERT INTO effects (event_id, attempt, pid, xid) VALUES (:id, 1, 0, pg_current_xact_id()::text)"
                ),
                {"id": event.id},
            )
        return "written"

    world = await make_world(batch_handlers={"*": handler})
    given = deliveries(4)
    assert {(each.kind, each.action) for each in await deliver(world, given)} == {(Kind.PROCESSED, "written")}
    assert sizes == [4]
    assert [await world.effects(event_id) for event_id in ids(given)] == [1] * 4


@pytest.mark.parametrize("count", [2, 8, 32])
async def test_the_statements_of_a_batch_do_not_depend_on_its_size(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """A batch costs one insert, one transaction of three round trips, and one command for all markers."""
    sent: list[str] = []

    def noted(name: str) -> None:
        original = getattr(PinnedConnection, name)

        async def send(self: PinnedConnection, sql: str, *values: Any, **options: Any) -> Any:
            sent.append(name)
            return await original(self, sql, *values, **options)

        monkeypatch.setattr(PinnedConnection, name, send)

    async def handler(events: list[Event], context: BatchContext) -> None:
        await context.fetch("SELECT $1::text[]", [event.id for event in events])

    world = await make_world(batch_handlers={"*": handler})
    await deliver(world, deliveries(count))  # opens the connections
    commands: list[str] = []
    execute = world.redis_server._execute

    async def noted_command(name: str, *arguments: Any) -> Any:
        commands.append(name)
        return await execute(name, *arguments)

    monkeypatch.setattr(world.redis_server, "_execute", noted_command)
    for name in ("fetch", "execute", "begin", "commit"):
        noted(name)
    outcomes = await deliver(world, deliveries(count))
    assert {each.kind for each in outcomes} == {Kind.PROCESSED}
    assert sent == ["fetch", "begin", "fetch", "commit"]  # the insert, then the transaction around the handler's own
    assert commands.count("EVAL") == 1


def waiting_for(opened: asyncio.Event) -> Function:
    """A batch handler that returns once this is set."""

    async def work(events: list[Event], context: BatchContext) -> None:
        await opened.wait()

    return work


async def test_what_comes_while_the_lanes_are_busy_gathers(make_world: MakeWorld) -> None:
    """There are three lanes at most, each with one slot; what comes meanwhile is their next batch, of 64 at most."""
    opened = asyncio.Event()
    seen = Recorder(waiting_for(opened))
    world = await make_world(batch_handlers={"*": seen.handler}, handler_slots=20)
    running = []
    for count in range(1, MAX_LANES + 1):
        running += [asyncio.create_task(world.pipeline.deliver(each)) for each in deliveries(2)]
        await until(lambda count=count: _reached(seen.batches, count))  # type: ignore[misc]
    gathered = [asyncio.create_task(world.pipeline.deliver(each)) for each in deliveries(MAX_EVENTS + 6)]
    await until(lambda: _reached(lanes(world)._waiting, MAX_EVENTS + 6))
    assert seen.sizes == [2] * MAX_LANES
    opened.set()
    await asyncio.gather(*running, *gathered)
    assert sorted(seen.sizes) == [2] * MAX_LANES + [6, MAX_EVENTS]


async def test_more_than_a_batch_at_once_takes_further_lanes(make_world: MakeWorld) -> None:
    """What does not fit into a batch does not wait for it while another lane is free."""
    opened = asyncio.Event()
    seen = Recorder(waiting_for(opened))
    world = await make_world(batch_handlers={"*": seen.handler}, handler_slots=20)
    running = [asyncio.create_task(world.pipeline.deliver(each)) for each in deliveries(MAX_EVENTS + 5)]
    await until(lambda: _all_called(seen, MAX_EVENTS + 5))
    assert len(seen.sizes) > 1
    opened.set()
    await asyncio.gather(*running)


async def _all_called(seen: Recorder, count: int) -> bool:
    return sum(seen.sizes) == count


async def _reached(what: Any, count: int) -> bool:
    return len(what) >= count


async def test_a_single_event_waits_for_nobody(make_world: MakeWorld) -> None:
    """Alone, an event is handled at once, in a list of one."""
    seen = Recorder()
    world = await make_world(batch_handlers={"*": seen.handler})
    [result] = await deliver(world, deliveries(1))
    assert result.kind is Kind.PROCESSED
    assert seen.sizes == [1]


# -- who does not enter, and who leaves ---------------------------------------------------------------


async def test_what_was_taken_over_leaves_the_batch(make_world: MakeWorld) -> None:
    """A row that does not come back from the lock is not handled; the others of its batch are."""
    opened = asyncio.Event()

    async def work(events: list[Event], context: BatchContext) -> None:
        await opened.wait()
        await effects(events, context)

    seen = Recorder(work)
    world = await make_world(batch_handlers={"*": seen.handler}, handler_slots=1)
    first = asyncio.create_task(world.pipeline.deliver(delivery()))
    await until(lambda: _reached(seen.batches, 1))
    given = deliveries(3)
    waiting = [asyncio.create_task(world.pipeline.deliver(each)) for each in given]

    await until(lambda: _claimed(world, given))
    await world.change(ids(given)[1], attempt=2)  # another process has taken it over
    opened.set()
    outcomes = [await each for each in waiting]
    await first
    assert [each.kind for each in outcomes] == [Kind.PROCESSED, Kind.DUPLICATE, Kind.PROCESSED]
    assert seen.sizes == [1, 2]
    assert [await world.effects(event_id) for event_id in ids(given)] == [1, 0, 1]
    assert await world.status(ids(given)[1]) is Status.PROCESSING


async def _claimed(world: World, given: Sequence[Delivery]) -> bool:
    query = "SELECT count(*) FROM firstclaim.stripe_events WHERE event_id = ANY($1) AND status = 'processing'"
    return bool(await world.database.fetchval(query, ids(given)) == len(given))


@pytest.mark.parametrize(
    ("change", "count"),
    [({"abandoned": 1}, 1), ({"last_error": f"{GOES_ALONE}: ValueError"}, 2)],
    ids=["abandoned", "told"],
)
async def test_who_may_drag_others_along_goes_alone(make_world: MakeWorld, change: dict[str, Any], count: int) -> None:
    """Recovery feeds batches too, but not with events that were abandoned before, or whose batch has failed."""
    seen = Recorder()
    world = await make_world(batch_handlers={"*": seen.handler}, handler_slots=20)
    given = deliveries(6)
    for each in given:
        await world.state_of(each, Status.PENDING)
        await world.change(each.event.id, due_at=-1.0)
    abandoned_before = ids(given)[:count]
    for one in abandoned_before:
        await world.change(one, **change)
    await world.pipeline.recover()

    async def settled() -> bool:
        return not await due(world, 10) and {await world.status(each) for each in ids(given)} == {Status.COMPLETED}

    await until(settled)
    assert sorted(map(sorted, seen.batches)) == sorted(
        [sorted(ids(given)[count:]), *([each] for each in abandoned_before)]
    )


async def test_what_has_failed_gathers_with_its_like(make_world: MakeWorld) -> None:
    """After an outage all retries go in batches; the one that still fails drags along none that has not failed."""
    given = deliveries(9)
    again, fresh = ids(given)[:5], ids(given)[5:]
    poison = again[2]
    seen = Recorder(poisoned([poison], ValueError))
    world = await make_world(batch_handlers={"*": seen.handler}, handler_slots=20)
    for each in given:
        await world.state_of(each, Status.PENDING)
        await world.change(each.event.id, due_at=-1.0)
    for event_id in again:
        await world.change(event_id, failures=1, attempt=1, last_error="ValueError at x")
    await world.pipeline.recover()

    async def settled() -> bool:
        return not await due(world, 10) and Status.PROCESSING not in {await world.status(each) for each in ids(given)}

    await until(settled)
    assert sorted(map(sorted, seen.batches)) == sorted([sorted(again), sorted(fresh), *([each] for each in again)])
    for event_id in ids(given):
        row = await world.row(event_id)
        failed = event_id == poison
        assert (row["status"], row["failures"]) == (("failed", 2) if failed else ("completed", int(event_id in again)))


async def test_two_rows_of_an_event_are_in_different_batches(make_world: MakeWorld) -> None:
    """Of one handler, after a build with several: the handler's context knows events by their ids."""
    world = await make_world(batch_handlers={"*": Recorder().handler})
    one, other = delivery(), delivery()
    claims = [await world.claim(each) for each in (one, other)]
    members = [Member(claim, one.event, asyncio.get_running_loop()) for claim in claims]
    lanes(world)._waiting.extend(members)
    assert lanes(world)._take() == members[:1]
    assert lanes(world)._take() == members[1:]


async def test_an_abandoned_event_does_not_join(make_world: MakeWorld) -> None:
    """However a claim comes to the lanes: an event that was abandoned before goes alone."""
    seen = Recorder()
    world = await make_world(batch_handlers={"*": seen.handler})
    given = deliveries(3)
    claims = [await world.claim(each) for each in given]
    claims[1] = replace(claims[1], abandoned=1)
    places = lanes(world).places
    outcomes = await asyncio.gather(
        *(
            lanes(world).run(claim, each.event, Place(places, for_delivery=True))
            for claim, each in zip(claims, given, strict=True)
        )
    )
    assert {each.kind for each in outcomes} == {Kind.PROCESSED}
    assert sorted(map(sorted, seen.batches)) == sorted([[ids(given)[1]], sorted([ids(given)[0], ids(given)[2]])])


async def test_a_batch_handler_claims_no_more_than_its_lanes_can_run(make_world: MakeWorld) -> None:
    """A crash charges what is claimed: the next delivery is recorded, and left to recovery."""
    world = await make_world(batch_handlers={"*": Recorder().handler})
    places = lanes(world).places
    reserved = [places.reserve() for _ in range(MAX_LANES * MAX_EVENTS)]
    assert None not in reserved
    assert places.reserve() is None


# -- failures -----------------------------------------------------------------------------------------


def poisoned(poison: list[str], error: Callable[[], Exception]) -> Function:
    async def work(events: list[Event], context: BatchContext) -> None:
        await effects(events, context)
        if any(event.id in poison for event in events):
            raise error()

    return work


@pytest.mark.parametrize("error", [ValueError, Permanent], ids=["raises", "permanent"])
async def test_who_fails_fails_alone(make_world: MakeWorld, error: Callable[[], Exception]) -> None:
    """The batch is rolled back, then each goes alone: only the one that fails alone is charged."""
    given = deliveries(5)
    poison = ids(given)[2]
    seen = Recorder(poisoned([poison], error))
    world = await make_world(batch_handlers={"*": seen.handler})
    outcomes = await deliver(world, given)
    assert seen.sizes == [5] + [1] * 5
    for event_id, result in zip(ids(given), outcomes, strict=True):
        row = await world.row(event_id)
        if event_id == poison:
            assert result.kind is (Kind.DEAD if error is Permanent else Kind.FAILED)
            assert (row["failures"], await world.effects(event_id)) == (1, 0)
        else:
            assert result.kind is Kind.PROCESSED
            assert (row["status"], row["failures"], row["abandoned"]) == ("completed", 0, 0)
            assert (row["attempt"], row["last_error"]) == (1, None)
            assert await world.effects(event_id) == 1


async def test_what_goes_alone_says_so_to_other_processes(make_world: MakeWorld) -> None:
    """If the process ends before an event of a failed batch went alone, no process puts it into a batch again."""
    world = await make_world(batch_handlers={"*": effects})
    claims = [await world.claim(each) for each in deliveries(2)]
    ledger = lanes(world)._batches.ledger
    assert await ledger.renew_if_held(claims, f"{GOES_ALONE}: ValueError") == {claim.event_id for claim in claims}
    for claim in claims:
        await world.ledger.release_if_held(claim)
    taken = await world.ledger.take_over([claim.event_id for claim in claims])
    assert [claim.alone for claim in taken] == [True, True]
    assert [(claim.failures, claim.abandoned) for claim in taken] == [(0, 0), (0, 0)]


async def test_at_the_deadline_each_goes_alone(make_world: MakeWorld) -> None:
    """The deadline is the batch's; its backend is gone before its events are tried again."""

    async def work(events: list[Event], context: BatchContext) -> None:
        await effects(events, context)
        if len(events) > 1:
            await context.fetch("SELECT pg_sleep(60)")

    seen = Recorder(work)
    world = await make_world(batch_handlers={"*": seen.handler}, handler_deadline_seconds=0.5)
    given = deliveries(3)
    assert {each.kind for each in await deliver(world, given)} == {Kind.PROCESSED}
    assert seen.sizes == [3, 1, 1, 1]
    assert [await world.effects(event_id) for event_id in ids(given)] == [1, 1, 1]
    assert {(await world.row(event_id))["failures"] for event_id in ids(given)} == {0}


async def test_a_swallowed_sql_error_fails_the_batch(make_world: MakeWorld) -> None:
    """Nothing of an aborted transaction is completed."""

    async def work(events: list[Event], context: BatchContext) -> None:
        await effects(events, context)
        if len(events) > 1:
            with suppress(Exception):
                await context.fetch("SELECT 1 / 0")

    seen = Recorder(work)
    world = await make_world(batch_handlers={"*": seen.handler})
    given = deliveries(3)
    assert {each.kind for each in await deliver(world, given)} == {Kind.PROCESSED}
    assert seen.sizes == [3, 1, 1, 1]
    assert [await world.effects(event_id) for event_id in ids(given)] == [1, 1, 1]


async def test_a_short_mark_fails_the_batch(make_world: MakeWorld) -> None:
    """The marks must be as many as the rows that were locked, or nothing is committed."""

    async def work(events: list[Event], context: BatchContext) -> None:
        await effects(events, context)
        if len(events) > 1:
            await context.fetch(
                "UPDATE firstclaim.stripe_events SET attempt = attempt + 1 WHERE event_id = $1", events[0].id
            )

    seen = Recorder(work)
    world = await make_world(batch_handlers={"*": seen.handler})
    given = deliveries(3)
    assert {each.kind for each in await deliver(world, given)} == {Kind.PROCESSED}
    assert seen.sizes == [3, 1, 1, 1]
    assert [await world.effects(event_id) for event_id in ids(given)] == [1, 1, 1]


@pytest.mark.parametrize("result", [["a"], ["a"] * 4, [1, 2, 3]], ids=["too-few", "too-many", "no-actions"])
async def test_a_list_of_actions_must_fit(make_world: MakeWorld, result: list[Any]) -> None:
    """One action for each event, in a list as long as the batch; else nothing is committed."""

    async def work(events: list[Event], context: BatchContext) -> Any:
        await effects(events, context)
        return result if len(events) > 1 else "alone"

    seen = Recorder(work)
    world = await make_world(batch_handlers={"*": seen.handler})
    given = deliveries(3)
    assert {each.action for each in await deliver(world, given)} == {"alone"}
    assert seen.sizes == [3, 1, 1, 1]


async def test_retry_moves_the_whole_batch_uncharged(make_world: MakeWorld) -> None:
    """`Retry` makes all due later, charges nobody, and lets them enter a batch again."""
    seen = Recorder(poisoned_always(lambda: Retry(after=600)))
    world = await make_world(batch_handlers={"*": seen.handler})
    given = deliveries(4)
    assert {each.kind for each in await deliver(world, given)} == {Kind.FAILED}
    assert seen.sizes == [4]
    for event_id in ids(given):
        row = await world.row(event_id)
        assert (row["status"], row["failures"], row["abandoned"], row["last_error"]) == ("pending", 0, 0, None)
        assert 590 < row["due_in"] <= 600
        assert await world.effects(event_id) == 0
        assert await world.value(event_id) is None  # the next delivery reaches the ledger


async def test_retry_past_the_time_to_give_up_is_the_end(make_world: MakeWorld) -> None:
    """A batch that is moved for ever would never be given up on, because nobody is charged."""
    seen = Recorder(poisoned_always(Retry))
    world = await make_world(batch_handlers={"*": seen.handler}, give_up_seconds=0.0)
    given = deliveries(2)
    assert {each.kind for each in await deliver(world, given)} == {Kind.FAILED}
    assert {await world.status(event_id) for event_id in ids(given)} == {Status.DEAD}


def poisoned_always(error: Callable[[], Exception]) -> Function:
    async def work(events: list[Event], context: BatchContext) -> None:
        await effects(events, context)
        raise error()

    return work


async def test_a_deadlock_is_tried_again_at_half_the_size(make_world: MakeWorld) -> None:
    """Nobody is guilty of a deadlock or a serialization failure: nobody is charged, and nobody is marked."""

    async def work(events: list[Event], context: BatchContext) -> None:
        await effects(events, context)
        if len(events) > 2:
            await context.fetch("DO $$BEGIN RAISE EXCEPTION 'deadlock detected' USING ERRCODE = '40P01'; END$$")

    seen = Recorder(work)
    world = await make_world(batch_handlers={"*": seen.handler})
    given = deliveries(8)
    assert {each.kind for each in await deliver(world, given)} == {Kind.PROCESSED}
    assert seen.sizes == [8, 4, 2, 2, 4, 2, 2]
    assert [await world.effects(event_id) for event_id in ids(given)] == [1] * 8
    assert {(await world.row(event_id))["failures"] for event_id in ids(given)} == {0}


async def test_a_slow_half_keeps_no_leases(make_world: MakeWorld) -> None:
    """The second half waits for the first: once half of its lease is over, it is released, as whatever waits is."""

    async def work(events: list[Event], context: BatchContext) -> None:
        if len(seen.batches) == 1:
            raise asyncpg.DeadlockDetectedError
        mates = set(ids(given)) - {event.id for event in events}
        await until(lambda: _half_over(mates))

    async def _half_over(mates: set[str]) -> bool:
        return all([(await world.row(event_id))["due_in"] < 0.4 for event_id in mates])

    seen = Recorder(work)
    world = await make_world(batch_handlers={"*": seen.handler}, lease_seconds=1.0, answer_budget_seconds=20.0)
    given = deliveries(4)
    kinds = [each.kind for each in await deliver(world, given)]
    assert sorted(kinds) == [Kind.DEFERRED] * 2 + [Kind.PROCESSED] * 2
    assert seen.sizes == [4, 2]
    for event_id in ids(given):
        row = await world.row(event_id)
        assert (row["status"] in ("completed", "pending"), row["failures"], row["abandoned"]) == (True, 0, 0)


async def test_a_failed_half_does_not_wait_for_the_other(make_world: MakeWorld) -> None:
    """Its events go alone at once: while the other half runs, their leases would end, and each would be charged."""

    async def work(events: list[Event], context: BatchContext) -> None:
        if len(events) == 4:
            raise asyncpg.DeadlockDetectedError
        if set(ids(given[:2])) == {event.id for event in events}:
            raise ValueError
        if len(events) == 2:
            await until(_others_are_completed)
        await effects(events, context)

    async def _others_are_completed() -> bool:
        return [await world.status(event_id) for event_id in ids(given[:2])] == [Status.COMPLETED] * 2

    seen = Recorder(work)
    world = await make_world(batch_handlers={"*": seen.handler})
    given = sorted(deliveries(4), key=lambda each: each.event.id)
    assert {each.kind for each in await deliver(world, given)} == {Kind.PROCESSED}
    assert sorted(seen.sizes) == [1, 1, 2, 2, 4]


async def test_a_stop_while_one_half_runs_and_the_other_goes_alone(make_world: MakeWorld) -> None:
    """Each is released once, by who runs it: what goes alone has left the batch."""
    running: list[int] = []

    async def work(events: list[Event], context: BatchContext) -> None:
        if len(events) == 4:
            raise asyncpg.DeadlockDetectedError
        if set(ids(given[:2])) == {event.id for event in events}:
            raise ValueError
        await effects(events, context)
        running.append(len(events))
        await asyncio.Event().wait()

    async def _all_run() -> bool:
        return sorted(running) == [1, 1, 2]

    world = await make_world(batch_handlers={"*": work})
    given = sorted(deliveries(4), key=lambda each: each.event.id)
    delivering = asyncio.create_task(deliver(world, given))
    await until(_all_run)
    await world.pipeline.drain(0)
    await delivering
    for event_id in ids(given):
        row = await world.row(event_id)
        assert (row["status"], row["failures"], row["abandoned"]) == ("pending", 0, 0)
        assert await world.effects(event_id) == 0


@pytest.mark.parametrize("statements", [["COMMIT"], ["COMMIT", "BEGIN"]], ids=" ".join)
async def test_an_own_commit_kills_the_whole_batch(make_world: MakeWorld, statements: list[str]) -> None:
    """What the handler committed is kept, so no event of the batch may be tried again by itself."""

    async def work(events: list[Event], context: BatchContext) -> None:
        await effects(events, context)
        for statement in statements:
            await context.fetch(statement)

    seen = Recorder(work)
    world = await make_world(batch_handlers={"*": seen.handler})
    given = deliveries(3)
    assert {each.kind for each in await deliver(world, given)} == {Kind.FAILED}
    assert seen.sizes == [3]
    for event_id in ids(given):
        row = await world.row(event_id)
        assert row["status"] == "dead"
        assert row["last_error"].startswith("rule broken: a handler must not commit")


async def test_a_copy_of_an_event_in_a_batch_is_a_duplicate(make_world: MakeWorld) -> None:
    """The row of the first is committed, so a copy is promised nothing that does not hold; no statement is sent."""
    opened = asyncio.Event()

    async def handler(events: list[Event], context: BatchContext) -> None:
        await opened.wait()

    world = await make_world(batch_handlers={"*": handler})
    given = delivery()
    first = asyncio.create_task(world.pipeline.deliver(given))
    await until(lambda: _running(world))
    assert (await world.pipeline.deliver(given)).kind is Kind.DUPLICATE
    opened.set()
    assert (await first).kind is Kind.PROCESSED
    assert (await world.pipeline.deliver(given)).kind is Kind.DUPLICATE


async def _running(world: World) -> bool:
    return bool(world.components.transaction_watch.calls)


# -- shutdown -----------------------------------------------------------------------------------------


async def test_a_shutdown_releases_the_batch_and_what_waits(make_world: MakeWorld) -> None:
    """Nobody is charged for a shutdown: neither the events of the running batch nor those that wait for a lane."""

    async def work(events: list[Event], context: BatchContext) -> None:
        await effects(events, context)
        await asyncio.Event().wait()

    seen = Recorder(work)
    world = await make_world(batch_handlers={"*": seen.handler}, handler_slots=1)
    given = deliveries(4)
    running = [asyncio.create_task(world.pipeline.deliver(each)) for each in given]
    await until(lambda: _running(world))
    late = deliveries(3)
    running += [asyncio.create_task(world.pipeline.deliver(each)) for each in late]
    await until(lambda: _claimed(world, late))
    await world.pipeline.drain(0)
    await asyncio.gather(*running)
    for event_id in ids([*given, *late]):
        row = await world.row(event_id)
        assert (row["status"], row["failures"], row["abandoned"]) == ("pending", 0, 0)
        assert await world.effects(event_id) == 0
        assert await world.value(event_id) is None


async def test_the_waits_for_a_lane_and_for_a_slot_are_one(make_world: MakeWorld) -> None:
    """One event alone in its lane: at half of its lease it is released, however much of it the lane has taken."""
    opened = asyncio.Event()

    async def work(events: list[Event], context: BatchContext) -> None:
        await opened.wait()

    seen = Recorder(work)
    world = await make_world(batch_handlers={"*": seen.handler}, lease_seconds=2.0, handler_slots=MAX_LANES)
    running = []
    for count in range(1, MAX_LANES + 1):
        running.append(asyncio.create_task(world.pipeline.deliver(delivery())))
        await until(lambda count=count: _begun(seen, count))  # type: ignore[misc]
    late = delivery()
    waiting = asyncio.create_task(world.pipeline.deliver(late))
    await until(lambda: _due_within(world, late, 1.3))
    others = [Place(world.slots, for_delivery=True) for _ in range(MAX_LANES)]  # who has waited for the slots before
    entering = [asyncio.create_task(each.enter(previously_abandoned=False, timeout_seconds=20.0)) for each in others]
    await asyncio.sleep(0)
    opened.set()
    assert await asyncio.gather(*entering) == [True] * MAX_LANES
    try:
        assert (await asyncio.wait_for(waiting, 5)).kind is Kind.DEFERRED
        row = await world.row(late.event.id)
        assert (row["status"], row["abandoned"]) == ("pending", 0)
        assert row["due_in"] > -0.9  # released long before the end of its lease, now or a moment ago
        assert await world.database.fetchval(
            "SELECT clock_timestamp() - claimed_at < '1.7s' FROM firstclaim.stripe_events WHERE event_id = $1",
            late.event.id,
        )
    finally:
        for each in others:
            each.release()
    await asyncio.gather(*running)


async def _begun(seen: Recorder, count: int) -> bool:
    return len(seen.batches) == count


async def _due_within(world: World, given: Delivery, seconds: float) -> bool:
    found = await world.database.fetchval(
        "SELECT due_at < clock_timestamp() + make_interval(secs => $2) FROM firstclaim.stripe_events"
        " WHERE event_id = $1",
        given.event.id,
        seconds,
    )
    return bool(found)


@pytest.mark.parametrize("error", [ValueError, asyncpg.DeadlockDetectedError])
async def test_a_shutdown_while_a_failed_batch_ends(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """The end of the attempt takes no notice of it, but nothing runs again, whole or in halves: all are released."""
    drains: list[asyncio.Task[None]] = []
    committed = Ledger.committed

    async def interrupted(ledger: Ledger, transaction: HandlerTransaction) -> bool:
        if not drains:
            drains.append(asyncio.create_task(world.pipeline.drain(0)))
            await asyncio.Event().wait()
        return await committed(ledger, transaction)

    async def work(events: list[Event], context: BatchContext) -> None:
        if len(seen.sizes) == 1:
            raise error

    seen = Recorder(work)
    world = await make_world(batch_handlers={"*": seen.handler})
    monkeypatch.setattr(Ledger, "committed", interrupted)
    given = deliveries(3)
    await deliver(world, given)
    await drains[0]
    assert seen.sizes == [3]
    for event_id in ids(given):
        row = await world.row(event_id)
        assert (row["status"], row["failures"], row["abandoned"]) == ("pending", 0, 0)


async def test_what_waits_for_half_its_lease_is_released(make_world: MakeWorld) -> None:
    """A claim that no lane takes in time is left to the next process, uncharged."""
    opened = asyncio.Event()

    async def work(events: list[Event], context: BatchContext) -> None:
        await opened.wait()

    seen = Recorder(work)
    world = await make_world(batch_handlers={"*": seen.handler}, lease_seconds=1.0, answer_budget_seconds=3.0)
    running = []
    for count in range(1, MAX_LANES + 1):
        running.append(asyncio.create_task(world.pipeline.deliver(delivery())))
        await until(lambda count=count: _reached(seen.batches, count))  # type: ignore[misc]
    given = deliveries(2)
    assert {each.kind for each in await deliver(world, given)} == {Kind.DEFERRED}
    for event_id in ids(given):
        row = await world.row(event_id)
        assert (row["status"], row["failures"], row["abandoned"]) == ("pending", 0, 0)
    opened.set()
    await asyncio.gather(*running)


async def test_a_batch_that_gets_no_slot_is_released(make_world: MakeWorld) -> None:
    """The same of a batch whose lane waits for a slot, because other handlers have them all."""
    opened = asyncio.Event()

    async def busy(event: Event, context: Context) -> None:
        await opened.wait()

    seen = Recorder()
    world = await make_world(
        {"charge.refunded": busy}, {"*": seen.handler}, handler_slots=1, lease_seconds=1.0, answer_budget_seconds=3.0
    )
    first = asyncio.create_task(world.pipeline.deliver(delivery(type="charge.refunded")))
    await until(lambda: _running(world))
    given = deliveries(3)
    assert {each.kind for each in await deliver(world, given)} == {Kind.DEFERRED}
    assert {await world.status(event_id) for event_id in ids(given)} == {Status.PENDING}
    assert seen.sizes == []
    opened.set()
    await first


# -- a COMMIT whose answer is lost, and two processes -------------------------------------------------


@pytest.mark.parametrize("arrived", [True, False], ids=["committed", "lost"])
async def test_an_unknown_commit_is_settled_row_by_row(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch, arrived: bool
) -> None:
    """The guarded update says of each row what became of it: nothing is done twice, and nothing is promised wrongly."""
    commit = HandlerConnection.commit

    async def lost(connection: HandlerConnection, last: Statement, **values: object) -> None:
        if arrived:
            await commit(connection, last, **values)
        raise ConnectionResetError

    world = await make_world(batch_handlers={"*": effects})
    given = deliveries(3)
    with monkeypatch.context() as patch:
        patch.setattr(HandlerConnection, "commit", lost)
        outcomes = await deliver(world, given)
    assert {each.kind for each in outcomes} == {Kind.PROCESSED if arrived else Kind.FAILED}
    for event_id in ids(given):
        assert await world.status(event_id) is (Status.COMPLETED if arrived else Status.FAILED)
        assert await world.effects(event_id) == (1 if arrived else 0)
        assert (await world.value(event_id) is None) is not arrived


async def test_a_commit_that_fails_charges_only_its_cause(make_world: MakeWorld) -> None:
    """A constraint that is deferred to COMMIT fails the batch there: each goes alone, and one is charged."""
    given = deliveries(4)
    cause = ids(given)[1]

    async def work(events: list[Event], context: BatchContext) -> None:
        await effects(events, context)
        await context.fetch("CREATE TEMP TABLE once (id int UNIQUE DEFERRABLE INITIALLY DEFERRED) ON COMMIT DROP")
        for event in events:
            if event.id == cause:
                await context.fetch("INSERT INTO once VALUES (1), (1)")

    seen = Recorder(work)
    world = await make_world(batch_handlers={"*": seen.handler})
    kinds = [each.kind for each in await deliver(world, given)]
    assert kinds == [Kind.FAILED if event_id == cause else Kind.PROCESSED for event_id in ids(given)]
    assert seen.sizes == [4, 1, 1, 1, 1]
    for event_id in ids(given):
        row = await world.row(event_id)
        failed = event_id == cause
        assert (row["status"], row["failures"]) == (("failed", 1) if failed else ("completed", 0))
        assert await world.effects(event_id) == (0 if failed else 1)


async def test_two_processes_over_the_same_invoices(make_world: MakeWorld) -> None:
    """The shipped handler sorts its keys: batches of two processes that meet at the same invoices do not deadlock."""
    handler = Recorder(record_payment_failures)
    worlds = [await make_world(batch_handlers={"*": handler.handler}) for _ in range(2)]
    invoices = [f"in_{number}" for number in range(20)]

    def shuffled(count: int) -> list[Delivery]:
        return [
            delivery(data={"object": {"id": invoice, "attempt_count": count}})
            for invoice in random.sample(invoices, len(invoices))
        ]

    for count in range(1, 6):
        outcomes = await asyncio.gather(*(deliver(world, shuffled(count)) for world in worlds))
        assert {each.kind for some in outcomes for each in some} == {Kind.PROCESSED}
    counts = await worlds[0].database.fetch("SELECT DISTINCT attempt_count FROM payment_failures")
    assert [row["attempt_count"] for row in counts] == [5]
    failed = "SELECT count(*) FROM firstclaim.stripe_events WHERE failures > 0 OR attempt > 1"
    assert await worlds[0].database.fetchval(failed) == 0
