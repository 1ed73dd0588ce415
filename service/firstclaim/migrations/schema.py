"""The ledger's schema: the database's version, and the migrations to this build's version.

Guarantees: everything of ours is in a schema of our own, also the table with the version, so an Alembic of yours in the
same database sees none of it, and its `alembic_version` is neither read nor written. Migrations run under an advisory
lock that is taken in their own transaction, so any number of processes may run `migrate` at once (without the lock, 35
of 40 concurrent first boots failed). Migrations only add: an older build keeps running on a newer schema, as a rolling
deploy and its rollback need.
"""

from collections.abc import Callable, Sequence
from enum import Enum, auto
from functools import cache
from pathlib import Path

import asyncpg
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

import firstclaim.migrations
from firstclaim.errors import LedgerUnavailable, SchemaOutdated, StoreUnsuitable
from firstclaim.migrations.adoption import VERSION_TABLE, adopt, farewell, find_old_ledger, leave_views
from firstclaim.migrations.handler_tables import create, tables_of
from firstclaim.migrations.rights import (
    FOREIGN_TABLE,
    foreign_table,
    grants,
    make_schema,
    refuse_encoding,
    refuse_foreign_columns,
    refuse_foreign_tables,
    refuse_without_usage,
)
from firstclaim.postgres.advice import explain
from firstclaim.postgres.connection import UNAVAILABLE, PinnedConnection, open_connection
from firstclaim.postgres.statement import statement
from firstclaim.schema_name import DEFAULT_SCHEMA

# The stored revision, and a look into the ledger itself: a version without a ledger is none.
_VERSION = statement(f"""
SELECT version_num, EXISTS (SELECT FROM firstclaim.stripe_events WHERE event_id = '') AS looked
  FROM firstclaim.{VERSION_TABLE}
""")
_QUOTED = text("SELECT quote_ident(:schema)")
_EXISTS = text("""
SELECT EXISTS (SELECT FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
                WHERE n.nspname = :schema AND c.relname = :table)
""")
_IN_SCHEMA = text("SELECT set_config('search_path', :schema, true)")  # the revisions name no schema
_IN_SEARCH_PATH = text("SET LOCAL search_path TO DEFAULT")
_LOCK = text("SELECT pg_advisory_xact_lock(7331501200934421337)")  # any constant that nothing else uses


class SchemaState(Enum):
    """The database's schema compared with this build's."""

    CURRENT = auto()
    OUTDATED = auto()
    NEWER = auto()  # migrated by a newer build; it works, because migrations only add


_FOLDER = Path(str(firstclaim.migrations.__file__)).parent


@cache
def revisions() -> tuple[str, ...]:
    """The revisions of this build, oldest first: what the names of their files begin with.

    Not asked of Alembic, which takes a tenth of the time that `serve` needs to start, and is needed to migrate only.
    """
    return tuple(sorted(file.name.partition("_")[0] for file in _FOLDER.glob("versions/[0-9]*_*.py")))


def head() -> str:
    """The revision that this build needs."""
    if not revisions():
        raise RuntimeError("the package holds no migrations")
    return revisions()[-1]


def compare(version: str | None) -> SchemaState:
    """Compare a stored revision with this build's; None is a database without a ledger."""
    if version == head():
        return SchemaState.CURRENT
    return SchemaState.OUTDATED if version is None or version in revisions() else SchemaState.NEWER


def outdated(version: str | None) -> SchemaOutdated:
    """The error to raise, with the command to run."""
    state = "has no ledger yet" if version is None else f"is at schema {version}, this build needs {head()}"
    return SchemaOutdated(f"the database {state}: run `firstclaim migrate`")


def _gone(schema: str) -> StoreUnsuitable:
    return StoreUnsuitable(
        f"schema {schema} has the table {VERSION_TABLE}, and no table stripe_events: restore it from a backup, or "
        "name the schema of the ledger in FIRSTCLAIM_SCHEMA"
    )


async def read_version(connection: PinnedConnection) -> str | None:
    """The stored revision, read outside a transaction; None if there is no ledger yet. Also looks into the ledger.

    Raises what asyncpg raises, and `StoreUnsuitable` if the role lacks a right, or a table of our name is not ours.
    """
    try:
        rows = await _VERSION.fetch(connection)
    except (asyncpg.UndefinedTableError, asyncpg.UndefinedColumnError, asyncpg.InvalidSchemaNameError):
        if (foreign := await connection.fetchval(FOREIGN_TABLE, connection.schema)) is not None:
            raise foreign_table(connection.schema, foreign) from None
        if await connection.fetchval("SELECT to_regclass($1)", f'"{connection.schema}".{VERSION_TABLE}') is not None:
            raise _gone(connection.schema) from None
        return None
    except asyncpg.InsufficientPrivilegeError as error:
        role = await connection.fetchval("SELECT quote_ident(current_user)")
        raise StoreUnsuitable(f"{error}: let its owner run {grants(connection.schema, role)}") from error
    version: str | None = rows[0]["version_num"] if rows else None
    return version


async def migrate(
    dsn: str,
    timeout_seconds: float,
    *,
    schema: str = DEFAULT_SCHEMA,
    handlers: Sequence[str] = ("firstclaim.handlers",),
    say: Callable[[str], None] = lambda _: None,
) -> tuple[str | None, str]:
    """Migrate the database to `head()`. Returns the revisions before and after. `handlers`: the handler modules.

    `say` is called with each line that an operator is to read. Raises `LedgerUnavailable`, and `StoreUnsuitable` with
    the statement to run where a right is missing or a table of our name is not ours.
    """
    engine = create_async_engine(
        "postgresql+asyncpg://",
        async_creator=lambda: open_connection(dsn, timeout_seconds, schema=schema, for_migration=True),
        poolclass=NullPool,
    )
    lines: list[str] = []
    try:
        async with engine.begin() as connection:
            before = await connection.run_sync(_upgrade, schema, handlers, lines)
    except UNAVAILABLE as error:
        raise LedgerUnavailable(explain(error)) from error
    finally:
        await engine.dispose()
    for line in lines:
        say(line)
    return before, head()


def _upgrade(connection: Connection, schema: str, handlers: Sequence[str], lines: list[str]) -> str | None:
    """Everything in one transaction, which begins with the lock."""
    from alembic import command
    from alembic.config import Config
    from alembic.migration import MigrationContext

    connection.execute(_LOCK)
    old = None
    quoted = connection.scalar(_QUOTED, {"schema": schema})
    if connection.scalar(_EXISTS, {"schema": schema, "table": VERSION_TABLE}):
        refuse_foreign_columns(connection, schema)
        if not connection.scalar(_EXISTS, {"schema": schema, "table": "stripe_events"}):
            raise _gone(schema)
        refuse_without_usage(connection, schema)
    else:
        refuse_encoding(connection)
        if (old := find_old_ledger(connection, schema)) is None:
            refuse_foreign_tables(connection, schema)
        make_schema(connection, schema, old.owner if old else None)
        if old is not None:
            adopt(connection, old, quoted)
    connection.execute(_IN_SCHEMA, {"schema": quoted})
    context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
    before = context.get_current_revision()
    if compare(before) is SchemaState.OUTDATED:
        config = Config()
        config.set_main_option("script_location", str(_FOLDER))
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
    connection.execute(_IN_SEARCH_PATH)
    if old is not None and old.schema != quoted:
        leave_views(connection, old, quoted)
        lines += farewell(old, quoted)
    lines += create(connection, tables_of(handlers), schema)
    return before
