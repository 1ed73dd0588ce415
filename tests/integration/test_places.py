"""Places in a pool, and the probe: how many backends there are while Postgres is stalled, and who waits for it."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import UTC, datetime
from typing import Any

import asyncpg
import pytest
from asyncpg import connect_utils

from firstclaim.context import Context
from firstclaim.errors import LedgerUnavailable
from firstclaim.event import Event
from firstclaim.outcome import Kind
from firstclaim.postgres import probe as probe_module
from firstclaim.postgres.connection import Backend, PinnedConnection, open_connection
from firstclaim.postgres.epoch import Epoch
from firstclaim.postgres.places import Places
from firstclaim.postgres.pool import Pool
from firstclaim.postgres.probe import Probe
from tests.integration.conftest import MakeWorld
from tests.integration.world import World, build, delivery, effect, until, until_closed
from tests.proxy import Mode, before_postgres
from tests.stores import Stores

TIMEOUT_SECONDS = 0.5
SHORT_SECONDS = 0.1
LONG_SECONDS = 30.0
LOCK = 44
IS_ACTIVE = "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE pid = $1 AND state = 'active')"
END_OTHERS = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
 WHERE datname = current_database() AND pid <> pg_backend_pid()
"""


# -- places -------------------------------------------------------------------------------------------


@asynccontextmanager
async def pooled(
    url: str, *, size: int = 1, timeout_seconds: float = TIMEOUT_SECONDS, commits: bool = True
) -> AsyncIterator[Pool]:
    """A pool whose statements the server does not end."""
    probe = Probe(url, timeout_seconds=timeout_seconds)
    epoch = Epoch(fresh_seconds=60)
    pool = Pool(Places(url, probe, size=size, timeout_seconds=timeout_seconds, epoch=epoch, commits=commits))
    try:
        yield pool
    finally:
        await pool.close()
        await probe.close()


async def times_out(pool: Pool, statement: str = "SELECT pg_sleep(600)") -> int:
    """Give up a statement that the server goes on with; returns the backend's pid."""
    pid = 0
    try:
        async with pool.acquire(SHORT_SECONDS) as connection:
            pid = connection.get_server_pid()
            await connection.execute(statement)
    except LedgerUnavailable:
        return pid
    raise AssertionError("no timeout")


async def is_served(pool: Pool, seconds: float = TIMEOUT_SECONDS) -> bool:
    with suppress(LedgerUnavailable):
        async with pool.acquire(seconds) as connection:
            return bool(await connection.fetchval("SELECT true"))
    return False


async def end(database: asyncpg.Connection, pid: int) -> None:
    await database.execute("SELECT pg_terminate_backend($1)", pid)


async def looks(probe: Probe, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Wait for so many looks of the probe that begin after this."""
    look, seen = probe._look, asyncio.Semaphore(0)

    async def counted(connection: PinnedConnection) -> set[Backend]:
        waiting = await look(connection)
        seen.release()
        return waiting

    monkeypatch.setattr(probe, "_look", counted)
    async with asyncio.timeout(20):
        for _ in range(count):
            await seen.acquire()
    monkeypatch.setattr(probe, "_look", look)


async def test_a_place_is_free_when_the_server_no_longer_shows_its_backend(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its client is gone, and it goes on: however long that takes, the pool opens no other connection in its place."""
    monkeypatch.setattr(probe_module, "_IDLE_SECONDS", 0)  # an idle one would be ended by now
    database = await asyncpg.connect(database_url)
    async with pooled(database_url) as pool:
        pid = await times_out(pool)
        await looks(pool._places._probe, monkeypatch, 4)
        assert not await is_served(pool)
        await end(database, pid)
        assert await until(lambda: is_served(pool))
    await database.close()


async def test_a_place_of_a_handler_is_free_when_its_backend_is_gone(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So is a place of the handlers."""
    world = await make_world(postgres_timeout_seconds=TIMEOUT_SECONDS, handler_slots=1)
    seat = await world.components.handler_connections.acquire()
    pid = seat.driver.get_server_pid()
    await seat.fetch("SET statement_timeout = 0")
    working = asyncio.create_task(seat.fetch("SELECT pg_sleep(600)"))
    await until(lambda: world.database.fetchval(IS_ACTIVE, pid))
    await seat.discard()
    await asyncio.wait({working})
    await looks(world.components.probe, monkeypatch, 4)
    with pytest.raises(LedgerUnavailable, match="no connection is free"):
        await world.components.handler_connections.acquire()
    await end(world.database, pid)

    async def is_free() -> bool:
        with suppress(LedgerUnavailable):
            async with world.seat() as other:
                return bool((await other.fetch("SELECT true"))[0][0])
        return False

    assert await until(is_free)


async def test_another_backend_of_the_same_pid_has_no_place(database_url: str) -> None:
    """Pids are reused: a backend is named by its start, too."""
    other = await asyncpg.connect(database_url)
    async with pooled(database_url) as pool:
        gone = asyncio.Event()
        began = datetime(2020, 1, 1, tzinfo=UTC)
        pool._places._probe.leave(Backend(other.get_server_pid(), began), gone.set)
        async with asyncio.timeout(20):
            await gone.wait()
    assert await other.fetchval("SELECT true")
    await other.close()


async def test_a_backend_that_does_not_notice_that_its_client_is_gone_is_ended(database_url: str) -> None:
    """The network forgot the connection: an idle backend would be there for hours, and have its place."""
    other = await open_connection(database_url, TIMEOUT_SECONDS)
    assert other.backend is not None
    async with pooled(database_url) as pool:
        gone = asyncio.Event()
        pool._places._probe.leave(other.backend, gone.set)
        async with asyncio.timeout(20):
            await gone.wait()
    await until_closed(other)


@pytest.mark.parametrize("commits", [True, False])
async def test_connects_without_an_answer_do_not_pile_up(database_url: str, commits: bool) -> None:
    """A server that takes connections and is silent: each place has one, and the probe another at growing intervals."""
    async with (
        before_postgres(database_url) as (proxy, url),
        pooled(url, size=2, timeout_seconds=0.2, commits=commits) as pool,
    ):
        proxy.switch(Mode.FROZEN)
        for _ in range(12):
            assert not await is_served(pool)
        assert proxy.connections <= 2 + 3
        proxy.switch(Mode.OPEN)
        assert await until(lambda: is_served(pool))


# -- while commits hang -------------------------------------------------------------------------------

HANGING = f"""
CREATE TABLE cancelled (yes bool);
CREATE FUNCTION pg_logical_emit_message(transactional bool, prefix text, content text) RETURNS pg_lsn
LANGUAGE plpgsql AS $$ BEGIN
    PERFORM pg_advisory_xact_lock({LOCK});
    IF EXISTS (SELECT FROM cancelled) THEN
        RAISE WARNING 'canceling wait for synchronous replication due to user request';
    END IF;
    RETURN '0/0';
END $$;
CREATE VIEW public.pg_stat_activity AS SELECT * FROM pg_catalog.pg_stat_activity;
DO $$ BEGIN
    EXECUTE format('ALTER DATABASE %I SET search_path = public, pg_catalog', current_database());
END $$;
"""
# Like the server's own view, and each backend that waits for the lock above waits for the standby.
STANDBY = """
DROP VIEW public.pg_stat_activity;
CREATE VIEW public.pg_stat_activity AS
    SELECT pid, backend_start, state, application_name, datname,
           CASE wait_event WHEN 'advisory' THEN 'SyncRep' ELSE wait_event END AS wait_event
      FROM pg_catalog.pg_stat_activity
"""
PROBES = """
SELECT count(*) FROM pg_catalog.pg_stat_activity
 WHERE wait_event = 'advisory' AND datname = current_database() AND application_name = 'firstclaim'
"""


@pytest.fixture
async def hanging(database_url: str, stores: Stores, redis_prefix: str) -> AsyncIterator[World]:
    """A process on a database of its own whose commits wait for a lock; a connection has just been silent."""
    connection = await asyncpg.connect(database_url)
    await connection.execute(HANGING)
    await connection.close()
    world = await build(database_url, stores.redis_url, redis_prefix, postgres_timeout_seconds=LONG_SECONDS)
    await world.claim()
    await world.database.execute("SELECT pg_advisory_lock($1)", LOCK)
    yield world
    await world.close()


async def hangs(world: World) -> bool:
    return world.components.probe.commits_hang


async def waits_once(world: World) -> bool:
    return bool(await world.database.fetchval(PROBES) == 1)


async def test_while_commits_hang_one_probes_and_all_others_are_told_at_once(hanging: World) -> None:
    """No delivery and no handler waits for its own timeout; once the probe's commit returns, they are served again."""
    await times_out(hanging.components.ingest, "SELECT pg_sleep(0.5)")
    await until(lambda: hangs(hanging))
    async with asyncio.timeout(LONG_SECONDS / 3):  # none waits for its own timeout
        for _ in range(20):
            answer = await hanging.pipeline.deliver(delivery())
            assert (answer.kind, answer.reason) == (Kind.UNAVAILABLE, "The ledger cannot be reached")
        with pytest.raises(LedgerUnavailable, match="does not confirm commits"):
            await hanging.components.handler_connections.acquire()
    assert await hanging.database.fetchval(PROBES) == 1
    assert await is_served(hanging.components.metrics_pool)  # who only reads goes on
    await hanging.database.execute("SELECT pg_advisory_unlock($1)", LOCK)
    await until(lambda: is_served(hanging.components.ingest))
    assert (await hanging.pipeline.deliver(delivery())).kind is Kind.UNHANDLED


async def test_who_waits_for_a_place_is_told_when_commits_hang(hanging: World) -> None:
    """All places are taken: who waits for one does not wait until its own time is over."""
    pool = hanging.components.ingest
    async with AsyncExitStack() as stack:
        for _ in range(hanging.settings.ingest_connections):
            await stack.enter_async_context(pool.acquire(LONG_SECONDS))
        waiting = asyncio.create_task(is_served(pool))
        await asyncio.sleep(0)
        hanging.components.probe.doubt()
        async with asyncio.timeout(LONG_SECONDS / 3):
            assert not await waiting


async def _waits(places: Places) -> bool:
    return bool(places._waiting)


async def test_the_probe_goes_on_if_a_caller_has_just_given_up(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A caller's time is over in the turn in which the probe finds the server lost: the place is freed later on."""
    async with pooled(database_url, timeout_seconds=LONG_SECONDS) as pool:
        places = pool._places
        probe = places._probe
        pid = await times_out(pool)
        waiting = asyncio.create_task(is_served(pool, LONG_SECONDS))
        await until(lambda: _waits(places))
        (limit,) = places._waiting
        look = probe._look
        loses = [True]

        async def lost(connection: PinnedConnection) -> set[Backend]:
            if not loses:
                return await look(connection)
            loses.pop()
            limit.reschedule(0)
            await asyncio.sleep(0)
            assert limit.expired()
            raise ConnectionResetError

        monkeypatch.setattr(probe, "_look", lost)
        probe._ask_soon()
        assert not await waiting
        assert loses == []
        database = await asyncpg.connect(database_url)
        await end(database, pid)
        await database.close()
        assert await until(lambda: is_served(pool))


async def test_a_probe_whose_wait_was_cancelled_confirms_nothing(
    hanging: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its commit returns with the warning, and is not replicated: the next probe is asked."""
    await hanging.database.execute("INSERT INTO cancelled VALUES (true)")
    await hanging.database.execute("SELECT pg_advisory_unlock($1)", LOCK)
    hanging.components.probe.doubt()
    await looks(hanging.components.probe, monkeypatch, 4)
    assert hanging.components.probe.doubted
    await hanging.database.execute("DELETE FROM cancelled")
    await until(lambda: is_served(hanging.components.ingest))


@pytest.mark.parametrize("standby", [True, False])
async def test_a_silent_probe_is_replaced_unless_it_waits_for_the_standby(
    hanging: World, monkeypatch: pytest.MonkeyPatch, standby: bool
) -> None:
    """One that waits for the standby is never ended, nor left for another: however long, one backend waits."""
    probe = hanging.components.probe
    probe._commit_patience_seconds = 0.01
    if standby:
        await hanging.database.execute(STANDBY)
    probe.doubt()
    await until(lambda: waits_once(hanging))
    await looks(probe, monkeypatch, 5)
    assert (await hanging.database.fetchval(PROBES) == 1) is standby


# -- what follows a timeout ---------------------------------------------------------------------------


@pytest.fixture
def cancels(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The pids of the backends whose statement the driver asks the server to cancel."""
    asked: list[int] = []

    async def cancel(*, backend_pid: int, **_: object) -> None:
        asked.append(backend_pid)

    monkeypatch.setattr(connect_utils, "_cancel", cancel)
    return asked


async def loop_is_idle() -> None:
    """Whatever was due has run."""
    for _ in range(20):
        await asyncio.sleep(0)


async def sleeps(_: Event, context: Context) -> None:
    await context.fetch("SELECT pg_sleep(600)")


async def commits_slowly(_: Event, context: Context) -> None:
    await context.fetch("INSERT INTO effects (event_id, attempt, pid, xid) VALUES ('slow', 1, 1, '1')")


SLOW_COMMIT = """
CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(600); RETURN NULL; END $$;
CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON effects DEFERRABLE INITIALLY DEFERRED
   FOR EACH ROW WHEN (NEW.event_id = 'slow') EXECUTE FUNCTION slow()
"""
SLOW_MARK = """
CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(600); RETURN NEW; END $$;
CREATE TRIGGER slow BEFORE UPDATE ON firstclaim.stripe_events
   FOR EACH ROW WHEN (NEW.status = 'completed') EXECUTE FUNCTION slow()
"""


async def test_a_timeout_in_a_pool_cancels_nothing(database_url: str, cancels: list[int]) -> None:
    """The driver would ask the server to cancel, and that ends the wait of a COMMIT for the standby."""
    async with pooled(database_url) as pool:
        pid = await times_out(pool)
        await loop_is_idle()
        assert cancels == []
        database = await asyncpg.connect(database_url)
        await end(database, pid)
        await database.close()


Way = tuple[str, Callable[[Event, Context], Any]]
WAYS: dict[str, Way] = {
    "deadline": ("SELECT", sleeps),
    "mark": (SLOW_MARK, effect),
    "commit": (SLOW_COMMIT, commits_slowly),
}


@pytest.mark.parametrize("way", WAYS)
async def test_a_timeout_of_an_attempt_cancels_nothing(
    database_url: str, stores: Stores, redis_prefix: str, cancels: list[int], way: str
) -> None:
    """Nor do the deadline of a handler, its mark and its COMMIT."""
    connection = await asyncpg.connect(database_url)
    trigger, handler = WAYS[way]
    await connection.execute(trigger)
    patient = await build(database_url, stores.redis_url, redis_prefix)
    claim = await patient.claim()
    world = await build(
        database_url, stores.redis_url, redis_prefix, postgres_timeout_seconds=SHORT_SECONDS, handler_deadline_seconds=1
    )
    with suppress(LedgerUnavailable):
        await world.dispatch(handler, claim)
    await loop_is_idle()
    assert cancels == []
    await patient.close()
    await connection.execute(END_OTHERS)
    await connection.close()
    await world.close()
