"""Migrations on a real Postgres: any number of concurrent ones make one schema, which is that of the models."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import asyncpg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, MetaData
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from firstclaim.errors import LedgerUnavailable, SchemaOutdated, StoreUnsuitable
from firstclaim.handlers.invoices import metadata as invoices
from firstclaim.handlers.load_probe import metadata as load_probe
from firstclaim.inbox.model import metadata as ledger
from firstclaim.migrations import schema
from firstclaim.migrations.adoption import VERSION_TABLE
from firstclaim.migrations.schema import SchemaState, compare, head, migrate, outdated, read_version
from firstclaim.operations.commands import Commands
from firstclaim.operations.selection import Selection
from firstclaim.postgres.connection import open_connection
from firstclaim.status import Status
from tests.blocks import block
from tests.integration.world import until
from tests.stores import Stores

TIMEOUT_SECONDS = 10.0


def engine_of(url: str) -> AsyncEngine:
    async def connect() -> asyncpg.Connection:
        return await asyncpg.connect(url)

    return create_async_engine("postgresql+asyncpg://", async_creator=connect, poolclass=NullPool)


async def fetch(url: str, query: str, *arguments: Any) -> list[tuple[Any, ...]]:
    connection = await asyncpg.connect(url)
    try:
        return [tuple(row) for row in await connection.fetch(query, *arguments)]
    finally:
        await connection.close()


# Our tables as the catalog describes them, independent of the order of columns.
COLUMNS = """
SELECT c.relname, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attidentity, a.attgenerated,
       coalesce(l.collname, ''), coalesce(pg_get_expr(d.adbin, d.adrelid), '')
  FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
  LEFT JOIN pg_collation l ON l.oid = a.attcollation
  LEFT JOIN pg_attrdef d ON (d.adrelid, d.adnum) = (a.attrelid, a.attnum)
 WHERE c.relnamespace = 'firstclaim'::regnamespace AND c.relkind = 'r' AND a.attnum > 0 AND NOT a.attisdropped
   AND c.relname <> 'ledger_revision'
 ORDER BY 1, 2
"""
CONSTRAINTS = """
SELECT conrelid::regclass::text, conname, contype::text, pg_get_constraintdef(oid)
  FROM pg_constraint
 WHERE connamespace = 'firstclaim'::regnamespace AND contype <> 'n'
   AND conrelid IS DISTINCT FROM to_regclass('firstclaim.ledger_revision')
 ORDER BY 1, 2
"""
INDEXES = """
SELECT tablename, indexname, indexdef FROM pg_indexes
 WHERE schemaname = 'firstclaim' AND tablename <> 'ledger_revision' ORDER BY 1, 2
"""


# -- migrating ----------------------------------------------------------------------------------------


async def test_eight_at_once_make_one_schema(empty_url: str) -> None:
    """A first start of eight processes: none fails, one of them migrates, and the ledger has one epoch."""
    results = await asyncio.gather(*(migrate(empty_url, TIMEOUT_SECONDS) for _ in range(8)))
    assert sorted(results, key=str) == [*[(head(), head())] * 7, (None, head())]
    assert await fetch(empty_url, "SELECT version_num FROM firstclaim.ledger_revision") == [(head(),)]
    assert await fetch(empty_url, "SELECT count(*), count(DISTINCT id) FROM firstclaim.ledger_epoch") == [(1, 1)]


async def test_one_migrates_at_a_time(empty_url: str) -> None:
    """While another connection holds the migrations' lock nothing is created; once it is released, the schema is."""
    other = await asyncpg.connect(empty_url)
    try:
        await other.execute("BEGIN")
        await other.execute(schema._LOCK.text)
        migrating = asyncio.create_task(migrate(empty_url, TIMEOUT_SECONDS))

        async def waits() -> bool:
            # Not from pg_stat_activity: within a transaction it shows the same again and again.
            waiting = "SELECT count(*) > 0 FROM pg_locks WHERE NOT granted AND database = (SELECT oid FROM pg_database"
            return migrating.done() or await other.fetchval(waiting + " WHERE datname = current_database())")

        await until(waits)
        assert not migrating.done()
        assert await other.fetchval("SELECT to_regclass('firstclaim.stripe_events') IS NULL")
    finally:
        await other.close()
    assert await migrating == (None, head())


async def test_an_error_of_a_command_says_what_to_do(stores: Stores, empty_url: str) -> None:
    """No such database; no ledger yet; a ledger whose table is gone: each names the step that helps."""
    nowhere = stores.database("no_such_database")
    for work in (migrate(nowhere, TIMEOUT_SECONDS), read_stats(nowhere)):
        with pytest.raises(LedgerUnavailable, match=r"3D000.*create it"):
            await work
    with pytest.raises(SchemaOutdated, match="run `firstclaim migrate`"):
        await read_stats(empty_url)
    await migrate(empty_url, TIMEOUT_SECONDS)
    await read_stats(empty_url)
    await fetch(empty_url, "ALTER TABLE firstclaim.stripe_events RENAME TO elsewhere")
    for work in (migrate(empty_url, TIMEOUT_SECONDS), read_stats(empty_url)):
        with pytest.raises(StoreUnsuitable, match="no table stripe_events"):
            await work


async def read_stats(url: str) -> None:
    """What `firstclaim stats` reads."""
    async with Commands.connect(url, TIMEOUT_SECONDS) as operations:
        await operations.count(Selection())


async def test_migrating_again_changes_nothing(empty_url: str) -> None:
    """A second migration leaves everything as it is, above all the ledger's epoch."""
    assert await migrate(empty_url, TIMEOUT_SECONDS) == (None, head())
    before = await fetch(empty_url, "SELECT * FROM firstclaim.ledger_epoch")
    assert await migrate(empty_url, TIMEOUT_SECONDS) == (head(), head())
    assert await fetch(empty_url, "SELECT * FROM firstclaim.ledger_epoch") == before


async def test_a_table_outside_of_the_schema_is_told(empty_url: str) -> None:
    """The shipped handler's table is among the user's own, so the migration that creates it says so, once."""
    told: list[str] = []
    await migrate(empty_url, TIMEOUT_SECONDS, handlers=["shop.handlers"], say=told.append)
    assert told == []
    for _ in range(2):
        await migrate(empty_url, TIMEOUT_SECONDS, say=told.append)
    assert told == ["table public.payment_failures created, for the shipped handler in FIRSTCLAIM_HANDLERS"]


async def test_a_failed_migration_leaves_nothing(empty_url: str) -> None:
    """Migrations run in one transaction: the obstacle is reported, and no partial schema is left behind."""
    await fetch(empty_url, "CREATE TABLE payment_failures (mine int)")
    with pytest.raises(StoreUnsuitable, match=r"ALTER TABLE public\.payment_failures RENAME"):
        await migrate(empty_url, TIMEOUT_SECONDS)
    assert await fetch(empty_url, "SELECT to_regnamespace('firstclaim')") == [(None,)]
    await fetch(empty_url, "DROP TABLE payment_failures")
    assert await migrate(empty_url, TIMEOUT_SECONDS) == (None, head())


LATER_INDEXES = [  # of 0005, 0006, 0008, 0009, 0014 and 0015
    "stripe_event_attempts_final",
    "stripe_event_attempts_group",
    "stripe_event_payloads_received",
    "stripe_events_give_up",
    "stripe_events_parent",
    "stripe_events_processing",
    "stripe_events_received",
    "stripe_events_unsuccessful",
    "stripe_events_waiting",
    "stripe_events_waiting_abandoned",
]


async def without_indexes(url: str) -> None:
    """The schema as 0004 left it."""
    for name in LATER_INDEXES:
        await fetch(url, f"DROP INDEX firstclaim.{name}")
    dropped = ", ".join(f"DROP COLUMN {name}" for name in ("failure_group", "handler", "error_class", "place"))
    await fetch(url, f"ALTER TABLE firstclaim.stripe_event_attempts {dropped}")
    await fetch(
        url, "DROP TABLE firstclaim.operator_notices, firstclaim.stripe_event_duplicates, firstclaim.operator_pauses"
    )
    await fetch(
        url,
        "ALTER TABLE firstclaim.stripe_event_payloads"
        " DROP COLUMN traceparent, DROP COLUMN headers, DROP COLUMN received_at",
    )
    await fetch(url, "ALTER TABLE firstclaim.stripe_events DROP COLUMN endpoint, DROP COLUMN parent_id")
    await fetch(url, "UPDATE firstclaim.ledger_revision SET version_num = '0004'")


async def indexes(url: str) -> list[str]:
    """Those that the database has of the later indexes."""
    found = await fetch(url, "SELECT indexname FROM pg_indexes WHERE indexname = ANY($1) ORDER BY 1", LATER_INDEXES)
    return [row[0] for row in found]


async def without_attempts(url: str) -> None:
    """The schema as 0003 left it."""
    await without_indexes(url)
    await fetch(url, "ALTER TABLE firstclaim.stripe_events DROP COLUMN claimed_at, DROP COLUMN claimed_by")
    await fetch(url, "DROP TABLE firstclaim.stripe_event_attempts")
    await fetch(url, "UPDATE firstclaim.ledger_revision SET version_num = '0003'")


@pytest.mark.parametrize(
    ("undo", "before"),
    [(without_attempts, "0003"), (without_indexes, "0004")],
    ids=["columns", "indexes"],
)
async def test_the_table_is_changed_between_running_handlers(
    database_url: str, undo: Callable[[str], Awaitable[None]], before: str
) -> None:
    """While a handler writes, the migration waits for it, and no delivery waits for the migration."""
    await undo(database_url)
    handler, delivery = [await asyncpg.connect(database_url) for _ in range(2)]
    try:
        await handler.execute("BEGIN")
        await handler.execute("UPDATE firstclaim.stripe_events SET failures = 0 WHERE false")
        migrating = asyncio.create_task(migrate(database_url, TIMEOUT_SECONDS))

        async def waits() -> bool:
            found = await delivery.fetchval(
                "SELECT count(*) > 0 FROM pg_locks"
                " WHERE NOT granted AND mode = 'AccessExclusiveLock'"
                " AND relation = 'firstclaim.stripe_events'::regclass",
            )
            return migrating.done() or bool(found)

        for _ in range(3):
            await until(waits)
            assert not migrating.done()
            await delivery.execute("SET lock_timeout = '1s'")
            await delivery.execute("UPDATE firstclaim.stripe_events SET failures = 0 WHERE false")
        await handler.execute("COMMIT")
        assert await migrating == (before, head())
    finally:
        await asyncio.gather(handler.close(), delivery.close())
    assert await indexes(database_url) == LATER_INDEXES


async def test_attempts_are_recorded_while_the_migration_waits_for_the_payloads(database_url: str) -> None:
    """Somebody reads bodies for a long time: the migration waits for it, and no attempt that fails waits meanwhile."""
    await without_indexes(database_url)
    await fetch(database_url, "UPDATE firstclaim.ledger_revision SET version_num = '0007'")
    reader, service = [await asyncpg.connect(database_url) for _ in range(2)]
    try:
        await reader.execute("BEGIN")
        await reader.fetch("SELECT FROM firstclaim.stripe_event_payloads LIMIT 1")
        migrating = asyncio.create_task(migrate(database_url, TIMEOUT_SECONDS))

        async def waits() -> bool:
            return bool(
                await service.fetchval(
                    "SELECT count(*) > 0 FROM pg_locks"
                    " WHERE NOT granted AND relation = 'firstclaim.stripe_event_payloads'::regclass"
                )
            )

        await service.execute("SET lock_timeout = '1s'")
        for number in range(3):
            await until(waits)
            await service.execute(
                "INSERT INTO firstclaim.stripe_event_attempts (event_id, attempt, outcome, ended_at, error)"
                " VALUES ('evt_meanwhile', $1, 'failed', now(), 'x')",
                number,
            )
        assert not migrating.done()
        await reader.execute("COMMIT")
        assert await migrating == ("0007", head())
    finally:
        await asyncio.gather(reader.close(), service.close())


async def test_a_large_ledger_gets_no_index(database_url: str) -> None:
    """Every delivery would wait until the index is made; the page's statements make it without blocking."""
    await without_indexes(database_url)
    await fetch(
        database_url,
        """
        INSERT INTO firstclaim.stripe_events
               (event_id, type, livemode, created_at, status, attempt, received_at, due_at, give_up_at, settled_at,
                last_error)
        SELECT 'evt_' || n, 'invoice.paid', true, now(), 'completed', 1, now(), now(), now(), now(), repeat('x', 1900)
          FROM generate_series(1, 36000) AS n
        """,
    )
    await fetch(
        database_url,
        """
        INSERT INTO firstclaim.stripe_event_attempts (event_id, attempt, outcome, ended_at, error)
        SELECT 'evt_' || n, 1, 'failed', now(), repeat('x', 1900) FROM generate_series(1, 36000) AS n
        """,
    )
    await fetch(
        database_url,
        "INSERT INTO firstclaim.stripe_event_payloads (event_id, body)"
        " SELECT 'evt_' || n, convert_to(repeat('x', 1900), 'UTF8') FROM generate_series(1, 36000) AS n",
    )
    assert await migrate(database_url, TIMEOUT_SECONDS) == ("0004", head())
    assert await indexes(database_url) == []
    made = [each.strip() for each in block("docs/how-to/large-ledger.md", "indexes").split(";") if each.strip()]
    assert len(made) == len(LATER_INDEXES)
    for statement in made:
        await fetch(database_url, statement)
    assert await indexes(database_url) == LATER_INDEXES
    assert all("CONCURRENTLY IF NOT EXISTS" in statement for statement in made)


async def test_a_newer_schema_is_left_alone(database_url: str) -> None:
    """A schema that a newer build has migrated is not changed, and this build works on it."""
    await fetch(database_url, "UPDATE firstclaim.ledger_revision SET version_num = '9999_from_the_future'")
    assert await migrate(database_url, TIMEOUT_SECONDS) == ("9999_from_the_future", head())
    assert await fetch(database_url, "SELECT version_num FROM firstclaim.ledger_revision") == [
        ("9999_from_the_future",)
    ]


async def test_an_unreachable_server_is_reported(unused_tcp_port: int) -> None:
    """The error has neither a traceback nor the address."""
    with pytest.raises(LedgerUnavailable) as refused:
        await migrate(f"postgresql://u:c4n4rypw@127.0.0.1:{unused_tcp_port}/x", TIMEOUT_SECONDS)
    assert "c4n4rypw" not in str(refused.value)


# -- the version --------------------------------------------------------------------------------------


async def test_the_version_is_read(empty_url: str) -> None:
    """The version is None without a ledger, and else the revision."""
    connection = await open_connection(empty_url, TIMEOUT_SECONDS)
    try:
        assert await read_version(connection) is None
        await migrate(empty_url, TIMEOUT_SECONDS)
        assert await read_version(connection) == head()
        await connection.execute("DELETE FROM firstclaim.ledger_revision")
        assert await read_version(connection) is None
    finally:
        await connection.close()


def test_what_a_version_means(monkeypatch: pytest.MonkeyPatch) -> None:
    """The version is ours, an earlier one, none, or one that only a newer build can have made."""
    config = Config()
    config.set_main_option("script_location", str(schema._FOLDER))
    known = [script.revision for script in ScriptDirectory.from_config(config).walk_revisions()]
    assert known[::-1] == list(schema.revisions())
    assert known[0] == head()
    assert compare(head()) is SchemaState.CURRENT
    assert compare(None) is SchemaState.OUTDATED
    assert compare("9999_from_the_future") is SchemaState.NEWER
    monkeypatch.setattr(schema, "head", lambda: "9999_from_the_future")
    assert {compare(revision) for revision in known} == {SchemaState.OUTDATED}


@pytest.mark.parametrize(("version", "says"), [(None, "has no ledger yet"), ("0000", "is at schema 0000, this build")])
def test_an_outdated_schema_names_the_command(version: str | None, says: str) -> None:
    """The error says what is wrong and what to run."""
    assert says in str(outdated(version))
    assert str(outdated(version)).endswith(": run `firstclaim migrate`")  # not `serve`, which a mounted one has not


# -- the schema is that of the models -----------------------------------------------------------------


async def test_alembic_finds_nothing_to_migrate(database_url: str) -> None:
    """Tables, columns, types, server defaults, keys and indexes of the migrated database are those of the models."""

    def differences(connection: Connection, metadata: list[MetaData]) -> list[Any]:
        context = MigrationContext.configure(
            connection,
            opts={
                "compare_type": True,
                "compare_server_default": True,
                "include_name": lambda name, kind, _: (
                    (kind, name) not in (("table", "effects"), ("table", VERSION_TABLE))
                ),
            },
        )
        found: list[Any] = compare_metadata(context, metadata)  # type: ignore[arg-type]
        return found

    engine = engine_of(database_url)
    async with engine.connect() as connection:
        assert await connection.run_sync(differences, [invoices, load_probe]) == []
        await connection.exec_driver_sql("SET search_path = firstclaim")
        assert await connection.run_sync(differences, [ledger]) == []
    await engine.dispose()


@pytest.mark.parametrize("query", [COLUMNS, CONSTRAINTS, INDEXES], ids=["columns", "constraints", "indexes"])
async def test_the_catalog_is_that_of_the_models(database_url: str, empty_url: str, query: str) -> None:
    """So is what Alembic does not compare: CHECK constraints, collations, conditions of indexes, every name."""
    engine = engine_of(empty_url)
    async with engine.begin() as connection:
        await connection.exec_driver_sql("CREATE SCHEMA firstclaim")
        await connection.exec_driver_sql("SET LOCAL search_path = firstclaim")
        await connection.run_sync(ledger.create_all)
    await engine.dispose()
    migrated, modelled = await fetch(database_url, query), await fetch(empty_url, query)
    assert migrated == modelled
    assert len(migrated) >= 4


async def test_the_database_knows_every_status(database_url: str) -> None:
    """The enum and the CHECK constraint name the same states."""
    [(definition,)] = await fetch(
        database_url, "SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conname = 'stripe_events_status_check'"
    )
    assert set(definition.split("'")[1::2]) == set(Status)
