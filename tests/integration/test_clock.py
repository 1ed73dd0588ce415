"""The injected clock is the ledger's: its statements, plans, migrations and pins, with time moved from outside."""

import re
from collections.abc import AsyncIterator

import asyncpg
import pytest

from firstclaim.inbox import statements
from firstclaim.migrations import schema
from firstclaim.postgres.connection import open_connection
from firstclaim.status import Status
from tests.clock import Clock, installed
from tests.integration.world import World, build, delivery, due, effect, explained
from tests.stores import Stores

HOUR_SECONDS = 3600.0
TYPE = "invoice.payment_failed"


@pytest.fixture
async def clock(database_url: str) -> AsyncIterator[Clock]:
    """A clock that stands, in a database of the test's own."""
    async with installed(database_url, standing=True) as clock:
        yield clock


@pytest.fixture
async def world(clock: Clock, database_url: str, stores: Stores, redis_prefix: str) -> AsyncIterator[World]:
    """A process's parts in that database."""
    world = await build(database_url, stores.redis_url, redis_prefix, {TYPE: effect})
    yield world
    await world.close()


async def test_a_recorded_event_is_due_when_the_clock_says_so(world: World, clock: Clock) -> None:
    """Not a second before, whatever time really passes, and for connections that were open all along."""
    given = delivery()
    await world.ledger.record(given, due_in_seconds=HOUR_SECONDS)
    await clock.advance(HOUR_SECONDS - 1)
    assert await due(world, 1, abandoned=False) == []
    assert (await world.row(given.event.id))["due_in"] == 1
    await clock.advance(1)
    assert await due(world, 1, abandoned=False) == [given.event.id]


async def test_a_lease_ends_when_the_clock_says_so(world: World, clock: Clock) -> None:
    """A claim becomes abandoned by advancing the clock, and by nothing else."""
    claim = await world.claim()
    await clock.advance(world.settings.lease_seconds - 1)
    assert await world.ledger.return_abandoned(9) == []
    await clock.advance(1)
    [event] = await world.ledger.return_abandoned(9)
    assert (event.event_id, event.status, event.times) == (claim.event_id, Status.PENDING, 1)


async def test_three_days_of_failures_pass_in_a_moment(world: World, clock: Clock) -> None:
    """The end of an event's life is counted by the same clock, settled_at included."""
    claim = await world.claim()
    assert await world.ledger.fail_if_held(claim, "boom", due_in_seconds=0) is Status.FAILED
    await clock.advance(world.settings.give_up_seconds)
    [claim] = await world.ledger.take_over([claim.event_id])
    assert await world.ledger.fail_if_held(claim, "boom", due_in_seconds=0) is Status.DEAD
    assert (await world.row(claim.event_id))["settled_at"] == await clock.now()


async def test_a_whole_dispatch_under_it(world: World, clock: Clock) -> None:
    """Delivered, handled, marked: every instant in the row is the standing clock's."""
    given = delivery()
    await world.pipeline.deliver(given)
    row = await world.row(given.event.id)
    assert row["status"] == "completed"
    assert row["received_at"] == row["settled_at"] == await clock.now()


async def test_a_running_clock_runs(database_url: str) -> None:
    """Without `standing` it goes on by itself, ahead by what it was advanced."""
    async with installed(database_url) as clock:
        await clock.advance(HOUR_SECONDS)
        real = await asyncpg.connect(database_url)
        try:
            first, second = await clock.now(), await clock.now()
            ahead = first - await real.fetchval("SELECT pg_catalog.clock_timestamp()")
        finally:
            await real.close()
    assert first < second
    assert abs(ahead.total_seconds() - HOUR_SECONDS) < HOUR_SECONDS / 2


async def test_other_databases_keep_their_time(clock: Clock, stores: Stores) -> None:
    """Only the one database is moved: tests that run on the same server do not notice."""
    await clock.advance(HOUR_SECONDS)
    other = await asyncpg.connect(stores.postgres_url)
    try:
        ahead = await clock.now() - await other.fetchval("SELECT clock_timestamp()")
        assert ahead.total_seconds() > HOUR_SECONDS / 2
    finally:
        await other.close()


async def test_what_is_due_is_still_found_by_the_index(world: World) -> None:
    """The look for due events plans as it does with the server's own clock: once per look, not once per row."""
    async with world.components.ingest.acquire(60) as connection:
        await connection.execute("SET enable_seqscan = off")
        wanted = {"types": [TYPE], "livemodes": [True], "starts": [None], "left_out": [], "limit": 5}
        plan = await explained(connection, statements.DUE[False], "EXPLAIN VERBOSE", **wanted)
    assert "InitPlan" in plan
    assert " clock_timestamp()" in plan, "the server's own would be shown as pg_catalog's"
    assert re.search(r"\(e\.due_at <= (\(InitPlan|\$\d)", plan)  # $0: before PostgreSQL 17


async def test_a_database_is_migrated_under_it(empty_url: str) -> None:
    """Installed before the ledger: the tables are made in their schema, and the pins of a connection hold."""
    async with installed(empty_url):
        assert await schema.migrate(empty_url, 10) == (None, schema.head())
        assert await schema.migrate(empty_url, 10) == (schema.head(), schema.head())
        connection = await open_connection(empty_url, 10)
        try:
            assert connection.epoch is not None
            made_in = await connection.fetch(
                "SELECT DISTINCT schemaname FROM pg_tables WHERE tablename LIKE 'stripe_%'"
            )
            assert [row["schemaname"] for row in made_in] == ["firstclaim"]
        finally:
            await connection.close()


async def test_the_ledger_has_no_default_that_tells_the_time(database_url: str) -> None:
    """A column's default keeps the clock that it was made with: the ledger's statements give every instant."""
    connection = await asyncpg.connect(database_url)
    try:
        defaults = await connection.fetch(
            """
            SELECT table_name, column_default FROM information_schema.columns
             WHERE table_schema = 'public' AND table_name <> 'effects' AND column_default ~ 'time|now'
            """
        )
    finally:
        await connection.close()
    assert [dict(row) for row in defaults] == []
