"""The connections that handlers work on: each is kept between events, and nothing of the last handler is left on it."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, ResourceClosedError

from firstclaim.errors import HandlerRuleBroken, LedgerUnavailable
from firstclaim.follow_up import Outbox
from firstclaim.postgres.epoch import Epoch
from firstclaim.postgres.handler_connections import HandlerConnection, HandlerConnections
from firstclaim.postgres.places import Places
from firstclaim.postgres.probe import Probe
from tests.integration.world import NOTHING, until, until_closed
from tests.proxy import Mode, before_postgres

TIMEOUT_SECONDS = 10.0
PLACES = 12
SLACK_SECONDS = 1.2
INSERT = "INSERT INTO effects (event_id, attempt, pid, xid) VALUES ('evt_1', 1, 1, '1')"


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[HandlerConnections]:
    """The connections as the service has them."""
    probe = Probe(url, timeout_seconds=TIMEOUT_SECONDS)
    connections = HandlerConnections(
        Places(url, probe, size=PLACES, timeout_seconds=TIMEOUT_SECONDS, epoch=Epoch(fresh_seconds=60))
    )
    try:
        yield connections
    finally:
        await connections.close()
        await probe.close()


@pytest.fixture
async def admin(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    """The test's own connection to the database."""
    connection = await asyncpg.connect(database_url)
    yield connection
    await connection.close()


async def begun(connections: HandlerConnections) -> HandlerConnection:
    """A connection as a handler has it when it starts."""
    connection = await connections.acquire()
    await connection.begin(NOTHING)
    connection.start(Outbox())
    return connection


async def run_handler(connections: HandlerConnections, *, sqlalchemy: bool) -> int:
    """A handler that reads, and whose transaction is committed. Returns the pid of its server process."""
    connection = await begun(connections)
    if sqlalchemy:
        assert await connection.connection.scalar(text("SELECT 1")) == 1
    else:
        assert (await connection.fetch("SELECT 1"))[0][0] == 1
    connection.stop()
    await connection.commit(NOTHING)
    pid = connection.driver.get_server_pid()
    await connections.release(connection)
    return pid


async def test_one_connection_serves_one_handler_after_another(database_url: str) -> None:
    """Nine handlers in a row, some with SQLAlchemy and some with the driver, use one server process."""
    async with opened(database_url) as connections:
        pids = {await run_handler(connections, sqlalchemy=number % 3 > 0) for number in range(9)}
    assert len(pids) == 1


async def test_a_handler_that_has_ended_reaches_nothing(database_url: str) -> None:
    """Neither the object that it kept nor its context works: another handler may have the connection by now."""
    async with opened(database_url) as connections:
        connection = await connections.acquire()
        kept = connection.connection
        await connections.release(connection)
        other = await connections.acquire()
        try:
            with pytest.raises(HandlerRuleBroken, match="has ended"):
                await connection.fetch("SELECT 1")
            with pytest.raises(HandlerRuleBroken, match="has ended"):
                _ = connection.connection
            with pytest.raises(ResourceClosedError, match="closed"):
                await kept.execute(text("SELECT 1"))
            assert (await other.fetch("SELECT 1"))[0][0] == 1
        finally:
            await connections.release(other)


async def test_discarding_does_not_wait_for_a_frozen_server(database_url: str) -> None:
    """In the middle of a transaction the connection is closed at once, and a second discard is no error."""
    async with before_postgres(database_url) as (proxy, url), opened(url) as connections:
        for sqlalchemy in (False, True):
            connection = await connections.acquire()
            await connection.begin(NOTHING)
            if sqlalchemy:
                await connection.connection.execute(text("SELECT 1"))
            proxy.switch(Mode.FROZEN)
            began = time.monotonic()
            await connection.discard(TimeoutError())
            await connection.discard(TimeoutError())
            assert time.monotonic() - began < SLACK_SECONDS
            with pytest.raises(LedgerUnavailable, match="gone"):
                _ = connection.driver
            proxy.switch(Mode.OPEN)
            async with asyncio.timeout(TIMEOUT_SECONDS):
                await run_handler(connections, sqlalchemy=sqlalchemy)


async def test_a_backend_that_ended_between_events_is_replaced(database_url: str, admin: asyncpg.Connection) -> None:
    """After a restart of the server every connection is dead, and no handler sees an error."""
    async with opened(database_url) as connections:
        acquired = [await connections.acquire() for _ in range(3)]
        drivers = [connection.driver for connection in acquired]
        pids = [driver.get_server_pid() for driver in drivers]
        for connection in acquired:
            await connections.release(connection)
        await admin.execute("SELECT pg_terminate_backend(pid) FROM unnest($1::int[]) AS pid", pids)
        await until_closed(*drivers)
        for number in range(6):
            assert await run_handler(connections, sqlalchemy=number % 2 > 0) not in pids


@pytest.mark.parametrize("way", ["the driver", "SQLAlchemy"])
async def test_a_connection_comes_back_without_a_transaction(
    database_url: str, admin: asyncpg.Connection, way: str
) -> None:
    """What its last handler left open is rolled back, so the next handler's commit does not include it."""

    async def run(connection: HandlerConnection, statement: str) -> None:
        if way == "the driver":
            await connection.driver.execute(statement)
        else:
            await connection.connection.exec_driver_sql(statement)

    async with opened(database_url) as connections:
        for statement in (None, "COMMIT", "ROLLBACK"):  # the driver does not know that its transaction has ended
            connection = await connections.acquire()
            await connection.begin(NOTHING)
            if statement is not None:
                await run(connection, statement)
                await run(connection, "BEGIN")
            connection.start(Outbox())
            await run(connection, INSERT)
            if way == "SQLAlchemy":
                with pytest.raises(HandlerRuleBroken, match="must not commit"):
                    await connection.connection.commit()
                with pytest.raises(HandlerRuleBroken, match="must not commit"):
                    connection.check_rules()
            await connections.release(connection)
            await run_handler(connections, sqlalchemy=False)
    assert await admin.fetchval("SELECT count(*) FROM effects") == 0


@pytest.mark.parametrize("raw", [False, True])
async def test_a_handler_must_not_close_its_connection(database_url: str, admin: asyncpg.Connection, raw: bool) -> None:
    """Nothing that it wrote is kept, whether it closed SQLAlchemy's connection or the raw one below it."""
    async with opened(database_url) as connections:
        connection = await begun(connections)
        await connection.fetch(INSERT)
        if raw:
            (await connection.connection.get_raw_connection()).close()
        else:
            await connection.connection.close()
        with pytest.raises(HandlerRuleBroken, match="must not close"):
            connection.check_rules()
        driver = connection.driver
        connection.stop()
        await connection.roll_back()
        await connections.release(connection)
        assert driver.is_closed()
        await run_handler(connections, sqlalchemy=False)
    assert await admin.fetchval("SELECT count(*) FROM effects") == 0


async def test_what_a_handler_detached_is_not_kept(database_url: str, admin: asyncpg.Connection) -> None:
    """A connection that a handler took out of SQLAlchemy's pool is closed when the handler has ended."""
    async with opened(database_url) as connections:
        connection = await begun(connections)
        (await connection.connection.get_raw_connection()).detach()
        await connection.fetch(INSERT)
        connection.stop()
        await connection.commit(NOTHING)
        driver = connection.driver
        await connections.release(connection)
        assert driver.is_closed()
        await run_handler(connections, sqlalchemy=True)
    assert await admin.fetchval("SELECT count(*) FROM effects") == 1


async def test_a_handler_gets_no_second_connection(database_url: str, admin: asyncpg.Connection) -> None:
    """The engine that a handler finds on its connection has no other: work there would be in no transaction."""
    async with opened(database_url) as connections:
        connection = await begun(connections)
        await connection.connection.execute(text(INSERT))
        with pytest.raises(AssertionError, match="already checked out"):
            async with connection.connection.engine.connect():
                pass
        assert await connection.connection.scalar(text("SELECT count(*) FROM effects")) == 1
        connection.stop()
        await connection.commit(NOTHING)
        await connections.release(connection)
    assert await admin.fetchval("SELECT count(*) FROM effects") == 1


@pytest.mark.parametrize("sqlalchemy", [False, True])
async def test_a_handler_that_failed_leaves_no_lock(
    database_url: str, admin: asyncpg.Connection, sqlalchemy: bool
) -> None:
    """A session's advisory lock, which no rollback frees, is released, and the connection is kept."""
    async with opened(database_url) as connections:
        connection = await begun(connections)
        if sqlalchemy:
            await connection.connection.execute(text("SELECT pg_advisory_lock(7)"))
        else:
            await connection.fetch("SELECT pg_advisory_lock(7)")
        connection.stop()
        await connection.roll_back()
        pid = connection.driver.get_server_pid()
        await connections.release(connection)
        assert await admin.fetchval("SELECT pg_try_advisory_lock(7)")
        assert await run_handler(connections, sqlalchemy=sqlalchemy) == pid


@pytest.mark.parametrize("statement", ["COMMIT", "ROLLBACK"])
async def test_where_a_handler_ended_its_transaction_nothing_is_kept(
    database_url: str, admin: asyncpg.Connection, statement: str
) -> None:
    """There is nothing to roll back, and what the handler left is unknown: the connection is closed."""
    async with opened(database_url) as connections:
        connection = await begun(connections)
        await connection.fetch("SELECT pg_advisory_lock(7)")
        await connection.fetch(statement)
        connection.stop()
        await connection.roll_back()
        await connections.release(connection)
        await until(lambda: admin.fetchval("SELECT pg_try_advisory_lock(7)"))
        await run_handler(connections, sqlalchemy=False)


async def test_a_lost_connection_is_not_replaced_under_a_handler(database_url: str, admin: asyncpg.Connection) -> None:
    """A handler that rolls back and continues, as SQLAlchemy allows, would write outside its transaction."""
    async with opened(database_url) as connections:
        connection = await begun(connections)
        driver = connection.driver
        await admin.execute("SELECT pg_terminate_backend($1)", driver.get_server_pid())
        await until_closed(driver)
        with pytest.raises(DBAPIError):
            await connection.connection.execute(text(INSERT))
        await connection.connection.rollback()
        for _ in range(2):
            with pytest.raises(ResourceClosedError, match="cannot continue on another one"):
                await connection.connection.execute(text(INSERT))
        await connection.connection.commit()
        with pytest.raises(ResourceClosedError, match="cannot continue on another one"):
            async with connection.connection.engine.connect():
                pass
        await connections.release(connection)
        await run_handler(connections, sqlalchemy=True)
    assert await admin.fetchval("SELECT count(*) FROM effects") == 0


async def test_closing_does_not_wait_for_a_frozen_server(database_url: str) -> None:
    """Twelve connections to a frozen server are closed in a moment: they do not delay a shutdown."""
    async with before_postgres(database_url) as (proxy, url), opened(url) as connections:
        for connection in [await connections.acquire() for _ in range(12)]:
            await connections.release(connection)
        proxy.switch(Mode.FROZEN)
        began = time.monotonic()
        async with asyncio.timeout(10):
            await connections.close()
        assert time.monotonic() - began < SLACK_SECONDS
        proxy.switch(Mode.OPEN)
