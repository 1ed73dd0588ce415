"""SQLAlchemy's sessions in handlers: each usual idiom, async and sync, commits with the completion mark."""

import asyncio
import contextlib
import sys
from collections.abc import Awaitable, Callable
from types import ModuleType
from typing import Any

import asyncpg
import pytest
from sqlalchemy import ForeignKey, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

from firstclaim import Context, Event, Permanent, on
from firstclaim.outcome import Kind
from firstclaim.status import Status
from tests.blocks import block
from tests.integration.test_dispatch import ends, fails
from tests.integration.world import Function, World, delivery, effect

RULE = "HandlerRuleBroken: a handler must not commit or roll back"


class Base(DeclarativeBase):
    """The models of a user's application."""


class Effect(Base):
    """A row of `effects`, as a user's model maps it."""

    __tablename__ = "effects"

    event_id: Mapped[str] = mapped_column(primary_key=True)
    pid: Mapped[int] = mapped_column(primary_key=True)
    attempt: Mapped[int | None]
    xid: Mapped[str]


def one(event: Event, number: int = 1, attempt: int | None = 1) -> Effect:
    """A new row. Without an attempt it violates a constraint."""
    return Effect(event_id=event.id, pid=number, attempt=attempt, xid="1")


async def completes(world: World, function: Function, effects: int = 1) -> None:
    """The event is completed, and so many effects are committed."""
    await ends(world, function, Kind.PROCESSED, Status.COMPLETED, effects=effects)


async def still_works(world: World) -> None:
    """What the handler before it left on the connection does not disturb the next one."""

    async def function(event: Event, context: Context) -> None:
        await effect(event, context)

    await completes(world, function)


# -- async: what is bound to context.connection ---------------------------------------------------------


Idiom = Callable[[Event, Context], Awaitable[None]]


async def flushes(event: Event, context: Context) -> None:
    async with AsyncSession(bind=context.connection) as session:
        session.add(one(event))
        await session.flush()


async def reads(event: Event, context: Context) -> None:
    async with AsyncSession(bind=context.connection) as session:
        assert (await session.scalars(select(Effect).where(Effect.event_id == event.id))).all() == []
    await effect(event, context)


async def commits(event: Event, context: Context) -> None:
    async with AsyncSession(bind=context.connection) as session:
        session.add(one(event))
        await session.commit()


async def begins(event: Event, context: Context) -> None:
    async with AsyncSession(bind=context.connection) as session, session.begin():
        session.add(one(event))


async def begins_nested(event: Event, context: Context) -> None:
    async with AsyncSession(bind=context.connection) as session:
        with contextlib.suppress(IntegrityError):
            async with session.begin_nested():
                session.add(one(event, attempt=None))
        async with session.begin_nested():
            session.add(one(event))


async def uses_a_savepoint(event: Event, context: Context) -> None:
    async with AsyncSession(bind=context.connection, join_transaction_mode="create_savepoint") as session:
        session.add(one(event))
        await session.commit()
        session.add(one(event, 2))
        await session.rollback()


async def controls_a_savepoint(event: Event, context: Context) -> None:
    async with context.connection.begin_nested(), AsyncSession(bind=context.connection) as session:
        session.add(one(event))
        await session.commit()


async def uses_a_factory(event: Event, context: Context) -> None:
    factory = async_sessionmaker(expire_on_commit=False)
    async with factory(bind=context.connection) as session:
        session.add(one(event))
        await session.commit()


async def runs_sync(event: Event, context: Context) -> None:
    def work(connection: Any) -> None:
        with Session(bind=connection) as session:
            session.add(one(event))
            session.commit()

    await context.connection.run_sync(work)


async def works_after_fetch(event: Event, context: Context) -> None:
    await context.fetch("SELECT 1")
    await flushes(event, context)


@pytest.mark.parametrize(
    "idiom",
    [
        flushes,
        reads,
        commits,
        begins,
        begins_nested,
        uses_a_savepoint,
        controls_a_savepoint,
        uses_a_factory,
        runs_sync,
        works_after_fetch,
    ],
)
async def test_a_session_on_the_connection_joins_the_transaction(world: World, idiom: Idiom) -> None:
    """As the first use of the connection each idiom works, and what it writes commits with the completion mark."""
    await completes(world, idiom)
    await still_works(world)


@pytest.mark.parametrize("idiom", [flushes, commits, begins, uses_a_savepoint, controls_a_savepoint, runs_sync])
async def test_what_a_session_committed_is_undone_with_the_handler(world: World, idiom: Idiom) -> None:
    """A session's commit() makes nothing durable: a handler that raises afterwards leaves no effect."""

    async def function(event: Event, context: Context) -> None:
        await idiom(event, context)
        raise RuntimeError("afterwards")

    await fails(world, function, "RuntimeError: afterwards")


@pytest.mark.parametrize("method", ["commit", "rollback", "close"])
async def test_a_session_that_takes_the_transaction_over_is_refused(world: World, method: str) -> None:
    """With `control_fully` it flushes and reads; where it would end the transaction, the handler fails by the rule."""

    async def function(event: Event, context: Context) -> None:
        session = AsyncSession(bind=context.connection, join_transaction_mode="control_fully")
        session.add(one(event))
        await session.flush()
        assert len((await session.scalars(select(Effect).where(Effect.event_id == event.id))).all()) == 1
        await getattr(session, method)()

    await fails(world, function, RULE)
    await still_works(world)


@pytest.mark.parametrize("method", ["commit", "rollback"])
@pytest.mark.parametrize("first", ["fetch", "nothing"])
async def test_ending_the_transaction_is_never_without_effect(world: World, first: str, method: str) -> None:
    """Also where SQLAlchemy has executed nothing yet: commit() and rollback() are no silent no-ops."""

    async def function(event: Event, context: Context) -> None:
        if first == "fetch":
            await context.fetch("INSERT INTO effects VALUES ($1, 1, 1, '1')", event.id)
        await getattr(context.connection, method)()

    await fails(world, function, RULE)


async def test_a_second_transaction_is_refused(world: World) -> None:
    """`connection.begin()` says that there is one, and what to use: SQLAlchemy's message would say to commit first."""

    async def function(event: Event, context: Context) -> None:
        async with context.connection.begin():
            await effect(event, context)

    await fails(world, function, "the handler's transaction has begun already: use context.connection.begin_nested()")


# -- the error that the handler made is the one it sees ---------------------------------------------------


async def fails_at_the_flush(event: Event, context: Context) -> None:
    async with AsyncSession(bind=context.connection) as session:
        session.add(one(event, attempt=None))
        await session.flush()


async def fails_at_the_commit(event: Event, context: Context) -> None:
    async with AsyncSession(bind=context.connection) as session, session.begin():
        session.add(one(event, attempt=None))


async def fails_and_rolls_back(event: Event, context: Context) -> None:
    async with AsyncSession(bind=context.connection) as session:
        try:
            session.add(one(event, attempt=None))
            await session.commit()
        except IntegrityError:
            await session.rollback()
            raise


async def fails_in_control(event: Event, context: Context) -> None:
    async with AsyncSession(bind=context.connection, join_transaction_mode="control_fully") as session:
        session.add(one(event, attempt=None))
        await session.flush()


async def fails_on_a_thread_session(event: Event, context: Context) -> None:
    def work(connection: Any) -> None:
        with Session(bind=connection) as session, session.begin():
            session.add(one(event, attempt=None))

    await context.connection.run_sync(work)


async def fails_in_our_session(event: Event, context: Context) -> None:
    async with context.session() as session:
        session.add(one(event, attempt=None))


@pytest.mark.parametrize(
    "idiom",
    [
        fails_at_the_flush,
        fails_at_the_commit,
        fails_and_rolls_back,
        fails_in_control,
        fails_on_a_thread_session,
        fails_in_our_session,
    ],
)
async def test_an_sql_error_is_seen_as_it_is(world: World, idiom: Idiom) -> None:
    """The rollback that a session does after it hides neither SQLAlchemy's class nor the driver's, nor its message."""
    seen: list[IntegrityError] = []

    async def function(event: Event, context: Context) -> None:
        try:
            await idiom(event, context)
        except IntegrityError as error:
            seen.append(error)
            raise

    await fails(world, function, "IntegrityError: ")
    [error] = seen
    assert error.orig is not None
    assert isinstance(error.orig.__cause__, asyncpg.NotNullViolationError)
    assert 'null value in column "attempt"' in str(error)


@pytest.mark.parametrize("mode", ["rollback_only", "control_fully"])
async def test_a_decision_inside_a_session_is_kept(world: World, mode: Any) -> None:
    """`Permanent`, raised in a block that rolls back, is not replaced by the rule against the rollback."""

    async def function(event: Event, context: Context) -> None:
        async with AsyncSession(bind=context.connection, join_transaction_mode=mode) as session, session.begin():
            session.add(one(event))
            await session.flush()
            raise Permanent("no such shop")

    await ends(world, function, Kind.DEAD, Status.DEAD, effects=0, error="Permanent: no such shop")
    await still_works(world)


async def test_a_rolled_back_session_does_not_go_on(world: World) -> None:
    """After a rollback that is no savepoint's nothing can be executed, by SQLAlchemy or by the driver."""
    raised: list[str] = []

    async def function(event: Event, context: Context) -> None:
        async with AsyncSession(bind=context.connection) as session:
            session.add(one(event))
            await session.flush()
            await session.rollback()
            for again in (
                lambda: session.execute(text("SELECT 1")),
                lambda: context.connection.execute(text("SELECT 1")),
                lambda: context.fetch("SELECT 1"),
            ):
                try:
                    await again()
                except Exception as error:  # noqa: BLE001
                    raised.append(type(error).__name__)

    await fails(world, function, RULE)
    assert raised == ["HandlerRuleBroken"] * 3
    await still_works(world)


# -- context.session() ----------------------------------------------------------------------------------


async def test_a_session_writes_what_is_left_when_its_block_ends(world: World) -> None:
    """Without a flush or a commit of the handler's; what it has read stays readable."""

    async def function(event: Event, context: Context) -> str:
        async with context.session() as session:
            row = one(event)
            session.add(row)
        async with context.session() as session:
            [found] = await session.scalars(select(Effect).where(Effect.event_id == event.id))
        return f"{found.attempt}_{row.pid}"

    _, result, _ = await ends(world, function, Kind.PROCESSED, Status.COMPLETED, effects=1)
    assert result.action == "1_1"


async def test_a_session_may_commit_and_roll_back(world: World) -> None:
    """Both concern its savepoint: what was committed stays with the handler's transaction, the rest is undone."""

    async def function(event: Event, context: Context) -> None:
        await context.fetch("INSERT INTO effects VALUES ($1, 1, 1, '1')", event.id)
        async with context.session() as session:
            session.add(one(event, 2))
            await session.commit()
            session.add(one(event, 3))
            await session.flush()
            await session.rollback()
        async with context.session() as session, session.begin():
            session.add(one(event, 4))

    await completes(world, function, effects=3)


async def test_a_failed_part_may_be_left_out(world: World) -> None:
    """An SQL error in a session undoes that session's work alone: a handler that catches it goes on."""

    async def function(event: Event, context: Context) -> None:
        with contextlib.suppress(IntegrityError):
            async with context.session() as session:
                session.add(one(event, 1))
                await session.flush()
                session.add(one(event, 2, attempt=None))
        with contextlib.suppress(DBAPIError):
            async with context.session() as session:
                session.add(one(event, 3))
                await session.execute(text("SELECT 1 / 0"))
        async with context.session() as session:
            session.add(one(event, 4))
            try:
                async with session.begin_nested():
                    session.add(one(event, 5, attempt=None))
            except IntegrityError:
                session.add(one(event, 6))

    await completes(world, function, effects=2)


async def test_a_session_in_a_session(world: World) -> None:
    """A helper that opens its own session inside another's block commits into it."""

    async def function(event: Event, context: Context) -> None:
        async with context.session() as session:
            session.add(one(event, 1))
            await session.flush()
            async with context.session() as inner:
                inner.add(one(event, 2))
            session.add(one(event, 3))

    await completes(world, function, effects=3)


async def test_a_session_without_its_block(world: World) -> None:
    """What was flushed counts, closed or not; what was never written is not forgotten silently."""

    async def flushed(event: Event, context: Context) -> None:
        session = context.session()
        session.add(one(event))
        await session.flush()

    async def left(event: Event, context: Context) -> None:
        context.session().add(one(event))

    async def changed(event: Event, context: Context) -> None:
        session = context.session()
        row = one(event)
        session.add(row)
        await session.flush()
        row.xid = "2"

    await completes(world, flushed)
    await fails(world, left, "the handler left changes in its session that were never written")
    await fails(world, changed, "the handler left changes in its session that were never written")
    await still_works(world)


@pytest.mark.parametrize("wrong", [{"xid": None}, {"pid": "seven"}], ids=["server", "driver"])
async def test_a_swallowed_flush_that_failed_is_a_failure(world: World, wrong: dict[str, Any]) -> None:
    """The session has rolled back all that was written in it, and nothing says so to a handler that goes on."""

    async def function(event: Event, context: Context) -> None:
        session = context.session()
        session.add(one(event))
        await session.flush()
        bad = one(event, 2)
        for name, value in wrong.items():
            setattr(bad, name, value)
        session.add(bad)
        with contextlib.suppress(DBAPIError):
            await session.flush()

    await fails(world, function, "the handler swallowed an error of its session, which has rolled back")
    await still_works(world)


async def test_a_session_takes_options(world: World) -> None:
    """Those of `AsyncSession`."""

    async def function(event: Event, context: Context) -> None:
        async with context.session(autoflush=False, info={"shop": 1}) as session:
            assert session.info["shop"] == 1
            session.add(one(event))
            assert (await session.scalars(select(Effect).where(Effect.event_id == event.id))).all() == []

    await completes(world, function)


async def test_a_session_of_a_handler_that_has_ended(world: World) -> None:
    """Kept beyond its handler it writes nothing, whoever has the connection by then."""
    kept: list[AsyncSession] = []

    async def function(event: Event, context: Context) -> None:
        kept.append(context.session())
        await kept[0].execute(text("SELECT 1"))

    await completes(world, function, effects=0)

    async def other(event: Event, context: Context) -> None:
        await effect(event, context)
        with pytest.raises(Exception, match="closed"):
            await kept[0].execute(text("SELECT 1"))

    await completes(world, other)


# -- sync handlers --------------------------------------------------------------------------------------


def adds(event: Event, context: Context) -> None:
    with context.sync_session() as session:
        session.add(one(event))


def commits_and_rolls_back(event: Event, context: Context) -> None:
    with context.sync_session() as session:
        session.add(one(event))
        session.commit()
        session.add(one(event, 2))
        session.flush()
        session.rollback()


def loads_lazily(event: Event, context: Context) -> None:
    with context.sync_session() as session:
        session.add(one(event))
        session.commit()
        [row] = session.scalars(select(Effect).where(Effect.event_id == event.id).execution_options(yield_per=1))
        session.expire(row)
        assert row.attempt == 1
        assert session.scalar(select(Effect.attempt).where(Effect.event_id == event.id)) == 1
        assert session.connection().exec_driver_sql("SELECT 7").scalar() == 7
        assert session.connection().scalar(text("SELECT 8")) == 8
        assert session.connection().scalars(text("SELECT 9")).all() == [9]


def leaves_a_failed_part_out(event: Event, context: Context) -> None:
    with context.sync_session() as session:
        session.add(one(event))
        with contextlib.suppress(IntegrityError), session.begin_nested():
            session.add(one(event, 2, attempt=None))
    with contextlib.suppress(IntegrityError), context.sync_session() as session:
        session.add(one(event, 3, attempt=None))


def mixes(event: Event, context: Context) -> None:
    context.execute(text("SELECT 1"))
    with context.sync_session() as session:
        session.add(one(event))
    assert context.execute(text("SELECT count(*) FROM effects WHERE event_id = :id"), {"id": event.id}).scalar() == 1


@pytest.mark.parametrize("idiom", [adds, commits_and_rolls_back, loads_lazily, leaves_a_failed_part_out, mixes])
async def test_a_session_in_a_thread(world: World, idiom: Function) -> None:
    """A sync handler's session does what the async one does, lazy loads and savepoints included."""
    await completes(world, idiom)
    await still_works(world)


async def test_an_sql_error_in_a_thread_is_seen_as_it_is(world: World) -> None:
    """Of a flush and of a read, with SQLAlchemy's class and the driver's message; nothing is kept."""

    def flushes(event: Event, context: Context) -> None:
        with context.sync_session() as session:
            session.add(one(event))
            session.flush()
            session.add(one(event, 2, attempt=None))

    def reads(event: Event, context: Context) -> None:
        with context.sync_session() as session:
            session.add(one(event))
            session.execute(text("SELECT 1 / 0"))

    row = await fails(world, flushes, "IntegrityError: ")
    assert 'null value in column "attempt"' in row["last_error"]
    await fails(world, reads, "division by zero")


async def test_a_sync_session_must_not_end_the_transaction(world: World) -> None:
    """The rule is the same in a thread: refused in `control_fully`, and changes that were never written are named."""

    def takes_over(event: Event, context: Context) -> None:
        with context.sync_session(join_transaction_mode="control_fully") as session:
            session.add(one(event))

    def left(event: Event, context: Context) -> None:
        context.sync_session().add(one(event))

    await fails(world, takes_over, RULE)
    await fails(world, left, "the handler left changes in its session")


async def test_a_timeout_of_the_statements_own_is_no_deadline(world: World) -> None:
    """An error of a statement in a thread is raised as it is, a TimeoutError too."""

    def function(event: Event, context: Context) -> None:
        with context.sync_session() as session:
            session.execute(text("SET LOCAL statement_timeout = 10"))
            session.execute(text("SELECT pg_sleep(10)"))

    await fails(world, function, "canceling statement due to statement timeout")


async def test_execute_from_a_thread_of_an_async_handler(world: World) -> None:
    """An async handler may hand its context to a thread: a session there works on the same transaction."""

    def work(event: Event, context: Context) -> None:
        with context.sync_session() as session:
            session.add(one(event, 2))

    async def function(event: Event, context: Context) -> None:
        await effect(event, context)
        await asyncio.to_thread(work, event, context)
        async with context.session() as session:
            assert len((await session.scalars(select(Effect).where(Effect.event_id == event.id))).all()) == 2

    await completes(world, function, effects=2)


# -- the page -------------------------------------------------------------------------------------------


class Customer(Base):
    """What the page's `shop.models` has."""

    __tablename__ = "readme_customers"

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    orders: Mapped[list["Order"]] = relationship()


class Order(Base):
    """An order of a customer."""

    __tablename__ = "readme_orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    customer: Mapped[str] = mapped_column(ForeignKey(Customer.id))

    def cancelled(self) -> "Cancellation":
        """The record of its cancellation."""
        return Cancellation(order=self.id)


class Cancellation(Base):
    """A cancelled order."""

    __tablename__ = "readme_cancellations"

    order: Mapped[int] = mapped_column(primary_key=True)


SHOP = """
DROP TABLE IF EXISTS readme_customers, readme_orders, readme_cancellations, access;
CREATE TABLE readme_customers (id text PRIMARY KEY, name text);
CREATE TABLE readme_orders (id int PRIMARY KEY, customer text);
CREATE TABLE readme_cancellations ("order" int PRIMARY KEY);
CREATE TABLE access (customer text);
INSERT INTO readme_customers VALUES ('cus_1', 'before');
INSERT INTO readme_orders VALUES (1, 'cus_1'), (2, 'cus_1'), (3, 'cus_2');
INSERT INTO access VALUES ('cus_1'), ('cus_2');
"""


async def test_the_page_s_handlers_with_sessions_run(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """As printed: the async one changes an object, the sync one reads a collection lazily, adds and deletes."""
    code = block("docs/how-to/orm.md", "sessions")
    models = ModuleType("shop.models")
    models.Customer = Customer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "shop", ModuleType("shop"))
    monkeypatch.setitem(sys.modules, "shop.models", models)
    shop: dict[str, Any] = {"__name__": __name__, "on": on, "text": text, "Event": Event, "Context": Context}
    exec(code, shop)  # noqa: S102
    await world.database.execute(SHOP)

    async def dispatch(name: str) -> str:
        given = delivery(
            type="customer.created", data={"object": {"object": "customer", "id": "cus_1", "name": "after"}}
        )
        return (await world.dispatch(shop[name], await world.claim(given))).action

    assert await dispatch("rename") == "handled"
    assert await world.database.fetchval("SELECT name FROM readme_customers") == "after"
    assert await dispatch("close_account") == "account_closed"
    cancelled = await world.database.fetch('SELECT "order" FROM readme_cancellations ORDER BY 1')
    assert [row["order"] for row in cancelled] == [1, 2]
    assert await world.database.fetchval("SELECT array_agg(customer) FROM access") == ["cus_2"]
