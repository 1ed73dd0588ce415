"""Handlers that end their transaction and go on, and handlers that only seem to: what the watch makes of them."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from firstclaim import Context, Event
from firstclaim.errors import HandlerRuleBroken
from firstclaim.inbox.claim import HandlerTransaction
from firstclaim.inbox.transaction_watch import TransactionWatch
from firstclaim.outcome import Kind
from firstclaim.shutdown import Shutdown
from firstclaim.status import Status
from tests.integration.conftest import MakeWorld
from tests.integration.world import Function, World, delivery, effect, effect_from_thread, until

SECONDS = 20
# Short enough for many looks in a test: the period is a quarter of the first backoff.
BACKOFF_SECONDS = 0.2


class Looks:
    """The looks of a process at its handlers' transactions: how many there were, and at how many at once."""

    def __init__(self, watch: TransactionWatch) -> None:
        self.sizes: list[int] = []
        self._look = watch._look
        watch._look = self._counted  # type: ignore[method-assign]

    async def _counted(self, transactions: list[HandlerTransaction]) -> None:
        await self._look(transactions)
        self.sizes.append(len(transactions))

    async def more(self, count: int = 3) -> None:
        """Wait for `count` further looks."""
        target = len(self.sizes) + count

        async def seen() -> bool:
            return len(self.sizes) >= target

        await until(seen)


@asynccontextmanager
async def watched(world: World) -> AsyncIterator[Looks]:
    """The world's transactions are watched while the block runs, which has a time limit."""
    looks = Looks(world.components.transaction_watch)
    watching = asyncio.create_task(world.components.transaction_watch.run())
    try:
        async with asyncio.timeout(SECONDS):
            yield looks
    finally:
        watching.cancel()
        await asyncio.wait({watching})


@pytest.fixture
async def hasty(make_world: MakeWorld) -> World:
    """A process that looks often."""
    return await make_world(backoff_first_seconds=BACKOFF_SECONDS)


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Holds a thread until it is set; set at the end in any case."""
    gate = threading.Event()
    yield gate
    gate.set()


async def is_dead(world: World, function: Function) -> str:
    """Dispatch a claim to `function`: answered as failed, dead with the rule's name, one failure. Returns its id."""
    claim = await world.marked()
    result = await world.dispatch(function, claim)
    row = await world.row(claim.event_id)
    assert (result.kind, row["status"]) == (Kind.FAILED, Status.DEAD), row["last_error"]
    assert (row["attempt"], row["failures"], row["abandoned"]) == (1, 1, 0)
    assert "a handler must not commit, nor end its transaction" in row["last_error"]
    return claim.event_id


async def fails(world: World, function: Function, error: str) -> None:
    """Dispatch a claim to `function`: failed, to be tried again, and nothing of it is kept."""
    claim = await world.marked()
    result = await world.dispatch(function, claim)
    row = await world.row(claim.event_id)
    assert (result.kind, row["status"], row["failures"]) == (Kind.FAILED, Status.FAILED, 1), row["last_error"]
    assert error in row["last_error"]
    assert await world.effects(claim.event_id) == 0


async def still_works(world: World) -> None:
    """Every connection of the handlers' pool carries the next events."""
    claims = [await world.claim() for _ in range(world.settings.handler_slots)]
    results = await asyncio.gather(*(world.dispatch(effect, claim) for claim in claims))
    assert {result.kind for result in results} == {Kind.PROCESSED}


# -- it ends its transaction --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "statements",
    [("COMMIT",), ("COMMIT AND CHAIN",), ("COMMIT", "BEGIN"), ("ROLLBACK",), ("ROLLBACK", "BEGIN")],
    ids="/".join,
)
async def test_an_own_end_is_detected_while_the_handler_runs(hasty: World, statements: tuple[str, ...]) -> None:
    """Dead and answered before its end: the handler is cancelled, and cannot write on its connection any more."""
    refused: list[SQLAlchemyError] = []

    async def function(event: Event, context: Context) -> None:
        connection = context.connection
        await effect(event, context)
        for statement in statements:
            await connection.execute(text(statement))
        try:
            await asyncio.Event().wait()
        finally:
            try:
                await effect(event, context, connection)
            except SQLAlchemyError as error:
                refused.append(error)

    async with watched(hasty):
        event_id = await is_dead(hasty, function)
        await until(lambda: has_free_slots(hasty))
        assert len(refused) == 1
        assert await hasty.effects(event_id) == statements[0].startswith("COMMIT")
        await still_works(hasty)


async def has_free_slots(world: World) -> bool:
    return world.slots.free == world.settings.handler_slots


async def test_an_own_end_is_detected_while_a_statement_runs(hasty: World) -> None:
    """Also while the handler's connection is busy, outside of any transaction."""

    async def function(event: Event, context: Context) -> None:
        await effect(event, context)
        await context.connection.execute(text("COMMIT"))
        await context.connection.execute(text("SELECT pg_sleep(60)"))

    async with watched(hasty):
        assert await hasty.effects(await is_dead(hasty, function)) == 1


async def test_an_own_end_of_a_thread_is_detected_while_it_runs(hasty: World, gate: threading.Event) -> None:
    """Dead and answered at once; the thread keeps its slot until it returns, and can write nothing more."""
    refused: list[HandlerRuleBroken] = []

    def function(event: Event, context: Context) -> None:
        effect_from_thread(event, context)
        context.execute(text("COMMIT"))
        gate.wait(SECONDS)
        try:
            effect_from_thread(event, context)
        except HandlerRuleBroken as error:
            refused.append(error)

    async with watched(hasty):
        event_id = await is_dead(hasty, function)
        assert hasty.slots.free == hasty.settings.handler_slots - 1
        gate.set()
        await until(lambda: has_free_slots(hasty))
    assert len(refused) == 1
    assert await hasty.effects(event_id) == 1


async def test_a_thread_that_never_returns_after_its_own_end_is_hung(
    make_world: MakeWorld, gate: threading.Event
) -> None:
    """Once its deadline has passed too: readiness names it, as any other thread that keeps its slot."""
    world = await make_world(backoff_first_seconds=BACKOFF_SECONDS, handler_deadline_seconds=1.0)

    def function(event: Event, context: Context) -> None:
        effect_from_thread(event, context)
        context.execute(text("COMMIT"))
        gate.wait(SECONDS)

    async def hangs() -> bool:
        return list(world.slots.hung) == [event_id]

    async with watched(world):
        event_id = await is_dead(world, function)
        assert not world.slots.hung
        await until(hangs)
        gate.set()
        await until(lambda: has_free_slots(world))
    assert not world.slots.hung


async def test_a_handler_past_its_lease_is_killed_and_not_run_again(make_world: MakeWorld) -> None:
    """Another process returns the row once its lock is gone with the COMMIT: it is taken back, dead, and not taken."""
    world, other = await make_world(lease_seconds=0.5), await make_world()
    claim = await world.marked()

    async def function(event: Event, context: Context) -> None:
        await effect(event, context)
        await until(is_past_its_lease)
        await context.connection.execute(text("COMMIT"))
        await other.pipeline.return_abandoned(10)
        assert await world.status(claim.event_id) is Status.PENDING
        await asyncio.Event().wait()

    async def is_past_its_lease() -> bool:
        return bool((await world.row(claim.event_id))["due_in"] < 0)

    async with watched(world):
        assert (await world.dispatch(function, claim)).kind is Kind.FAILED
    row = await world.row(claim.event_id)
    assert (row["status"], row["attempt"], row["abandoned"], row["failures"]) == ("dead", 1, 0, 1)
    await other.pipeline.return_abandoned(10)
    assert await other.ledger.take_over([claim.event_id]) == []


async def test_handlers_are_watched_during_a_drain(make_world: MakeWorld) -> None:
    """A shutdown waits for running handlers: one that ends its transaction meanwhile ends the wait, and is dead."""
    started, draining, given = asyncio.Event(), asyncio.Event(), delivery()

    async def function(event: Event, context: Context) -> None:
        await effect(event, context)
        started.set()
        await draining.wait()
        await context.connection.execute(text("COMMIT"))
        await asyncio.Event().wait()

    world = await make_world({"*": function}, backoff_first_seconds=BACKOFF_SECONDS)
    async with asyncio.timeout(SECONDS):
        async with world.components.running(Shutdown(drain_seconds=0, shutdown_seconds=10 * SECONDS)):
            delivering = asyncio.create_task(world.pipeline.deliver(given))
            await started.wait()
            asyncio.get_running_loop().call_soon(draining.set)
        assert (await delivering).kind is Kind.FAILED
    assert await world.status(given.event.id) is Status.DEAD


# -- it does not --------------------------------------------------------------------------------------


async def test_a_handler_in_its_transaction_is_left_alone(hasty: World) -> None:
    """Idle, in a statement, in a savepoint, and after a savepoint that failed."""
    async with watched(hasty) as looks:

        async def idle(_event: Event, _context: Context) -> None:
            await looks.more()

        async def busy(_event: Event, context: Context) -> None:
            looking = asyncio.create_task(looks.more())
            while not looking.done():
                await context.connection.execute(text("SELECT pg_sleep(0.01)"))

        async def nested(_event: Event, context: Context) -> None:
            with contextlib.suppress(DBAPIError):
                async with context.connection.begin_nested():
                    await looks.more()
                    await context.connection.execute(text("SELECT 1 / 0"))
            await looks.more()

        for function in (idle, busy, nested):
            assert (await hasty.dispatch(function, await hasty.marked())).kind is Kind.PROCESSED, function


async def test_a_handler_whose_transaction_an_error_aborted_is_left_alone(hasty: World) -> None:
    """It is in no transaction of its own making, and may do something before it raises: failed and tried again."""
    async with watched(hasty) as looks:

        async def function(event: Event, context: Context) -> None:
            await effect(event, context)
            try:
                await context.connection.execute(text("SELECT 1 / 0"))
            except DBAPIError:
                await looks.more()
                looking = asyncio.create_task(looks.more())
                while not looking.done():  # each is refused
                    with contextlib.suppress(DBAPIError):
                        await context.connection.execute(text("SELECT 1"))
                raise

        await fails(hasty, function, "division by zero")


async def test_a_lost_connection_is_no_own_end(hasty: World) -> None:
    """Postgres ended the backend while the handler does something else: failed and tried again, not dead."""
    async with watched(hasty) as looks:

        async def function(event: Event, context: Context) -> None:
            await effect(event, context)
            pid = await context.connection.scalar(text("SELECT pg_backend_pid()"))
            await hasty.database.execute("SELECT pg_terminate_backend($1)", pid)
            await looks.more()
            raise RuntimeError("noticed by other means")

        await fails(hasty, function, "RuntimeError: noticed by other means")


async def test_another_backend_with_the_same_pid_is_no_own_end(world: World) -> None:
    """Pids are reused: what a backend does that was started after the transaction says nothing about it."""
    await world.database.execute("BEGIN")
    row = await world.database.fetchrow(
        "SELECT pg_current_xact_id()::text AS xid, pg_postmaster_start_time() AS server, now() AS began"
    )
    await world.database.execute("ROLLBACK")
    assert row is not None
    other = await asyncpg.connect(world.url)
    lost = HandlerTransaction(row["xid"], other.get_server_pid(), row["server"], row["began"])
    ended = replace(lost, began_at=await other.fetchval("SELECT now()"))  # the same, on the other's backend
    assert await world.components.transaction_watch._ended([lost, ended]) == [ended]
    await other.close()


async def test_an_own_commit_before_the_connection_is_lost_is_detected(hasty: World) -> None:
    """What it committed is kept, although the backend is gone when the watch looks: dead."""
    async with watched(hasty):

        async def function(event: Event, context: Context) -> None:
            await effect(event, context)
            pid = await context.connection.scalar(text("SELECT pg_backend_pid()"))
            await context.connection.execute(text("COMMIT"))
            await hasty.database.execute("SELECT pg_terminate_backend($1)", pid)
            await asyncio.Event().wait()

        assert await hasty.effects(await is_dead(hasty, function)) == 1


# -- what it costs, and what it survives --------------------------------------------------------------


async def test_quick_handlers_cost_no_query(world: World) -> None:
    """Nothing is sent for handlers that are quicker than a period, of a second, nor while none runs."""
    async with watched(world) as looks:
        for _ in range(100):
            await world.dispatch(effect, await world.claim())
        assert looks.sizes == []
        assert not world.components.transaction_watch._running


async def test_one_query_looks_at_all_handlers(hasty: World) -> None:
    """However many run, each look is at all of them."""
    async with watched(hasty) as looks:

        async def waits(_event: Event, _context: Context) -> None:
            await looks.more()

        claims = [await hasty.claim() for _ in range(3)]
        await asyncio.gather(*(hasty.dispatch(waits, claim) for claim in claims))
        assert max(looks.sizes) == 3
        assert len(looks.sizes) < 9


async def test_a_look_that_fails_does_not_end_the_watch(hasty: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Postgres may be unreachable for a while, and whatever else a look raises: the next one finds the handler."""
    watch, errors = hasty.components.transaction_watch, [asyncpg.InternalServerError("c4n4rypw"), ZeroDivisionError()]
    fetch = watch._ended

    async def broken(transactions: list[HandlerTransaction]) -> list[HandlerTransaction]:
        if errors:
            async with watch._pool.acquire(SECONDS):
                raise errors.pop(0)
        return await fetch(transactions)

    monkeypatch.setattr(watch, "_ended", broken)

    async def function(event: Event, context: Context) -> None:
        await effect(event, context)
        await context.connection.execute(text("COMMIT"))
        await asyncio.Event().wait()

    async with watched(hasty):
        await is_dead(hasty, function)
    assert not errors


@pytest.mark.parametrize(
    ("settings", "period"),
    [
        ({}, 1.0),
        ({"lease_seconds": 15.0, "backoff_first_seconds": 5.0}, 1.0),
        ({"lease_seconds": 2.0}, 0.25),
        ({"backoff_first_seconds": 1.0}, 0.25),
    ],
)
async def test_the_period_leaves_a_margin_of_the_lease(
    make_world: MakeWorld, settings: dict[str, float], period: float
) -> None:
    """Two periods are at most a quarter of the lease, and one a quarter of the first backoff."""
    world = await make_world(**settings)
    assert world.components.transaction_watch._period_seconds == period
