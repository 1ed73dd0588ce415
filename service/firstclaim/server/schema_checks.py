"""The checks of the ledger's schema: the revision, the rights, the tables of the shipped handlers, a second ledger."""

from collections.abc import AsyncIterator, Sequence

from firstclaim.errors import StoreUnsuitable
from firstclaim.migrations.adoption import OLD_LEDGER, TABLES
from firstclaim.migrations.handler_tables import COLUMNS, faults, tables_of
from firstclaim.migrations.rights import grants
from firstclaim.migrations.schema import SchemaState, compare, outdated, read_version
from firstclaim.postgres.connection import PinnedConnection
from firstclaim.postgres.epoch import read_epoch
from firstclaim.server.check import Check, fail, ok, warn

_MISSING_RIGHTS = """
SELECT quote_ident(current_user) AS role, c.relname AS name, privilege
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace,
       unnest('{SELECT,INSERT,UPDATE,DELETE}'::text[]) privilege
 WHERE n.nspname = $1 AND c.relname = ANY($2) AND NOT has_table_privilege(c.oid, privilege)
 ORDER BY c.relname, privilege DESC LIMIT 1
"""
_IN_SEARCH_PATH = """
SELECT quote_ident(current_user) AS role, quote_ident(current_database()) AS database
 WHERE $1 = ANY(current_schemas(false))
"""


async def check_schema(connection: PinnedConnection, handlers: Sequence[str]) -> AsyncIterator[Check]:
    """Check what the statements of this build need. Changes nothing."""
    try:
        revision = await read_version(connection)
    except StoreUnsuitable as error:
        yield fail("schema", str(error))
        return
    state = compare(revision)
    if state is SchemaState.OUTDATED:
        yield fail("schema", str(outdated(revision)))
        return
    if row := await connection.fetchrow(_MISSING_RIGHTS, connection.schema, list(TABLES)):
        statement = grants(connection.schema, row["role"])
        yield fail(
            "schema",
            f"the role {row['role']} may not {row['privilege']} {connection.schema}.{row['name']}: run {statement}",
        )
        return
    place = f"{revision} in schema {connection.schema}"
    if state is SchemaState.NEWER:
        yield warn("schema", f"at {place}, migrated by a newer firstclaim: this build works with it")
    else:
        yield ok("schema", f"at {place}, ledger epoch {await read_epoch(connection)}")
    async for check in _surroundings(connection, handlers):
        yield check


async def _surroundings(connection: PinnedConnection, handlers: Sequence[str]) -> AsyncIterator[Check]:
    tables = tables_of(handlers)
    found = {table.name: await connection.fetchrow(COLUMNS, table.name) for table in tables}
    for missing in (name for name, row in found.items() if row is None):
        yield fail("handlers", f"the shipped handler's table {missing} is missing: run `firstclaim migrate`")
    for fault in faults(tables, {name: (row["schema"], row["columns"]) for name, row in found.items() if row}):
        yield fail("handlers", fault)
    schema = connection.schema
    if row := await connection.fetchrow(_IN_SEARCH_PATH, schema):
        yield warn(
            "search_path",
            f"the schema {schema} is in the search_path of {row['role']}: what it creates without one is put there. "
            f"Run ALTER ROLE {row['role']} IN DATABASE {row['database']} SET search_path = public; or set "
            "FIRSTCLAIM_SCHEMA to another name",
        )
    if (second := await connection.fetchrow(OLD_LEDGER, None)) and second["schema"] != schema:
        yield warn(
            "ledger",
            f"there is a second ledger in schema {second['schema']}, made by a build from before FIRSTCLAIM_SCHEMA. "
            "Its events are not dispatched here: see docs/how-to/share-a-database.md",
        )
