"""The ledger's schema: the database's version, and the migrations to this build's version.

Guarantees: migrations run under an advisory lock that is taken in their own transaction, so any number of processes
may run `migrate` at once (without the lock, 35 of 40 concurrent first boots failed). Migrations only add: an older
build keeps running on a newer schema, as a rolling deploy and its rollback need.
"""

from enum import Enum, auto
from functools import cache
from pathlib import Path

import asyncpg
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

import firstclaim.migrations
from firstclaim.errors import LedgerUnavailable, SchemaOutdated
from firstclaim.postgres.advice import explain
from firstclaim.postgres.connection import UNAVAILABLE, open_connection

_LOCK = text("SELECT pg_advisory_xact_lock(7331501200934421337)")  # any constant that nothing else uses


class SchemaState(Enum):
    """The database's schema compared with this build's."""

    CURRENT = auto()
    OUTDATED = auto()
    NEWER = auto()  # migrated by a newer build; it works, because migrations only add


@cache
def _scripts() -> ScriptDirectory:
    return ScriptDirectory.from_config(_config())


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(str(firstclaim.migrations.__file__)).parent))
    return config


@cache
def head() -> str:
    """The revision that this build needs."""
    revision = _scripts().get_current_head()
    if revision is None:
        raise RuntimeError("the package holds no migrations")
    return revision


@cache
def compare(version: str | None) -> SchemaState:
    """Compare a stored revision with this build's; None is a database without a ledger."""
    if version == head():
        return SchemaState.CURRENT
    known = {script.revision for script in _scripts().walk_revisions()}
    return SchemaState.OUTDATED if version is None or version in known else SchemaState.NEWER


def outdated(version: str | None) -> SchemaOutdated:
    """The error to raise, with the command to run."""
    state = "has no ledger yet" if version is None else f"is at schema {version}, this build needs {head()}"
    return SchemaOutdated(f"the database {state}: run `firstclaim migrate`, or start with `firstclaim serve --migrate`")


async def read_version(connection: asyncpg.Connection) -> str | None:
    """The stored revision, read outside a transaction; None if there is no ledger yet."""
    try:
        version: str | None = await connection.fetchval("SELECT version_num FROM alembic_version")
    except asyncpg.UndefinedTableError:
        return None
    return version


async def migrate(dsn: str, timeout_seconds: float) -> tuple[str | None, str]:
    """Migrate the database to `head()`. Returns the revisions before and after. Raises `LedgerUnavailable`."""
    engine = create_async_engine(
        "postgresql+asyncpg://",
        async_creator=lambda: open_connection(dsn, timeout_seconds),
        poolclass=NullPool,
    )
    try:
        async with engine.begin() as connection:
            before = await connection.run_sync(_upgrade)
    except UNAVAILABLE as error:
        raise LedgerUnavailable(explain(error)) from error
    finally:
        await engine.dispose()
    return before, head()


def _upgrade(connection: Connection) -> str | None:
    connection.execute(_LOCK)
    before = MigrationContext.configure(connection).get_current_revision()
    if compare(before) is SchemaState.OUTDATED:
        config = _config()
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
    return before
