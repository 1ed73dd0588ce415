"""The connections that handlers work on: kept between events, each with nothing of the last one on it."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, ResourceClosedError

from firstclaim.errors import HandlerRuleBroken, LedgerUnavailable
from firstclaim.postgres.connection import Epoch
from firstclaim.postgres.handler_connections import HandlerConnection, HandlerConnections
from tests.integration.world import until, until_closed
from tests.proxy import Mode, before_postgres

TIMEOUT_SECONDS = 10.0
SLACK_SECONDS = 1.2
INSERT = "INSERT INTO effects (event_id, attempt, pid, xid) VALUES ('evt_1', 1, 1, '1')"


@asynccontextmanager
async def opened(url: str, *, size: int = 1) -> AsyncIterator[HandlerConnections]:
    """Seats as the service has them."""
    seats = HandlerConnections(
        url,
        size=size,
        timeout_seconds=TIMEOUT_SECONDS,
        queue_seconds=TIMEOUT_SECONDS,
        epoch=Epoch(fresh_seconds=60),
    )
    try:
        yield seats
    finally:
        await seats.close()


@pytest.fixture
async def admin(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    """The test's own connection to the database."""
    connection = await asyncpg.connect(database_url)
    yield connection
    await connection.close()


async def begun(seats: HandlerConnections) -> HandlerConnection:
    """One handler's turn, as it begins."""
    seat = await seats.take()
    await seat.begin()
    seat.start()
    return seat


async def sit(seats: HandlerConnections, *, sqlalchemy: bool) -> int:
    """One handler's turn, which commits; returns the pid of its backend."""
    seat = await begun(seats)
    if sqlalchemy:
        assert await seat.connection.scalar(text("SELECT 1")) == 1
    else:
        assert (await seat.fetch("SELECT 1"))[0][0] == 1
    seat.stop()
    await seat.commit()
    pid = seat.driver.get_server_pid()
    await seats.give_back(seat)
    return pid


async def test_one_connection_serves_one_handler_after_another(database_url: str) -> None:
    """Whichever of the two ways they write on it."""
    async with opened(database_url) as seats:
        pids = {await sit(seats, sqlalchemy=number % 3 > 0) for number in range(9)}
    assert len(pids) == 1


async def test_who_has_ended_reaches_nothing(database_url: str) -> None:
    """Neither by what it kept of its connection, nor by asking again: it is another handler's by now."""
    async with opened(database_url) as seats:
        seat = await seats.take()
        kept = seat.connection
        await seats.give_back(seat)
        other = await seats.take()
        try:
            with pytest.raises(HandlerRuleBroken, match="has ended"):
                await seat.fetch("SELECT 1")
            with pytest.raises(HandlerRuleBroken, match="has ended"):
                _ = seat.connection
            with pytest.raises(Exception, match="closed"):
                await kept.execute(text("SELECT 1"))
            assert (await other.fetch("SELECT 1"))[0][0] == 1
        finally:
            await seats.give_back(other)


async def test_discarding_does_not_wait_for_a_frozen_server(database_url: str) -> None:
    """In the middle of a transaction: gone at once, and twice is no error."""
    async with before_postgres(database_url) as (proxy, url), opened(url) as seats:
        for sqlalchemy in (False, True):
            seat = await seats.take()
            await seat.begin()
            if sqlalchemy:
                await seat.connection.execute(text("SELECT 1"))
            proxy.switch(Mode.FROZEN)
            began = time.monotonic()
            await seat.discard()
            await seat.discard()
            assert time.monotonic() - began < SLACK_SECONDS
            with pytest.raises(LedgerUnavailable, match="gone"):
                _ = seat.driver
            proxy.switch(Mode.OPEN)
            async with asyncio.timeout(TIMEOUT_SECONDS):  # its place in the pool is free
                await sit(seats, sqlalchemy=sqlalchemy)


async def test_a_backend_that_ended_between_events_is_replaced(database_url: str, admin: asyncpg.Connection) -> None:
    """A server that was restarted: every connection is dead, and no handler sees an error."""
    async with opened(database_url, size=3) as seats:
        taken = [await seats.take() for _ in range(3)]
        raws = [seat.driver for seat in taken]
        pids = [raw.get_server_pid() for raw in raws]
        for seat in taken:
            await seats.give_back(seat)
        await admin.execute("SELECT pg_terminate_backend(pid) FROM unnest($1::int[]) AS pid", pids)
        await until_closed(*raws)
        for number in range(6):
            assert await sit(seats, sqlalchemy=number % 2 > 0) not in pids


@pytest.mark.parametrize("way", ["the driver", "SQLAlchemy"])
async def test_a_connection_comes_back_without_a_transaction(
    database_url: str, admin: asyncpg.Connection, way: str
) -> None:
    """Whatever its last user left open is rolled back: nothing of it is committed by the next one."""

    async def run(seat: HandlerConnection, statement: str) -> None:
        if way == "the driver":
            await seat.driver.execute(statement)
        else:
            await seat.connection.exec_driver_sql(statement)

    async with opened(database_url) as seats:
        for statement in (None, "COMMIT", "ROLLBACK"):  # a handler's own leaves the driver believing in the old one
            seat = await seats.take()
            await seat.begin()
            if statement is not None:
                await run(seat, statement)
                await run(seat, "BEGIN")
            seat.start()
            await run(seat, INSERT)
            if way == "SQLAlchemy":
                with pytest.raises(HandlerRuleBroken, match="must not commit"):
                    await seat.connection.commit()
                with pytest.raises(HandlerRuleBroken, match="must not commit"):
                    seat.check_not_refused()
            await seats.give_back(seat)
            await sit(seats, sqlalchemy=False)
    assert await admin.fetchval("SELECT count(*) FROM effects") == 0


async def test_what_a_handler_gives_back_by_itself_is_not_kept(database_url: str, admin: asyncpg.Connection) -> None:
    """Back in SQLAlchemy's pool with its transaction, it would be the next handler's, whose commit were none."""
    async with opened(database_url) as seats:
        seat = await begun(seats)
        await seat.fetch(INSERT)
        pid = seat.driver.get_server_pid()
        (await seat.connection.get_raw_connection()).close()
        assert await sit(seats, sqlalchemy=False) != pid
        await seats.give_back(seat)
        assert await sit(seats, sqlalchemy=False) != pid
    assert await admin.fetchval("SELECT count(*) FROM effects") == 0


@pytest.mark.parametrize("sqlalchemy", [False, True])
async def test_a_handler_that_failed_leaves_no_lock(
    database_url: str, admin: asyncpg.Connection, sqlalchemy: bool
) -> None:
    """A session's advisory lock, which no rollback frees, is freed all the same; and its connection serves on."""
    async with opened(database_url) as seats:
        seat = await begun(seats)
        if sqlalchemy:
            await seat.connection.execute(text("SELECT pg_advisory_lock(7)"))
        else:
            await seat.fetch("SELECT pg_advisory_lock(7)")
        seat.stop()
        await seat.roll_back()
        pid = seat.driver.get_server_pid()
        await seats.give_back(seat)
        assert await admin.fetchval("SELECT pg_try_advisory_lock(7)")
        assert await sit(seats, sqlalchemy=sqlalchemy) == pid


@pytest.mark.parametrize("statement", ["COMMIT", "ROLLBACK"])
async def test_where_a_handler_ended_its_transaction_nothing_is_kept(
    database_url: str, admin: asyncpg.Connection, statement: str
) -> None:
    """There is nothing to roll back, and what it left is not known: its connection is closed."""
    async with opened(database_url) as seats:
        seat = await begun(seats)
        await seat.fetch("SELECT pg_advisory_lock(7)")
        await seat.fetch(statement)
        seat.stop()
        await seat.roll_back()
        await seats.give_back(seat)
        await until(lambda: admin.fetchval("SELECT pg_try_advisory_lock(7)"))
        await sit(seats, sqlalchemy=False)


async def test_a_lost_connection_is_not_made_anew(database_url: str, admin: asyncpg.Connection) -> None:
    """A handler that rolls back and goes on, as one does with SQLAlchemy, would write outside of its transaction."""
    async with opened(database_url, size=2) as seats:
        seat = await begun(seats)
        raw = seat.driver
        await admin.execute("SELECT pg_terminate_backend($1)", raw.get_server_pid())
        await until_closed(raw)
        with pytest.raises(DBAPIError):
            await seat.connection.execute(text(INSERT))
        await seat.connection.rollback()
        with pytest.raises(ResourceClosedError):
            await seat.connection.execute(text(INSERT))
        await seat.connection.commit()
        await seats.give_back(seat)
        taken = [await seats.take() for _ in range(2)]  # both places are free
        for each in taken:
            await seats.give_back(each)
    assert await admin.fetchval("SELECT count(*) FROM effects") == 0


async def test_closing_does_not_wait_for_a_frozen_server(database_url: str) -> None:
    """A stop of the service is not held up by its goodbyes, however many they are."""
    async with before_postgres(database_url) as (proxy, url), opened(url, size=12) as seats:
        for seat in [await seats.take() for _ in range(12)]:
            await seats.give_back(seat)
        proxy.switch(Mode.FROZEN)
        began = time.monotonic()
        async with asyncio.timeout(10):
            await seats.close()
        assert time.monotonic() - began < SLACK_SECONDS
        proxy.switch(Mode.OPEN)
