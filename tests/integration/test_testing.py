"""The test kit: what a handler's test sees is what the service would do, and nothing of it is committed."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from firstclaim import BatchContext, Context, Event, Permanent, Retry, TaskContext, on, task
from firstclaim.errors import FirstclaimError, HandlerRuleBroken, LedgerUnavailable
from firstclaim.inbox.handler_call import DeadlineExceeded
from firstclaim.observability.frames import frames
from firstclaim.testing import SyncTransaction, Transaction, make_event, sync_transaction, transaction
from tests.integration.world import effect, effect_from_thread

EVENT = make_event("invoice.paid")


@pytest.fixture
async def work(module_database: str) -> AsyncIterator[Transaction]:
    """A transaction that is rolled back."""
    async with transaction(module_database) as opened:
        yield opened


async def effects(work: Transaction) -> int:
    """The number of effects that the test sees."""
    found: int = (await work.fetch("SELECT count(*) FROM effects"))[0][0]
    return found


@on("invoice.paid")
async def handles(event: Event, context: Context) -> str:
    await effect(event, context)
    return "handled_well"


@on("invoice.paid")
def handles_in_thread(event: Event, context: Context) -> str:
    effect_from_thread(event, context)
    return "handled_well"


# -- what a test sees ---------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [handles, handles_in_thread])
async def test_action_and_effects_are_seen_and_nothing_is_kept(function: Any, module_database: str) -> None:
    """The test reads the action, and the effects in the handler's own transaction; afterwards they are gone."""
    async with transaction(module_database) as work:
        assert await work.deliver(function, EVENT, attempt=3) == "handled_well"
        [row] = await work.fetch("SELECT event_id, attempt FROM effects WHERE event_id = $1", EVENT.id)
        assert tuple(row) == (EVENT.id, 3)
    connection = await asyncpg.connect(module_database)
    assert await connection.fetchval("SELECT count(*) FROM effects") == 0
    await connection.close()


async def test_later_deliveries_see_the_earlier(work: Transaction) -> None:
    """Several deliveries share the transaction, so a test can deliver an event twice, or one after another."""
    for _ in range(2):
        await work.deliver(handles, EVENT)
    assert await effects(work) == 2


async def test_what_the_test_arranges_is_what_the_handler_finds(work: Transaction) -> None:
    """SQLAlchemy and the driver, in the test and in the handler, work in one transaction."""

    async def counts(event: Event, context: Context) -> str:
        return f"found_{(await context.connection.execute(text('SELECT count(*) FROM effects'))).scalar_one()}"

    async with work.connect() as connection:
        await connection.execute(text("INSERT INTO effects VALUES ('evt_1', 1, 1, '1')"))
    await work.fetch("INSERT INTO effects VALUES ('evt_2', 1, 1, '1')")
    assert await work.deliver(counts, EVENT) == "found_2"


class Base(DeclarativeBase):
    """The models of these tests."""


class Access(Base):
    """What a customer has paid for."""

    __tablename__ = "access"
    invoice: Mapped[str] = mapped_column(primary_key=True)
    customer: Mapped[str]


async def grants(event: Event, context: Context) -> None:
    async with context.session() as session:
        found = await session.get(Access, "in_1")
        session.add(Access(invoice=str(event.object_id), customer=found.customer if found else "nobody"))


def grants_in_thread(event: Event, context: Context) -> None:
    with context.sync_session() as session:
        found = session.get(Access, "in_1")
        session.add(Access(invoice=str(event.object_id), customer=found.customer if found else "nobody"))


@pytest.mark.parametrize("function", [grants, grants_in_thread])
async def test_models_are_arranged_and_read_in_a_session(work: Transaction, function: Any) -> None:
    """The ORM in the test and in the handler see each other's rows; an error in the test's block undoes its rows."""
    await work.fetch("CREATE TABLE access (invoice text PRIMARY KEY, customer text NOT NULL)")
    async with work.session() as session:
        session.add(Access(invoice="in_1", customer="cus_1"))
    await work.deliver(function, EVENT)

    async def fails() -> None:
        async with work.session() as session:
            session.add(Access(invoice="in_2", customer="cus_2"))
            await session.flush()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fails()
    async with work.session() as session:
        found = (await session.scalars(select(Access.customer))).all()
    assert found == ["cus_1", "cus_1"]


@pytest.mark.parametrize("function", [grants, grants_in_thread])
def test_a_sync_test_has_sessions_too(module_database: str, function: Any) -> None:
    """The same without an event loop of the test's own."""
    with sync_transaction(module_database) as work:
        work.fetch("CREATE TABLE access (invoice text PRIMARY KEY, customer text NOT NULL)")
        with work.session() as session:
            session.add(Access(invoice="in_1", customer="cus_1"))
        work.deliver(function, EVENT)

        def fails() -> None:
            with work.session() as session:
                session.add(Access(invoice="in_2", customer="cus_2"))
                session.flush()
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            fails()
        with work.session() as session:
            assert session.scalars(select(Access.customer)).all() == ["cus_1", "cus_1"]


# -- what a handler raises ----------------------------------------------------------------------------


@pytest.mark.parametrize("in_group", [False, True])
@pytest.mark.parametrize("error", [Retry(after=60), Permanent("no"), ValueError("bug")])
async def test_the_error_is_the_handlers_and_its_effects_are_rolled_back(
    work: Transaction, error: Exception, in_group: bool
) -> None:
    """`Retry`, `Permanent` (also in a group, as the service reads them) and any other error reach the test."""

    async def fails(event: Event, context: Context) -> None:
        await effect(event, context)
        raise ExceptionGroup("several", [error]) if in_group else error

    await work.deliver(handles, EVENT)
    if in_group and not isinstance(error, FirstclaimError):
        with pytest.raises(ExceptionGroup):
            await work.deliver(fails, EVENT)
    else:
        with pytest.raises(type(error)) as raised:
            await work.deliver(fails, EVENT)
        assert raised.value is error
    assert await effects(work) == 1  # of the delivery before, which is kept


async def test_a_failed_statement_of_the_test_harms_nothing(work: Transaction) -> None:
    """An SQL error in the test's own statement leaves the transaction usable."""
    await work.deliver(handles, EVENT)
    with pytest.raises(asyncpg.UndefinedTableError):
        await work.fetch("SELECT FROM no_such_table")
    assert await effects(work) == 1


# -- the rules hold as in the service -----------------------------------------------------------------


async def commits(event: Event, context: Context) -> None:
    await effect(event, context)
    await context.connection.commit()


async def swallows(event: Event, context: Context) -> None:
    with contextlib.suppress(asyncpg.DivisionByZeroError):
        await context.fetch("SELECT 1 / 0")


async def swallows_a_refusal(event: Event, context: Context) -> None:
    with contextlib.suppress(asyncpg.InterfaceError, asyncpg.DataError):
        await context.fetch("SELECT $1::int", "seven")


async def returns_a_number(event: Event, context: Context) -> int:
    return 7


async def exits(event: Event, context: Context) -> None:
    raise SystemExit(3)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (commits, "must not commit"),
        (swallows, "swallowed an SQL error"),
        (swallows_a_refusal, "must not swallow the error of a statement"),
        (returns_a_number, "returned int"),
        (exits, "must not raise SystemExit"),
    ],
)
async def test_a_broken_rule_is_named(work: Transaction, function: Any, message: str) -> None:
    """A handler that the service would fail for a rule fails in its test, with the same words; the next one works."""
    with pytest.raises(HandlerRuleBroken, match=message):
        await work.deliver(function, EVENT)
    assert await effects(work) == 0
    assert await work.deliver(handles, EVENT) == "handled_well"


@pytest.mark.parametrize("sql", ["COMMIT", "ROLLBACK", "COMMIT; BEGIN", "ROLLBACK; BEGIN"])
async def test_a_raw_commit_is_named_and_ends_the_test_s_transaction(module_database: str, sql: str) -> None:
    """A handler that ends its transaction is found out, and nothing can be delivered outside of one afterwards."""

    async def ends(event: Event, context: Context) -> None:
        for each in sql.split(";"):
            await context.fetch(each)

    async with transaction(module_database) as work:
        with pytest.raises(HandlerRuleBroken, match="must not commit"):
            await work.deliver(ends, EVENT)
        with pytest.raises(LedgerUnavailable, match="transaction is gone"):
            await work.deliver(handles, EVENT)
    connection = await asyncpg.connect(module_database)
    assert await connection.fetchval("SELECT count(*) FROM effects") == 0
    await connection.close()


async def test_a_deferred_constraint_is_checked(work: Transaction) -> None:
    """What would fail at COMMIT fails in the test, each time."""
    await work.fetch("CREATE TABLE parent (id int PRIMARY KEY)")
    await work.fetch("CREATE TABLE child (id int REFERENCES parent DEFERRABLE INITIALLY DEFERRED)")

    async def inserts(event: Event, context: Context) -> None:
        await context.fetch("INSERT INTO child VALUES (1)")

    async def inserts_parent_later(event: Event, context: Context) -> None:
        await context.fetch("INSERT INTO child VALUES (1)")
        await context.fetch("INSERT INTO parent VALUES (1)")

    for function in (inserts, inserts):
        with pytest.raises(asyncpg.ForeignKeyViolationError):
            await work.deliver(function, EVENT)
    assert await work.deliver(inserts_parent_later, EVENT) == "handled"


async def test_the_options_of_a_handler_are_those_of_its_declaration(work: Transaction) -> None:
    """Its own deadline holds, and a key that cannot be read fails as it does in the service."""

    @on(EVENT.type, deadline=0.5)
    @on("charge.refunded", key="custmer")
    async def handle(event: Event, context: Context) -> str:
        await asyncio.Event().wait()
        return "never"

    with pytest.raises(DeadlineExceeded, match=r"its deadline of 0\.5 s"):
        await work.deliver(handle, EVENT)
    with pytest.raises(HandlerRuleBroken, match="has no such field"):
        await work.deliver(handle, make_event("charge.refunded"))


async def test_the_options_of_a_task_are_those_of_its_declaration(work: Transaction) -> None:
    """As those of a handler: its deadline, which a test can choose too, and a key that cannot be read."""

    @task("hang", deadline=0.5)
    async def hang(context: TaskContext) -> None:
        await asyncio.Event().wait()

    @task("keyed", key="custmer")
    async def keyed(context: TaskContext) -> None: ...

    async def enqueues(event: Event, context: Context) -> None:
        context.enqueue("hang")
        context.enqueue("keyed", {"customer": "cus_1"})

    await work.deliver(enqueues, EVENT)
    with pytest.raises(DeadlineExceeded, match=r"its deadline of 0\.5 s"):
        await work.run(hang)
    with pytest.raises(DeadlineExceeded, match=r"its deadline of 0\.05 s"):
        await work.run(hang, deadline_seconds=0.05)
    with pytest.raises(HandlerRuleBroken, match="payload of task:keyed has no such field"):
        await work.run(keyed)


async def test_a_handler_past_its_deadline_fails(work: Transaction) -> None:
    """The deadline is the test's to choose."""

    async def hangs(event: Event, context: Context) -> None:
        await asyncio.Event().wait()

    with pytest.raises(DeadlineExceeded):
        await work.deliver(hangs, EVENT, deadline_seconds=0.05)
    assert await work.deliver(handles, EVENT) == "handled_well"


async def test_two_uses_at_once_are_refused(work: Transaction) -> None:
    """A delivery inside the block of `connect` says what to do instead of waiting for ever."""
    async with work.connect():
        with pytest.raises(RuntimeError, match="leave the block of connect"):
            await work.deliver(handles, EVENT)


# -- sync tests ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [handles, handles_in_thread])
def test_a_sync_test_does_the_same(module_database: str, function: Any) -> None:
    """Without an event loop of the test's own: action, effects, statements, and nothing is kept."""

    def fails(event: Event, context: Context) -> None:
        effect_from_thread(event, context)
        raise Retry(after=60)

    with sync_transaction(module_database) as work:
        assert work.deliver(function, EVENT) == "handled_well"
        with pytest.raises(Retry) as raised:
            work.deliver(fails, EVENT)
        assert raised.value.after == 60
        assert work.execute(text("SELECT count(*) FROM effects WHERE attempt = :n"), {"n": 1}).scalar_one() == 1
        with pytest.raises(DBAPIError):
            work.execute(text("SELECT 1 / 0"))
        assert work.fetch("SELECT count(*) FROM effects")[0][0] == 1
    with sync_transaction(module_database) as again:
        assert again.fetch("SELECT count(*) FROM effects")[0][0] == 0


def test_an_address_that_does_not_answer_is_an_error() -> None:
    """No connection: the driver's own error, and the thread of the loop has ended."""
    with pytest.raises(OSError, match=r"[Cc]onnect"), sync_transaction("postgresql://x@127.0.0.1:1/x"):
        pass


# -- the fixtures, in this pytest itself --------------------------------------------------------------


@pytest.fixture(scope="session")
def firstclaim_database_url(stores: Any) -> str:
    """Overridden as a user does, with the database that this suite has."""
    url: str = stores.database(stores.template)
    return url


async def test_the_async_fixture(firstclaim_transaction: Transaction) -> None:
    """`firstclaim_transaction` is a transaction on the database that `firstclaim_database_url` names."""
    assert await firstclaim_transaction.deliver(handles, EVENT) == "handled_well"


def test_the_sync_fixture(firstclaim_sync_transaction: SyncTransaction) -> None:
    """`firstclaim_sync_transaction` is the same for sync tests, and the effects of the test above are not in it."""
    assert firstclaim_sync_transaction.fetch("SELECT count(*) FROM effects")[0][0] == 0
    assert firstclaim_sync_transaction.deliver(handles_in_thread, EVENT) == "handled_well"


@pytest.mark.parametrize(
    ("handler", "event", "says"),
    [
        ("shop.grant", EVENT, "expected the handler's function, got str 'shop.grant'"),
        (handles, {"type": "invoice.paid"}, "expected an event, as make_event returns it, got dict"),
    ],
)
async def test_what_deliver_expects_is_said(work: Transaction, handler: Any, event: Any, says: str) -> None:
    """A name instead of a function, or a dict instead of an event, is refused in words."""
    with pytest.raises(TypeError, match=says):
        await work.deliver(handler, event)


@on("invoice.paid", batch=True)
async def handles_many(events: list[Event], context: BatchContext) -> list[str | None]:
    await context.fetch("SELECT $1::text[]", sorted(context.attempts))
    return [event.id for event in events[:-1]] + [None]


async def test_a_batch_handler_is_called_with_a_list(work: Transaction) -> None:
    """It gets a list and each one's attempt, and returns the action of each."""
    events = [make_event("invoice.paid") for _ in range(3)]
    assert await work.deliver_batch(handles_many, events) == [events[0].id, events[1].id, "handled"]


@pytest.mark.parametrize("events", [[], [1]])
async def test_what_deliver_batch_expects_is_said(work: Transaction, events: list[Any]) -> None:
    """No events, or something else, are refused in words; and so is the other kind of handler."""
    with pytest.raises(TypeError, match="deliver_batch: expected"):
        await work.deliver_batch(handles_many, events)
    with pytest.raises(TypeError, match="use deliver_batch"):
        await work.deliver(handles_many, EVENT)  # type: ignore[arg-type]


async def test_a_swallowed_sql_error_leads_to_its_line(work: Transaction) -> None:
    """It is named by class and SQLSTATE, of SQLAlchemy's errors too, and its frames lead to the handler's line."""

    async def through_the_driver(event: Event, context: Context) -> None:
        with contextlib.suppress(asyncpg.PostgresError):
            await context.fetch("SELECT 1 / 0")

    async def through_sqlalchemy(event: Event, context: Context) -> None:
        with contextlib.suppress(DBAPIError):
            await context.connection.execute(text("SELECT 1 / 0"))
        with contextlib.suppress(DBAPIError):
            await context.connection.execute(text("SELECT 2"))

    for handler in (through_the_driver, through_sqlalchemy):
        with pytest.raises(HandlerRuleBroken, match=r"its transaction: DivisionByZeroError \(22012\)$") as broken:
            await work.deliver(handler, EVENT)
        cause = broken.value.__cause__
        assert cause is not None
        lines = [line for line in frames(cause, handler) if line.endswith(handler.__name__)]
        first = handler.__code__.co_firstlineno
        assert lines[0].startswith(f"tests/integration/test_testing.py:{first + 2} in ")


# -- fresh objects ------------------------------------------------------------------------------------


@on("invoice.paid", fresh=True)
async def looks(event: Event, context: Context) -> str:
    """Says what was, and what is."""
    then = context.snapshot and context.snapshot["status"]
    return f"{then}_{event.data['object']['status']}_{event.object.status}"


async def test_a_handler_gets_the_object_that_the_test_gives(work: Transaction) -> None:
    """`fresh=` is what Stripe would return; without it the object is the event's own, and a copy of it."""
    event = make_event("invoice.paid", object={"status": "paid"})
    assert await work.deliver(looks, event, fresh={"id": event.object_id, "status": "void"}) == "paid_void_void"
    assert await work.deliver(looks, event) == "paid_paid_paid"


def test_a_sync_test_gives_an_object_too(module_database: str) -> None:
    """The same from a sync test."""
    event = make_event("invoice.paid", object={"status": "paid"})
    with sync_transaction(module_database) as work:
        assert work.deliver(looks, event, fresh={"id": event.object_id, "status": "void"}) == "paid_void_void"


async def test_what_fresh_is_for_is_said(work: Transaction) -> None:
    """A handler that does not ask for it, what is no object, and a thin event without one, are named."""
    event = make_event("invoice.paid")
    with pytest.raises(TypeError, match="fresh= is for a handler that is declared with"):
        await work.deliver(handles, event, fresh={})
    with pytest.raises(TypeError, match="fresh= is the object as a dict, got str"):
        await work.deliver(looks, event, fresh="in_1")  # type: ignore[arg-type]
    thin = make_event("v1.billing.meter.error_report_triggered")
    with pytest.raises(TypeError, match="a thin event has no object: pass the one that Stripe would return"):
        await work.deliver(looks, thin)
