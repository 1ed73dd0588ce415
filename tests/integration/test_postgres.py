"""Connections to a real Postgres: what is pinned, what is refused, and that nothing waits for a frozen server."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from types import SimpleNamespace

import asyncpg
import pytest
from asyncpg.connection import LoggedQuery
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as QueueTimeout

from firstclaim.errors import LedgerUnavailable
from firstclaim.postgres import connection as connection_module
from firstclaim.postgres import epoch as epoch_module
from firstclaim.postgres import probe as probe_module
from firstclaim.postgres.connection import PinnedConnection, describe, open_connection
from firstclaim.postgres.epoch import Epoch, EpochStatement, read_epoch
from firstclaim.postgres.places import Places
from firstclaim.postgres.pool import Pool
from firstclaim.postgres.probe import Probe
from tests import operator
from tests.integration.world import until, until_closed
from tests.proxy import Mode, before_postgres
from tests.stores import Stores

TIMEOUT_SECONDS = 10.0
SHORT_SECONDS = 0.5
STATEMENT_MILLISECONDS = 700  # a backend whose client gave up goes on until then, and has its place
# What a busy machine adds to a timeout.
SLACK_SECONDS = 1.2


@asynccontextmanager
async def opened(
    url: str, *, size: int = 1, timeout_seconds: float = TIMEOUT_SECONDS
) -> AsyncIterator[tuple[Pool, Epoch]]:
    """A pool as the service has it, and the epoch that its connections confirm."""
    epoch = Epoch(fresh_seconds=60)
    probe = Probe(url, timeout_seconds=timeout_seconds)
    pins = {"statement_timeout": f"{STATEMENT_MILLISECONDS}ms"}
    pool = Pool(Places(url, probe, size=size, timeout_seconds=timeout_seconds, epoch=epoch, pins=pins))
    try:
        yield pool, epoch
    finally:
        await pool.close()
        await probe.close()


@pytest.fixture
async def admin(database_url: str) -> AsyncIterator[PinnedConnection]:
    """The test's own connection to the database."""
    connection: PinnedConnection = await asyncpg.connect(database_url, connection_class=PinnedConnection)
    yield connection
    await connection.close()


async def configure(admin: PinnedConnection, setting: str) -> None:
    """A default of this database, for every connection from now on."""
    name = await admin.fetchval("SELECT quote_ident(current_database())")
    await admin.execute(f"ALTER DATABASE {name} SET {setting}")


async def served(pool: Pool) -> bool:
    """Whether the pool serves a caller at this moment."""
    with suppress(LedgerUnavailable):
        return await fetch_value(pool, "SELECT 1") == 1
    return False


async def fetch_value(pool: Pool, statement: str) -> object:
    async with pool.acquire(TIMEOUT_SECONDS) as connection:
        return await connection.fetchval(statement)


# -- pins ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["off", "local", "remote_write"])
async def test_synchronous_commit_is_pinned(database_url: str, admin: PinnedConnection, value: str) -> None:
    """Whatever the database says, a COMMIT that was answered is on disk, also on a reused connection."""
    await configure(admin, f"synchronous_commit = {value}")
    async with opened(database_url) as (pool, _):
        for _ in range(2):
            assert await fetch_value(pool, "SHOW synchronous_commit") == "on"


async def test_a_stronger_synchronous_commit_stays(database_url: str, admin: PinnedConnection) -> None:
    """`remote_apply` promises more than `on`: the pin only raises what the database says."""
    await configure(admin, "synchronous_commit = remote_apply")
    async with opened(database_url) as (pool, _):
        assert await fetch_value(pool, "SHOW synchronous_commit") == "remote_apply"


@pytest.mark.parametrize("value", ["serializable", "repeatable read"])
async def test_read_committed_is_pinned(database_url: str, admin: PinnedConnection, value: str) -> None:
    """Whatever the database says, the claim statements see what other transactions have committed."""
    await configure(admin, f"default_transaction_isolation = '{value}'")
    async with opened(database_url) as (pool, _):
        for _ in range(2):
            assert await fetch_value(pool, "SHOW transaction_isolation") == "read committed"


@pytest.mark.parametrize(("value", "pinned"), [("error", "warning"), ("debug1", "debug1")])
async def test_warnings_are_sent(database_url: str, admin: PinnedConnection, value: str, pinned: str) -> None:
    """Where the database keeps warnings back, a COMMIT whose wait was cancelled would look like any other."""
    await configure(admin, f"client_min_messages = {value}")
    async with opened(database_url) as (pool, _):
        assert await fetch_value(pool, "SHOW client_min_messages") == pinned
        async with pool.acquire(TIMEOUT_SECONDS) as connection:
            await connection.execute("DO $$ BEGIN RAISE WARNING 'of the server''s'; END $$")
            assert connection.warnings == 1


async def test_a_role_cannot_unpin_it(database_url: str, admin: PinnedConnection) -> None:
    """A role's settings in this database override the database's, but not ours."""
    name = await admin.fetchval("SELECT quote_ident(current_database())")
    for setting in ("synchronous_commit = off", "default_transaction_isolation = serializable"):
        await admin.execute(f"ALTER ROLE CURRENT_USER IN DATABASE {name} SET {setting}")
    try:
        async with opened(database_url) as (pool, _):
            assert await fetch_value(pool, "SHOW synchronous_commit") == "on"
            assert await fetch_value(pool, "SHOW transaction_isolation") == "read committed"
    finally:
        await admin.execute(f"ALTER ROLE CURRENT_USER IN DATABASE {name} RESET ALL")


async def test_a_read_only_server_is_refused(database_url: str, admin: PinnedConnection) -> None:
    """The losing side of a failover is reported on connecting, not at the first insert; once writable, it is used."""
    await configure(admin, "default_transaction_read_only = on")
    async with opened(database_url) as (pool, epoch):
        with pytest.raises(LedgerUnavailable, match="the server is read-only"):
            await fetch_value(pool, "SELECT 1")
        assert epoch.current is None
        await admin.execute("SET default_transaction_read_only = off")
        await configure(admin, "default_transaction_read_only = off")
        assert await fetch_value(pool, "SELECT 1") == 1


async def test_a_standby_is_refused(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server in recovery is read-only as well."""
    monkeypatch.setattr(connection_module, "_PIN", connection_module._PIN.replace("pg_is_in_recovery()", "true"))
    with pytest.raises(LedgerUnavailable, match="the server is read-only"):
        await open_connection(database_url, TIMEOUT_SECONDS)


@pytest.mark.parametrize("pin", ["'on'", "'read committed'"])
async def test_a_pin_that_does_not_hold_is_refused(
    database_url: str, monkeypatch: pytest.MonkeyPatch, pin: str
) -> None:
    """A connection on which a setting cannot be pinned (behind a pooler, for example) is closed and not used."""
    other = {"'on'": "'off'", "'read committed'": "'serializable'"}[pin]
    monkeypatch.setattr(connection_module, "_PIN", connection_module._PIN.replace(pin, other))
    with pytest.raises(LedgerUnavailable, match="cannot be pinned"):
        await open_connection(database_url, TIMEOUT_SECONDS)


# -- the epoch ----------------------------------------------------------------------------------------


async def test_a_connection_knows_the_epoch_it_was_opened_under(database_url: str) -> None:
    """The epoch is read when the connection is opened, and confirmed for the process."""
    async with opened(database_url) as (pool, epoch):
        assert epoch.current is None
        async with pool.acquire(TIMEOUT_SECONDS) as connection:
            found = connection.epoch
            assert found is not None
            assert len(found) == 16
            assert found == epoch.current == await read_epoch(connection)


async def test_rotating_changes_the_epoch(database_url: str) -> None:
    """Every rotation changes the epoch, and a pool that has noticed it opens new connections."""
    before, after = await operator.rotate(database_url)
    assert None not in (before, after)
    assert before != after
    assert (await operator.rotate(database_url))[0] == after
    async with opened(database_url) as (pool, epoch):
        first = await fetch_value(pool, "SELECT pg_backend_pid()")
        assert await fetch_value(pool, "SELECT pg_backend_pid()") == first
        _, newest = await operator.rotate(database_url)
        epoch.confirm(newest)
        async with pool.acquire(TIMEOUT_SECONDS) as connection:
            assert connection.epoch == newest
            assert connection.get_server_pid() != first


async def surveyed(connection: PinnedConnection) -> str | None:
    """The epoch as a round of recovery reads it, beside something else."""
    epoch, row = await EpochStatement("1 AS one").fetch(connection)
    assert row["one"] == 1
    return epoch


Read = Callable[[PinnedConnection], Awaitable[str | None]]
each_way = pytest.mark.parametrize("read", [read_epoch, surveyed])


@each_way
@pytest.mark.usefixtures("superuser")
@pytest.mark.parametrize(
    "change",
    [
        "UPDATE firstclaim.ledger_epoch SET id = gen_random_uuid()",
        "CREATE FUNCTION public.pg_walfile_name(pg_lsn) RETURNS text RETURN '0000000200000000000000FF'",
        "CREATE FUNCTION public.pg_control_system(OUT system_identifier bigint) RETURN 7",
    ],
)
async def test_uuid_system_and_timeline_each_make_the_epoch(
    database_url: str, admin: PinnedConnection, change: str, read: Read
) -> None:
    """A rotation, a new timeline (a promoted standby, point-in-time recovery) and another cluster change the epoch."""
    before = await read(admin)
    assert before == await read_epoch(admin)
    await admin.execute(change)
    await admin.execute("SET search_path = public, pg_catalog")
    after = await read(admin)
    assert None not in (before, after)
    assert before != after


@each_way
async def test_a_server_that_hides_its_identity_has_an_epoch(
    database_url: str, admin: PinnedConnection, read: Read
) -> None:
    """Some managed servers refuse both functions: the epoch is made of the uuid alone, and rotates."""
    await admin.execute(
        "CREATE FUNCTION public.pg_control_system(OUT system_identifier bigint) LANGUAGE plpgsql"
        " AS $$ BEGIN RAISE insufficient_privilege; END $$"
    )
    await admin.execute("SET search_path = public, pg_catalog")
    before = await read(admin)
    assert before is not None
    assert before == await read(admin)
    await admin.execute("UPDATE firstclaim.ledger_epoch SET id = gen_random_uuid()")
    assert before != await read(admin)


async def test_a_connection_that_was_opened_before_the_ledger_reads_the_same_epoch(
    database_url: str, admin: PinnedConnection
) -> None:
    """`migrate` creates the tables while the service runs: the server is asked for its identity from then on."""
    async with opened(database_url) as (pool, _), pool.acquire(TIMEOUT_SECONDS) as connection:
        connection.schema = "elsewhere"
        assert await read_epoch(connection) is None
        connection.schema = "firstclaim"
        assert await surveyed(connection) == await read_epoch(admin)


async def refusals_of(connection: PinnedConnection, read: Read) -> list[str]:
    """The errors that reading the epoch twice causes on the server: each is a line in its log."""
    refused: list[str] = []

    async def note(query: LoggedQuery) -> None:
        if query.exception is not None:
            refused.append(type(query.exception).__name__)

    with connection.query_logger(note):
        first = await read(connection)
        assert first is not None
        assert first == await read(connection)
        await connection.execute("SELECT 1")  # until then the last of them may not be noted
    return refused


@each_way
@pytest.mark.usefixtures("superuser")
@pytest.mark.parametrize("function", ["pg_control_system()", "pg_walfile_name(pg_lsn)", "pg_current_wal_insert_lsn()"])
async def test_a_role_without_the_right_is_not_refused(admin: PinnedConnection, function: str, read: Read) -> None:
    """A role that may not call one of the functions does not call it: the server's log has no ERROR of ours."""
    role = f"test_{secrets.token_hex(6)}"
    await admin.execute(f"CREATE ROLE {role}; GRANT USAGE ON SCHEMA firstclaim TO {role}")
    await admin.execute(f"GRANT SELECT ON firstclaim.ledger_epoch TO {role}")
    await admin.execute(f"REVOKE EXECUTE ON FUNCTION {function} FROM PUBLIC")
    try:
        await admin.execute(f"SET ROLE {role}")
        assert await refusals_of(admin, read) == []
    finally:
        await admin.execute(f"RESET ROLE; DROP OWNED BY {role}; DROP ROLE {role}")


@each_way
@pytest.mark.parametrize(
    ("state", "calls"),
    [
        ("insufficient_privilege", 1),
        ("feature_not_supported", 1),
        ("raise_exception", 1),
        ("internal_error", 1),
        ("object_not_in_prerequisite_state", 2),
        ("query_canceled", 2),
    ],
)
async def test_a_function_that_refuses_is_called_once(
    admin: PinnedConnection, state: str, calls: int, read: Read
) -> None:
    """A function that refuses by itself, as on some managed servers, is called once per connection.

    One that fails for the moment is called again.
    """
    await admin.execute(
        "CREATE FUNCTION public.pg_control_system(OUT system_identifier bigint) LANGUAGE plpgsql"
        f" AS $$ BEGIN RAISE {state}; END $$"
    )
    await admin.execute("SET search_path = public, pg_catalog")
    assert len(await refusals_of(admin, read)) == calls


async def test_without_a_ledger_there_is_no_epoch(empty_url: str) -> None:
    """In a database that was never migrated the epoch is None, so no marker counts."""
    connection = await open_connection(empty_url, TIMEOUT_SECONDS)
    assert connection.epoch is None
    await connection.close()


def test_an_epoch_counts_while_it_is_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """An epoch counts for its time after a confirmation and no longer; a new confirmation renews it."""
    now = 1000.0
    monkeypatch.setattr(epoch_module, "time", SimpleNamespace(monotonic=lambda: now))
    epoch = Epoch(fresh_seconds=5)
    seen = [epoch.current]
    epoch.confirm("a")
    now += 5
    seen.append(epoch.current)
    now += 0.001
    seen.append(epoch.current)
    assert epoch.latest == "a"
    epoch.confirm("b")
    seen.append(epoch.current)
    epoch.confirm(None)
    seen.append(epoch.current)
    assert seen == [None, "a", None, "b", None]


# -- frozen, stopped, full ----------------------------------------------------------------------------


async def test_a_frozen_server_is_given_up_in_time(database_url: str) -> None:
    """An unanswered statement is `LedgerUnavailable` at its timeout, and the pool works once the server answers."""
    async with before_postgres(database_url) as (proxy, url), opened(url, timeout_seconds=SHORT_SECONDS) as (pool, _):
        assert await fetch_value(pool, "SELECT 1") == 1
        for mode in (Mode.FROZEN, Mode.MUTE):
            proxy.switch(mode)
            for _ in range(2):  # the first with an open connection, the second without
                began = time.monotonic()
                with pytest.raises(LedgerUnavailable):
                    async with pool.acquire(SHORT_SECONDS) as connection:
                        await connection.execute("SELECT 1")
                assert time.monotonic() - began < SHORT_SECONDS + SLACK_SECONDS
            proxy.switch(Mode.OPEN)
            await until(lambda: served(pool))


async def test_a_slow_statement_is_given_up_in_time(database_url: str, admin: PinnedConnection) -> None:
    """A statement that the server is still running is abandoned too, and its place in the pool is free."""
    async with opened(database_url) as (pool, _):
        began = time.monotonic()
        with pytest.raises(LedgerUnavailable):
            async with pool.acquire(SHORT_SECONDS) as connection:
                await connection.execute("SELECT pg_sleep(600)")
        assert time.monotonic() - began < SHORT_SECONDS + SLACK_SECONDS
        assert await fetch_value(pool, "SELECT 1") == 1
    running = "SELECT count(*) = 0 FROM pg_stat_activity WHERE query LIKE '%pg_sleep(600)%' AND pid <> pg_backend_pid()"
    await admin.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep(600)'"
    )
    await until(lambda: admin.fetchval(running))


async def test_a_connection_that_timed_out_does_not_go_back(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is terminated: the next caller would wait for the same frozen backend."""
    monkeypatch.setattr(probe_module, "_LATE_SECONDS", 30)  # on a busy machine, the probe's commit may be slow
    async with opened(database_url) as (pool, _):
        lost = asyncio.Event()
        async with pool.acquire(TIMEOUT_SECONDS) as connection:
            connection.add_termination_listener(lambda _: lost.set())
        with pytest.raises(LedgerUnavailable):
            async with pool.acquire(SHORT_SECONDS) as connection:
                await connection.execute("SELECT pg_sleep(600)")
        async with asyncio.timeout(TIMEOUT_SECONDS):
            await lost.wait()
        assert await fetch_value(pool, "SELECT 1") == 1


async def test_a_cancelled_caller_frees_its_place(database_url: str) -> None:
    """Its connection is closed, whatever it was doing, and the next caller gets a new one at once."""
    async with opened(database_url) as (pool, _):
        started = asyncio.Event()

        async def work() -> None:
            async with pool.acquire(TIMEOUT_SECONDS) as connection:
                started.set()
                await connection.execute("SELECT pg_sleep(600)")

        task = asyncio.create_task(work())
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with asyncio.timeout(5):
            assert await fetch_value(pool, "SELECT 1") == 1


async def test_closing_does_not_wait_for_a_frozen_server(database_url: str) -> None:
    """Three connections to a frozen server are closed in a moment: they do not delay a shutdown."""
    async with before_postgres(database_url) as (proxy, url), opened(url, size=3) as (pool, _):
        async with pool.acquire(TIMEOUT_SECONDS), pool.acquire(TIMEOUT_SECONDS), pool.acquire(TIMEOUT_SECONDS):
            pass
        proxy.switch(Mode.FROZEN)
        await closes_at_once(pool)
        proxy.switch(Mode.OPEN)


async def test_closing_does_not_wait_for_a_connection_in_use(database_url: str, admin: PinnedConnection) -> None:
    """Its work can end, and the connection is closed when it returns."""
    async with opened(database_url) as (pool, _):
        async with pool.acquire(TIMEOUT_SECONDS) as connection:
            await closes_at_once(pool)
            pid = await connection.fetchval("SELECT pg_backend_pid()")
        await until(lambda: admin.fetchval("SELECT count(*) = 0 FROM pg_stat_activity WHERE pid = $1", pid))


async def closes_at_once(pool: Pool) -> None:
    began = time.monotonic()
    async with asyncio.timeout(10):
        await pool.close()
    assert time.monotonic() - began < SLACK_SECONDS


async def test_a_stopped_server_is_refused_at_once(database_url: str) -> None:
    """While the server is down the error comes at once; soon after it is back, callers connect."""
    async with before_postgres(database_url) as (proxy, url), opened(url) as (pool, _):
        assert await fetch_value(pool, "SELECT 1") == 1
        proxy.switch(Mode.REFUSE)
        for _ in range(3):
            began = time.monotonic()
            with pytest.raises(LedgerUnavailable):
                await fetch_value(pool, "SELECT 1")
            assert time.monotonic() - began < SLACK_SECONDS
        proxy.switch(Mode.OPEN)
        await until(lambda: served(pool))


async def test_a_backend_that_ended_in_the_pool_is_replaced(database_url: str, admin: PinnedConnection) -> None:
    """After a restart of the server every connection of the pool is dead, and no caller sees an error."""
    async with opened(database_url, size=3) as (pool, _):
        async with (
            pool.acquire(TIMEOUT_SECONDS) as one,
            pool.acquire(TIMEOUT_SECONDS) as two,
            pool.acquire(TIMEOUT_SECONDS) as three,
        ):
            pids = [each.get_server_pid() for each in (one, two, three)]
        await admin.execute("SELECT pg_terminate_backend(pid) FROM unnest($1::int[]) AS pid", pids)
        await until_closed(one, two, three)
        for _ in range(6):
            assert await fetch_value(pool, "SELECT 1") == 1


async def test_a_pool_in_use_is_waited_for(database_url: str) -> None:
    """A waiting caller gets the connection that returns; after the queue's time it gets `LedgerUnavailable`."""
    async with opened(database_url) as (pool, _):
        async with pool.acquire(TIMEOUT_SECONDS):
            waiting = asyncio.create_task(fetch_value(pool, "SELECT 1"))
            await asyncio.sleep(0)
            assert not waiting.done()
        assert await waiting == 1
    async with opened(database_url, timeout_seconds=SHORT_SECONDS) as (pool, _), pool.acquire(TIMEOUT_SECONDS):
        with pytest.raises(LedgerUnavailable):
            await fetch_value(pool, "SELECT 1")


async def test_a_connection_in_a_transaction_does_not_go_back(database_url: str, admin: PinnedConnection) -> None:
    """A connection whose transaction was left open is closed: the next caller would work in that transaction."""
    async with opened(database_url) as (pool, _):
        async with pool.acquire(TIMEOUT_SECONDS) as connection:
            await connection.execute("BEGIN; DELETE FROM firstclaim.ledger_epoch")
            pid = connection.get_server_pid()
        assert await fetch_value(pool, "SELECT pg_backend_pid()") != pid
    assert await admin.fetchval("SELECT count(*) FROM firstclaim.ledger_epoch") == 1


async def test_many_at_once_open_one_pool(database_url: str) -> None:
    """Twenty callers at once, before anything is open, are all served on no more connections than its size."""
    async with opened(database_url, size=2) as (pool, _):
        pids = await asyncio.gather(*(fetch_value(pool, "SELECT pg_backend_pid()") for _ in range(20)))
    assert len(set(pids)) <= 2


# -- errors -------------------------------------------------------------------------------------------


async def test_an_error_is_described_without_values(database_url: str) -> None:
    """It is described by class and SQLSTATE: the server's message may quote a row or a password."""
    async with opened(database_url) as (pool, _):
        with pytest.raises(LedgerUnavailable) as refused:
            await fetch_value(pool, "SELECT CAST('c4n4rypw' AS integer)")
    assert str(refused.value) == "InvalidTextRepresentationError (22P02)"
    assert describe(ConnectionRefusedError(111, "c4n4rypw")) == "ConnectionRefusedError"
    assert describe(QueueTimeout("c4n4rypw")) == "TimeoutError"
    assert describe(OperationalError("SELECT 'c4n4rypw'", {}, ValueError("c4n4rypw"))) == "ValueError"
    with pytest.raises(TimeoutError) as late:
        async with asyncio.timeout(0):
            await asyncio.Event().wait()
    assert describe(late.value) == "TimeoutError"


async def test_a_lost_connection_puts_the_epoch_in_doubt(database_url: str) -> None:
    """A server that is restored or fails over drops its connections: no marker counts until the epoch is read again."""
    async with opened(database_url) as (pool, epoch):
        async with pool.acquire(TIMEOUT_SECONDS) as connection:
            pid = connection.get_server_pid()
        confirmed = epoch.current
        assert confirmed is not None
        other = await asyncpg.connect(database_url)
        await other.execute("SELECT pg_terminate_backend($1)", pid)
        await other.close()

        async def in_doubt() -> bool:
            return epoch.current is None

        await until(in_doubt)
        assert await fetch_value(pool, "SELECT 1") == 1
        assert epoch.current == confirmed


async def test_a_wrong_password_is_not_repeated(stores: Stores) -> None:
    """No part of the address is in the error, whatever is wrong with it."""
    for url in ("postgresql://c4n4rypw:c4n4rypw@127.0.0.1:1/c4n4rypw", stores.database("c4n4rypw")):
        async with opened(url) as (pool, _):
            with pytest.raises(LedgerUnavailable) as refused:
                await fetch_value(pool, "SELECT 1")
            assert "c4n4rypw" not in str(refused.value)
        with pytest.raises(LedgerUnavailable) as refused:
            await operator.rotate(url)
        assert "c4n4rypw" not in str(refused.value)
