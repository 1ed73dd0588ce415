"""Follow-ups on real stores: written with the handler's own COMMIT, once for each, and dispatched like events."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest
from sqlalchemy import text
from structlog.testing import capture_logs

from firstclaim import BatchContext, Context, Event, Permanent, Retry, TaskContext, on
from firstclaim.event import Delivery, parse_event
from firstclaim.follow_up import FOLLOW_UPS_MOST, follow_up_id
from firstclaim.inbox import attempt, enqueue
from firstclaim.outcome import Kind
from firstclaim.postgres import probe
from firstclaim.registry import Handler, handlers_of
from firstclaim.status import Status
from tests.fixtures import event_body
from tests.integration.conftest import MakeWorld
from tests.integration.test_pipeline import counting
from tests.integration.world import World, delivery, effect, effects, until

TYPE = "invoice.payment_failed"


def task(name: str, function: Callable[[TaskContext], Any]) -> Handler:
    return Handler(f"task:{name}", function, exclusive=True)


class Tasks:
    """What a task was called with."""

    def __init__(self, work: Callable[[TaskContext], None] | None = None) -> None:
        self.contexts: list[TaskContext] = []
        self._work = work

    async def run(self, context: TaskContext) -> str:
        self.contexts.append(context)
        await context.fetch(
            "INSERT INTO effects (event_id, attempt, pid, xid)"
            " VALUES ($1, $2, pg_backend_pid(), pg_current_xact_id()::text)",
            context.id,
            context.attempt,
        )
        if self._work is not None:
            self._work(context)
        return "sent"


async def recovered(world: World, *event_ids: str, status: Status = Status.COMPLETED) -> None:
    """Rounds of recovery, until these rows have the status."""

    async def settled() -> bool:
        await world.pipeline.recover(await world.ledger.survey())
        return all([await world.status(event_id) is status for event_id in event_ids])

    await until(settled)


async def follow_ups(world: World, parent_id: str) -> list[dict[str, Any]]:
    rows = await world.database.fetch(
        "SELECT *, extract(epoch FROM due_at - clock_timestamp())::float AS due_in,"
        " extract(epoch FROM give_up_at - due_at)::float AS give_up_after"
        " FROM firstclaim.stripe_events WHERE parent_id = $1 ORDER BY due_at, event_id",
        parent_id,
    )
    return [dict(row) for row in rows]


async def replayed(world: World, given: Delivery, status: Status = Status.PENDING) -> None:
    """The row is due again, whatever it was; its marker is gone."""
    await world.settle(given.event.id, status)
    await world.change(given.event.id, due_at=-1.0)


# -- one transaction ----------------------------------------------------------------------------------


async def enqueues(event: Event, context: Context) -> str:
    await effect(event, context)
    context.enqueue("send", {"invoice": event.object_id})
    return "recorded"


async def enqueues_through_sqlalchemy(event: Event, context: Context) -> str:
    async with context.session() as session:
        await session.execute(text("SELECT 1"))
        context.enqueue("send", {"invoice": event.object_id})
    return "recorded"


def enqueues_from_a_thread(event: Event, context: Context) -> str:
    context.execute(text("SELECT 1"))
    context.enqueue("send", {"invoice": event.object_id})
    return "recorded"


@pytest.mark.parametrize("handler", [enqueues, enqueues_through_sqlalchemy, enqueues_from_a_thread])
async def test_a_follow_up_is_written_and_run(make_world: MakeWorld, handler: Any) -> None:
    """Any kind of handler enqueues; the row is there with the completion, and its task gets what was enqueued."""
    tasks = Tasks()
    world = await make_world({TYPE: handler}, declared=[task("send", tasks.run)])
    given = delivery()
    assert (await world.pipeline.deliver(given)).kind is Kind.PROCESSED
    [row] = await follow_ups(world, given.event.id)
    assert (row["event_id"], row["type"]) == (follow_up_id(given.event.id, "task:send", 1), "task:send")
    assert (row["status"], row["attempt"], row["livemode"]) == (Status.PENDING, 0, given.event.livemode)
    assert row["give_up_after"] == pytest.approx(world.settings.give_up_seconds)
    await recovered(world, row["event_id"])
    [context] = tasks.contexts
    assert (context.id, context.name, context.payload) == (row["event_id"], "send", {"invoice": given.event.object_id})
    assert (context.event_id, context.parent_id, context.attempt) == (given.event.id, given.event.id, 1)
    assert (await world.row(row["event_id"]))["action"] == "sent"
    assert await world.effects(row["event_id"]) == 1


async def test_a_batch_handler_enqueues_for_each_event(make_world: MakeWorld) -> None:
    """The follow-ups of a batch belong to their events, and are written with the batch's COMMIT."""

    async def many(events: list[Event], context: BatchContext) -> None:
        await effects(events, context)
        for event in events:
            context.enqueue(event, "send", event.id)

    tasks = Tasks()
    world = await make_world({}, {TYPE: many}, declared=[task("send", tasks.run)])
    given = [delivery() for _ in range(3)]
    await asyncio.gather(*map(world.pipeline.deliver, given))
    ids = [(await follow_ups(world, each.event.id))[0]["event_id"] for each in given]
    await recovered(world, *ids)
    assert sorted(context.payload for context in tasks.contexts) == sorted(each.event.id for each in given)


async def test_a_batch_refuses_an_event_of_another(make_world: MakeWorld) -> None:
    """A follow-up of an event that this transaction does not hold could not be written in it."""
    other = delivery().event

    async def many(events: list[Event], context: BatchContext) -> None:
        with pytest.raises(ValueError, match="is not in this batch"):
            context.enqueue(other, "send")

    world = await make_world({}, {TYPE: many}, declared=[task("send", Tasks().run)])
    assert (await world.pipeline.deliver(delivery())).kind is Kind.PROCESSED


async def test_a_rolled_back_attempt_leaves_no_follow_up(make_world: MakeWorld) -> None:
    """Whatever the attempt has enqueued before it fails; the attempt that succeeds writes it, under the same id."""

    async def fails_first(event: Event, context: Context) -> None:
        context.enqueue("send", context.attempt)
        if context.attempt == 1:
            raise Retry("not yet", after=0)

    world = await make_world({TYPE: fails_first}, declared=[task("send", Tasks().run)])
    given = delivery()
    assert (await world.pipeline.deliver(given)).kind is Kind.FAILED
    assert await follow_ups(world, given.event.id) == []
    await recovered(world, given.event.id)
    assert [row["event_id"] for row in await follow_ups(world, given.event.id)] == [
        follow_up_id(given.event.id, "task:send", 1)
    ]


async def test_a_handler_that_ends_its_transaction_leaves_no_follow_up(make_world: MakeWorld) -> None:
    """After its own COMMIT the follow-up would be committed without the completion mark: the event is dead instead."""

    async def commits(event: Event, context: Context) -> None:
        context.enqueue("send")
        await context.fetch("COMMIT")

    world = await make_world({TYPE: commits}, declared=[task("send", Tasks().run)])
    given = delivery()
    await world.pipeline.deliver(given)
    assert await world.status(given.event.id) is Status.DEAD
    assert await follow_ups(world, given.event.id) == []


async def test_a_rolled_back_savepoint_forgets_its_follow_ups(make_world: MakeWorld) -> None:
    """What was enqueued in a savepoint goes with it, by SQL, `begin_nested` or a session; the rest stays."""

    async def partly(event: Event, context: Context) -> None:
        context.enqueue("send", "kept 1")
        await context.fetch("SAVEPOINT mine")
        context.enqueue("send", "lost")
        await context.fetch("ROLLBACK TO mine")
        with suppress(RuntimeError):
            async with context.connection.begin_nested():
                context.enqueue("send", "lost")
                raise RuntimeError
        with suppress(RuntimeError):
            async with context.session() as session:
                await session.execute(text("SELECT 1"))
                context.enqueue("send", "lost")
                raise RuntimeError
        context.enqueue("send", "kept 2")

    tasks = Tasks()
    world = await make_world({TYPE: partly}, declared=[task("send", tasks.run)])
    given = delivery()
    await world.pipeline.deliver(given)
    ids = [row["event_id"] for row in await follow_ups(world, given.event.id)]
    assert set(ids) == {follow_up_id(given.event.id, "task:send", number) for number in (1, 2)}
    await recovered(world, *ids)
    assert sorted(context.payload for context in tasks.contexts) == ["kept 1", "kept 2"]


async def test_a_swallowed_sql_error_still_fails(make_world: MakeWorld) -> None:
    """The follow-up's own statement meets the aborted transaction first: the rule is named as without one."""

    async def swallows(event: Event, context: Context) -> None:
        context.enqueue("send")
        with pytest.raises(Exception, match="division"):
            await context.fetch("SELECT 1 / 0")

    world = await make_world({TYPE: swallows}, declared=[task("send", Tasks().run)])
    given = delivery()
    assert (await world.pipeline.deliver(given)).kind is Kind.FAILED
    assert "swallowed an SQL error" in (await world.row(given.event.id))["last_error"]


# -- once ---------------------------------------------------------------------------------------------


async def test_a_replay_enqueues_nothing_twice(make_world: MakeWorld) -> None:
    """The handler runs again and its follow-up stays one row, which has run once; with `repeat` each run has one."""

    async def both(event: Event, context: Context) -> None:
        context.enqueue("send", "once")
        context.enqueue("send", "each time", repeat=True)

    tasks = Tasks()
    world = await make_world({TYPE: both}, declared=[task("send", tasks.run)])
    given = delivery()
    await world.pipeline.deliver(given)
    await recovered(world, *[row["event_id"] for row in await follow_ups(world, given.event.id)])
    await replayed(world, given)
    await recovered(world, given.event.id)
    rows = await follow_ups(world, given.event.id)
    await recovered(world, *[row["event_id"] for row in rows])
    assert sorted(context.payload for context in tasks.contexts) == ["each time", "each time", "once"]
    assert len(rows) == 3


async def test_a_task_enqueues_too(make_world: MakeWorld) -> None:
    """A task may enqueue itself: each run is a row of its own, and all go back to the event."""

    def again(context: TaskContext) -> None:
        if context.payload:
            context.enqueue("send", context.payload - 1)

    tasks = Tasks(again)

    async def starts(event: Event, context: Context) -> None:
        context.enqueue("send", 2)

    world = await make_world({TYPE: starts}, declared=[task("send", tasks.run)])
    given = delivery()
    await world.pipeline.deliver(given)
    parents = [given.event.id]
    for _ in range(3):
        [row] = await follow_ups(world, parents[-1])
        parents.append(row["event_id"])
        await recovered(world, parents[-1])
    assert await follow_ups(world, parents[-1]) == []
    assert [(context.payload, context.parent_id, context.id) for context in tasks.contexts] == [
        (2, parents[0], parents[1]),
        (1, parents[1], parents[2]),
        (0, parents[2], parents[3]),
    ]
    assert {context.event_id for context in tasks.contexts} == {given.event.id}


async def test_what_a_follow_up_costs(make_world: MakeWorld) -> None:
    """Any number of them is one statement in the handler's transaction; an event without one has none more."""

    async def handler(event: Event, context: Context) -> None:
        for number in range(event.data["object"]["attempt_count"]):
            context.enqueue("send", number)

    world = await make_world({TYPE: handler}, declared=[task("send", Tasks().run)])
    await world.pipeline.deliver(delivery())  # opens the connections
    for count, more in ((0, []), (1, ["WITH"]), (9, ["WITH"])):
        with counting(world) as counted:
            await world.pipeline.deliver(delivery(data={"object": {"attempt_count": count}}))
        assert counted == ["SET", "WITH", "EVAL", "begin SELECT", *more, "commit WITH"]


# -- when ---------------------------------------------------------------------------------------------


async def test_a_follow_up_waits_for_its_time(make_world: MakeWorld) -> None:
    """Seconds, a timedelta or an instant; what is in the past is due now; giving up counts from the due time."""
    at = datetime.now(UTC) + timedelta(days=30)

    async def later(event: Event, context: Context) -> None:
        context.enqueue("send", "past", at=datetime.now(UTC) - timedelta(days=1))
        context.enqueue("send", "seconds", after=100)
        context.enqueue("send", "timedelta", after=timedelta(hours=1))
        context.enqueue("send", "instant", at=at)

    tasks = Tasks()
    world = await make_world({TYPE: later}, declared=[task("send", tasks.run)])
    given = delivery()
    await world.pipeline.deliver(given)
    rows = await follow_ups(world, given.event.id)
    assert [row["due_in"] for row in rows] == pytest.approx([0, 100, 3600, 30 * 86_400], abs=20)
    assert rows[-1]["due_at"] == at
    assert {round(row["give_up_after"]) for row in rows} == {round(world.settings.give_up_seconds)}
    await recovered(world, rows[0]["event_id"])
    assert await world.pipeline.recover(await world.ledger.survey()) is False
    assert [context.payload for context in tasks.contexts] == ["past"]


@pytest.mark.parametrize("options", [{}, {"after": 60}], ids=["now", "later"])
async def test_recovery_is_woken_after_the_commit(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch, options: Any
) -> None:
    """For a follow-up that is due at once, as soon as it is committed and not before; for a later one not at all."""
    world: World

    async def handler(event: Event, context: Context) -> None:
        context.enqueue("send", **options)

    seen: list[bool] = []
    whole = enqueue.ENQUEUE

    class Spy:
        async def fetch(self, *arguments: Any, **values: Any) -> Any:
            rows = await whole.fetch(*arguments, **values)
            seen.append(world.slots.work.is_set())
            return rows

    monkeypatch.setattr(enqueue, "ENQUEUE", Spy())
    world = await make_world({TYPE: handler}, declared=[task("send", Tasks().run)])
    await world.pipeline.deliver(delivery())
    assert seen == [False]
    assert world.slots.work.is_set() is (not options)


# -- failures -----------------------------------------------------------------------------------------


async def test_a_task_retries_and_dies_by_itself(make_world: MakeWorld) -> None:
    """A task that fails is retried and counted as an event is; `Permanent` makes it dead; its event stays completed."""

    def fails(context: TaskContext) -> None:
        if context.attempt == 1:
            raise RuntimeError("no network")
        raise Permanent("no such address")

    world = await make_world({TYPE: enqueues}, declared=[task("send", Tasks(fails).run)])
    given = delivery()
    await world.pipeline.deliver(given)
    [row] = await follow_ups(world, given.event.id)
    await recovered(world, row["event_id"], status=Status.FAILED)
    assert (await world.row(row["event_id"]))["last_error"] == "RuntimeError: no network"
    await world.change(row["event_id"], due_at=-1.0)
    await recovered(world, row["event_id"], status=Status.DEAD)
    assert await world.status(given.event.id) is Status.COMPLETED
    assert await world.effects(row["event_id"]) == 0


async def test_a_body_that_is_no_tasks_makes_the_row_dead(make_world: MakeWorld) -> None:
    """What cannot be read is not run: the operator sees why."""
    world = await make_world({TYPE: enqueues}, declared=[task("send", Tasks().run)])
    given = delivery()
    await world.pipeline.deliver(given)
    [row] = await follow_ups(world, given.event.id)
    await world.database.execute(
        "UPDATE firstclaim.stripe_event_payloads SET body = $2 WHERE event_id = $1", row["event_id"], b'{"a": 1}'
    )
    await recovered(world, row["event_id"], status=Status.DEAD)
    assert "it is not the body of a task" in (await world.row(row["event_id"]))["last_error"]


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda context: context.enqueue("a b"), "expected the name of a task"),
        (lambda context: context.enqueue(7), "expected the name of a task"),
        (lambda context: context.enqueue("send", {"at": datetime.now(UTC)}), r"payload\['at'\] is a datetime"),
        (lambda context: context.enqueue("send", [{1: 2}]), r"payload\[0\] has the key 1, which is no str"),
        (lambda context: context.enqueue("send", float("nan")), "payload is nan, which JSON does not have"),
        (lambda context: context.enqueue("send", {"a": {1, 2}}), r"payload\['a'\] is a set"),
        (lambda context: context.enqueue("send", "x" * 65_536), r"may have 65,536: store what is large"),
        (lambda context: context.enqueue("send", after=-1), "expected seconds or a timedelta, from 0 to"),
        (lambda context: context.enqueue("send", after="soon"), "expected seconds or a timedelta"),
        (lambda context: context.enqueue("send", after=timedelta(days=400)), "366 days"),
        (lambda context: context.enqueue("send", at=datetime(2031, 1, 1)), "expected an aware datetime"),  # noqa: DTZ001
        (lambda context: context.enqueue("send", at=datetime(9000, 1, 1, tzinfo=UTC)), "within the next 366 days"),
        (lambda context: context.enqueue("send", after=1, at=datetime.now(UTC)), "not both"),
        (lambda context: [context.enqueue("send") for _ in range(FOLLOW_UPS_MOST + 1)], "one attempt may enqueue"),
    ],
)
async def test_what_cannot_be_enqueued_is_refused(make_world: MakeWorld, call: Any, error: str) -> None:
    """The call raises and says what was expected; nothing is written."""

    async def handler(event: Event, context: Context) -> None:
        with pytest.raises(Exception, match=error) as refused:
            call(context)
        raise Permanent(type(refused.value).__name__)

    world = await make_world({TYPE: handler}, declared=[task("send", Tasks().run)])
    given = delivery()
    assert (await world.pipeline.deliver(given)).kind is Kind.DEAD
    assert await follow_ups(world, given.event.id) == []


async def test_a_name_without_a_task_is_refused(make_world: MakeWorld) -> None:
    """No build may ever run it: the attempt fails with the name, and its retry may meet a build with the task."""

    async def handler(event: Event, context: Context) -> None:
        context.enqueue("other")

    world = await make_world({TYPE: handler}, declared=[task("send", Tasks().run)])
    given = delivery()
    assert (await world.pipeline.deliver(given)).kind is Kind.FAILED
    assert await follow_ups(world, given.event.id) == []
    assert (await world.row(given.event.id))["last_error"] == (
        'HandlerRuleBroken: enqueue("other"): no module of FIRSTCLAIM_HANDLERS declares @task("other") in this process '
        "(declared: send)"
    )


async def test_after_the_handler_has_ended_nothing_is_enqueued(make_world: MakeWorld) -> None:
    """A context that was kept enqueues nothing in another's transaction."""
    kept: list[Context] = []

    async def handler(event: Event, context: Context) -> None:
        kept.append(context)

    world = await make_world({TYPE: handler}, declared=[task("send", Tasks().run)])
    await world.pipeline.deliver(delivery())
    with pytest.raises(Exception, match="this handler has ended"):
        kept[0].enqueue("send")


# -- several builds -----------------------------------------------------------------------------------


async def test_a_build_without_the_task_leaves_its_rows_alone(make_world: MakeWorld) -> None:
    """Also a build with a handler for `*`: the row waits for a build that has the task."""
    tasks = Tasks()
    world = await make_world({TYPE: enqueues}, declared=[task("send", tasks.run)])
    other = await make_world({"*": effect})
    given = delivery()
    await world.pipeline.deliver(given)
    [row] = await follow_ups(world, given.event.id)
    assert await other.pipeline.recover(await other.ledger.survey()) is False
    assert await world.status(row["event_id"]) is Status.PENDING
    await recovered(world, row["event_id"])


# -- several handlers ---------------------------------------------------------------------------------


def named(name: str, function: Any, pattern: str = TYPE, **options: Any) -> Handler:
    return Handler(pattern, function, name=name, **options)


async def test_each_of_several_handlers_has_a_row(make_world: MakeWorld) -> None:
    """The answer rests on the rows of all; each completes, with an effect of its own, under a key of its own."""
    keys: list[str] = []

    async def one(event: Event, context: Context) -> str:
        await effect(event, context)
        keys.append(context.idempotency_key)
        return "one"

    def two(event: Event, context: Context) -> str:
        keys.append(context.idempotency_key)
        return "two"

    async def many(events: list[Event], context: BatchContext) -> str:
        await effects(events, context)
        return "many"

    declared = [named("one", one), named("crm:two", two), named("many", many, batch=True)]
    world = await make_world(declared=declared)
    given = delivery()
    answer = await world.pipeline.deliver(given)
    assert (answer.kind, answer.action) == (Kind.PROCESSED, "fanned_out")
    rows = {row["type"]: row["event_id"] for row in await follow_ups(world, given.event.id)}
    assert set(rows) == {"handler:one", "handler:crm:two", "handler:many"}
    assert world.slots.work.is_set()
    await recovered(world, *rows.values())
    assert await world.effects(given.event.id) == 2
    assert sorted(keys) == sorted([rows["handler:one"], rows["handler:crm:two"]])
    assert {(await world.row(each))["action"] for each in rows.values()} == {"one", "two", "many"}


async def test_several_handlers_of_a_batch_kind_gather(make_world: MakeWorld) -> None:
    """The rows of a batch handler beside others are dispatched together, each event once."""
    sizes: list[int] = []

    async def many(events: list[Event], context: BatchContext) -> None:
        sizes.append(len(events))
        assert set(context.attempts) == {event.id for event in events}
        await effects(events, context)

    async def one(event: Event, context: Context) -> None: ...

    world = await make_world(declared=[named("one", one), named("many", many, batch=True)])
    given = [delivery() for _ in range(12)]
    await asyncio.gather(*map(world.pipeline.deliver, given))
    await recovered(world, *[each.event.id for each in given])  # those that got no place
    ids = [row["event_id"] for each in given for row in await follow_ups(world, each.event.id)]
    await recovered(world, *ids)
    assert sum(sizes) == 12
    assert max(sizes) > 1
    assert all([await world.effects(each.event.id) == 1 for each in given])


async def test_several_handlers_fail_by_themselves(make_world: MakeWorld) -> None:
    """One dies, the other completes; a replay of the event runs neither again, one of the dead row runs that."""
    fails = True

    async def one(event: Event, context: Context) -> None:
        if fails:
            raise Permanent

    world = await make_world(declared=[named("one", one), named("two", effect)])
    given = delivery()
    await world.pipeline.deliver(given)
    rows = {row["type"]: row["event_id"] for row in await follow_ups(world, given.event.id)}
    await recovered(world, rows["handler:two"])
    await recovered(world, rows["handler:one"], status=Status.DEAD)
    await replayed(world, given)
    await recovered(world, given.event.id)
    assert await world.effects(given.event.id) == 1
    assert await world.status(rows["handler:one"]) is Status.DEAD
    fails = False
    await world.settle(rows["handler:one"], Status.PENDING)
    await world.change(rows["handler:one"], due_at=-1.0)
    await recovered(world, rows["handler:one"])


async def test_a_replay_reaches_a_handler_that_came_later(make_world: MakeWorld) -> None:
    """A replay of the event writes the rows that are missing, and no other."""
    before = await make_world(declared=[named("one", effect), named("two", effect)])
    given = delivery()
    await before.pipeline.deliver(given)
    await recovered(before, *[row["event_id"] for row in await follow_ups(before, given.event.id)])
    after = await make_world(declared=[named(name, effect) for name in ("one", "two", "three")])
    await replayed(after, given)
    await recovered(after, given.event.id)
    await recovered(after, *[row["event_id"] for row in await follow_ups(after, given.event.id)])
    assert await after.effects(given.event.id) == 3


async def test_the_rows_of_a_handler_that_is_gone_wait(make_world: MakeWorld) -> None:
    """A build without one of the handlers leaves its row alone, and still runs that of the one that it has."""
    both = await make_world(declared=[named("one", effect), named("two", effect)])
    given = delivery()
    await both.pipeline.deliver(given)
    rows = {row["type"]: row["event_id"] for row in await follow_ups(both, given.event.id)}
    single = await make_world(declared=[named("one", effect)])
    await recovered(single, rows["handler:one"])
    await single.pipeline.recover(await single.ledger.survey())
    assert await single.status(rows["handler:two"]) is Status.PENDING


async def test_rows_that_the_ledger_does_not_take(
    make_world: MakeWorld, module_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ledger has failed, and no handler: the log, the answer and the row say so, and a retry writes the rows."""
    async with locked(module_database) as lock:

        async def enqueue_in_vain(*arguments: Any, **options: Any) -> None:
            await lock()
            await enqueue.enqueue(*arguments, **options)

        async def run(event: Event, context: Context) -> None:
            await effect(event, context)

        world = await make_world(declared=[named("one", run), named("two", run)], postgres_timeout_seconds=2)
        monkeypatch.setattr(probe, "_LATE_SECONDS", 30)  # on a busy machine, commits would count as hanging
        monkeypatch.setattr(attempt, "enqueue", enqueue_in_vain)
        given = delivery()
        with capture_logs() as logged:
            answer = await world.pipeline.deliver(given)
    assert (answer.kind, answer.reason) == (Kind.FAILED, "The ledger failed; the event will be retried")
    row = await world.row(given.event.id)
    assert (row["status"], row["failures"], row["last_error"]) == (Status.FAILED, 1, "COMMIT failed: TimeoutError")
    names = [line["event"] for line in logged]
    assert "handler_failed" not in names
    assert "ledger_unavailable" in names
    attempts = await world.database.fetch("SELECT handler, error_class FROM firstclaim.stripe_event_attempts")
    assert [tuple(each) for each in attempts] == [(None, None)]
    monkeypatch.undo()
    assert (await world.pipeline.deliver(given)).action == "fanned_out"
    await recovered(world, *(each["event_id"] for each in await follow_ups(world, given.event.id)))
    assert await world.effects(given.event.id) == 2


@asynccontextmanager
async def locked(url: str) -> AsyncIterator[Callable[[], Awaitable[object]]]:
    """A function that locks the table of the payloads, until the end of the block."""
    connection = await asyncpg.connect(url)
    try:
        await connection.execute("BEGIN")
        yield lambda: connection.execute("LOCK TABLE firstclaim.stripe_event_payloads IN ACCESS EXCLUSIVE MODE")
    finally:
        await connection.close()


async def test_one_of_several_handlers_enqueues(make_world: MakeWorld) -> None:
    """Two handlers that enqueue the same task write two follow-ups, each below its handler's row."""
    tasks = Tasks()
    declared = [named("one", enqueues), named("two", enqueues), task("send", tasks.run)]
    world = await make_world(declared=declared)
    given = delivery()
    await world.pipeline.deliver(given)
    rows = [row["event_id"] for row in await follow_ups(world, given.event.id)]
    await recovered(world, *rows)
    ids = [row["event_id"] for parent in rows for row in await follow_ups(world, parent)]
    await recovered(world, *ids)
    assert len(set(ids)) == 2
    assert {context.event_id for context in tasks.contexts} == {given.event.id}
    assert {context.parent_id for context in tasks.contexts} == set(rows)


async def test_a_thin_event_reaches_each_handler_whole(make_world: MakeWorld) -> None:
    """Each handler gets the bytes that Stripe signed, parsed as for one handler."""
    seen: list[Event] = []

    async def keeps(event: Event, context: Context) -> None:
        seen.append(event)

    world = await make_world(declared=[named("one", keeps), named("two", keeps)])
    body = event_body(TYPE)
    given = Delivery(parse_event(body, "eu"), body, endpoint="eu")
    await world.pipeline.deliver(given)
    await recovered(world, *[row["event_id"] for row in await follow_ups(world, given.event.id)])
    assert seen == [given.event, given.event]
    assert [each.payload for each in seen] == [given.event.payload] * 2


async def test_one_of_several_handlers_keeps_its_key(make_world: MakeWorld) -> None:
    """The rows of a handler with `key` run one at a time, beside those of the other."""
    running = most = 0

    async def one(event: Event, context: Context) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await context.fetch("SELECT pg_sleep(0.05)")
        running -= 1

    on(TYPE, name="one", key="customer")(one)
    world = await make_world(declared=[*handlers_of(one), named("two", effect)])
    given = [delivery(data={"object": {"customer": "cus_1"}}) for _ in range(4)]
    for each in given:
        await world.pipeline.deliver(each)
    await recovered(world, *[row["event_id"] for each in given for row in await follow_ups(world, each.event.id)])
    assert most == 1
