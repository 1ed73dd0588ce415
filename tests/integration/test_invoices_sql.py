"""The shipped handler's SQL on a real server: in any order of arrival, the row of the highest attempt is kept."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import asyncpg
import pytest
from sqlalchemy import insert, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from firstclaim import BatchContext, Event
from firstclaim.event import parse_event
from firstclaim.follow_up import Outbox
from firstclaim.handlers.invoices import payment_failure, payment_failures, record_payment_failures
from tests.fixtures import event_body


@pytest.fixture
async def database(module_database: str) -> AsyncIterator[AsyncEngine]:
    """The migrated database of this module, without a payment failure in it."""

    async def connect() -> asyncpg.Connection:
        return await asyncpg.connect(module_database)

    engine = create_async_engine("postgresql+asyncpg://", async_creator=connect)
    async with engine.begin() as connection:
        await connection.execute(payment_failures.delete())
    yield engine
    await engine.dispose()


def attempt(number: int, **overrides: Any) -> Event:
    """The failed attempt `number` of one invoice; `created` decreases with it, so that it cannot be the order."""
    invoice = {"id": "in_1", "attempt_count": number, "amount_due": number * 100}
    return parse_event(event_body(created=1_793_610_041 - number, data={"object": invoice}, **overrides))


async def handle(connection: AsyncConnection, *events: Event) -> None:
    loop = asyncio.get_running_loop()
    await connection.execute(text("SELECT 1"))  # SQLAlchemy begins the transaction that the driver is then in
    underneath = (await connection.get_raw_connection()).driver_connection
    assert underneath is not None
    transaction = SimpleNamespace(connection=connection, fetch=underneath.fetch)
    context = BatchContext(transaction, loop, loop.time() + 30, {event.id: 1 for event in events}, Outbox())
    assert await record_payment_failures(list(events), context) == "payment_failure_recorded"


async def arrive(database: AsyncEngine, *events: Event) -> None:
    for event in events:
        async with database.begin() as connection:
            await handle(connection, event)


async def rows(database: AsyncEngine) -> list[dict[str, Any]]:
    async with database.connect() as connection:
        found = await connection.execute(select(payment_failures).order_by(payment_failures.c.invoice))
        return [dict(row) for row in found.mappings()]


async def backend(connection: AsyncConnection) -> int:
    found = (await connection.execute(text("SELECT pg_backend_pid()"))).scalar_one()
    assert isinstance(found, int)
    return found


async def wait_until_blocked(database: AsyncEngine, backend_pid: int) -> None:
    """Query the server until that backend waits for a lock; each round is a query, none sleeps."""
    waiting = text("SELECT cardinality(pg_blocking_pids(:pid)) > 0")
    async with asyncio.timeout(10), database.connect() as connection:
        while not (await connection.execute(waiting, {"pid": backend_pid})).scalar_one():
            pass


@pytest.mark.parametrize("order", list(itertools.permutations([1, 2, 3, 4])))
async def test_every_order_of_arrival_keeps_the_highest_attempt(database: AsyncEngine, order: tuple[int, ...]) -> None:
    """Stripe guarantees no order: all 24 orders of four attempts leave the row of the fourth."""
    events = {number: attempt(number) for number in order}
    await arrive(database, *events.values())
    assert await rows(database) == [payment_failure(events[4])]


async def test_a_repeat_changes_nothing(database: AsyncEngine) -> None:
    """The same event again, at once or after a newer one, leaves the row as it was."""
    first, second = attempt(1), attempt(2)
    await arrive(database, first, first)
    assert await rows(database) == [payment_failure(first)]
    await arrive(database, second, first, second)
    assert await rows(database) == [payment_failure(second)]


async def test_a_twin_with_the_same_attempt_changes_nothing(database: AsyncEngine) -> None:
    """Of two events with different ids and one attempt count, the first to arrive is kept: there is one row."""
    first = attempt(1)
    await arrive(database, first, attempt(1))
    assert await rows(database) == [payment_failure(first)]


async def test_a_newer_attempt_replaces_every_column(database: AsyncEngine) -> None:
    """Every column of the row is from one event, nulls included: two events are never mixed."""
    last = parse_event(
        event_body(
            data={
                "object": {
                    "id": "in_1",
                    "attempt_count": 4,
                    "customer": None,
                    "parent": None,
                    "next_payment_attempt": None,
                    "currency": "eur",
                }
            }
        )
    )
    await arrive(database, attempt(1), last)
    assert await rows(database) == [payment_failure(last)]


async def test_invoices_keep_to_themselves(database: AsyncEngine) -> None:
    """The attempts of one invoice never change the row of another."""
    one = attempt(1)
    other = parse_event(event_body(data={"object": {"id": "in_2", "attempt_count": 9}}))
    await arrive(database, other, one)
    assert await rows(database) == [payment_failure(one), payment_failure(other)]


@pytest.mark.parametrize(("holder", "waiter"), [(1, 2), (2, 1)])
async def test_two_open_transactions_settle_on_the_highest(database: AsyncEngine, holder: int, waiter: int) -> None:
    """The second insert waits for the first one to commit and compares with it, whichever attempt is higher."""
    events = {1: attempt(1), 2: attempt(2)}
    async with database.connect() as first, database.connect() as second:
        pid = await backend(second)
        await handle(first, events[holder])
        waiting = asyncio.create_task(handle(second, events[waiter]))
        await wait_until_blocked(database, pid)
        await first.commit()
        await waiting
        await second.commit()
    assert await rows(database) == [payment_failure(events[2])]


@pytest.mark.parametrize(
    "invoice",
    [
        {"amount_due": 2**63 - 1, "attempt_count": 2**31 - 1, "next_payment_attempt": 253_402_300_799},
        {"amount_due": 0, "attempt_count": 0, "next_payment_attempt": 0},
        {"id": "\N{EURO SIGN}" * 255, "customer": "'; DROP TABLE payment_failures; --"},
    ],
)
async def test_what_the_handler_accepts_the_table_holds(database: AsyncEngine, invoice: dict[str, Any]) -> None:
    """The limits of each range that the parser accepts are stored and read back unchanged."""
    event = parse_event(event_body(data={"object": invoice}))
    await arrive(database, event)
    assert await rows(database) == [payment_failure(event)]


@pytest.mark.parametrize("created", ["0002-01-01T00:00:00Z", "9998-12-31T23:59:59.999999Z", -1])
async def test_any_instant_of_an_event_is_stored(database: AsyncEngine, created: str | int) -> None:
    """Every `created` that the parser accepts is stored unchanged, up to the limits of its years."""
    event = parse_event(event_body(created=created))
    await arrive(database, event)
    assert (await rows(database))[0]["failed_at"] == event.created


@pytest.mark.parametrize("wrong", [{"invoice": ""}, {"amount_due_minor": -1}, {"currency": ""}, {"attempt_count": -1}])
async def test_the_table_refuses_what_no_invoice_is(database: AsyncEngine, wrong: dict[str, Any]) -> None:
    """The table has constraints of its own, for code that writes to it without the handler."""
    row = payment_failure(attempt(1)) | {"failed_at": datetime.now(UTC)} | wrong
    async with database.connect() as connection:
        with pytest.raises(IntegrityError, match="violates check constraint"):
            await connection.execute(insert(payment_failures), row)
