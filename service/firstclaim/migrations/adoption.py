"""Ledgers of builds that had no schema of their own: their tables stood first in the search_path, in `public`.

Guarantees: such a ledger is recognised by its tables, never by `public.alembic_version`, which may be yours: that table
is neither read nor written. The tables are moved into our schema, and a view with the old name is left in the place of
each, all in the transaction of the migration. So a build from before, which names its tables without a schema, works on
the same rows: Postgres inserts, updates and locks through such a view, also with ON CONFLICT and SKIP LOCKED. No row is
copied, and a statement that waits for the move meets the view. Whoever had rights on the tables has them on the views.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, text

from firstclaim.errors import StoreUnsuitable
from firstclaim.inbox.model import metadata
from firstclaim.migrations.locking import attempted_between_handlers

VERSION_TABLE = "ledger_revision"  # not `alembic_version`: a role with the schema's name finds that one in it first

TABLES = tuple(metadata.tables)

# The table `stripe_events` that is in our schema, $1, else the one that is found by its bare name, if it is a ledger:
# no other table has this constraint, and these beside it.
OLD_LEDGER = """
SELECT quote_ident(n.nspname) AS schema, c.relowner::regrole::text AS owner
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE c.oid = coalesce((SELECT ours.oid FROM pg_class ours JOIN pg_namespace s ON s.oid = ours.relnamespace
                          WHERE s.nspname = $1 AND ours.relname = 'stripe_events'),
                        to_regclass('stripe_events'))
   AND c.relkind = 'r'
   AND EXISTS (SELECT FROM pg_constraint WHERE conrelid = c.oid AND conname = 'stripe_events_settled_check')
   AND (SELECT count(*) FROM pg_class beside
         WHERE beside.relnamespace = c.relnamespace AND relname IN ('ledger_epoch', 'stripe_event_payloads')) = 2
"""
_TABLES = text("""
SELECT relname AS name, pg_has_role(relowner, 'USAGE') AS owned
  FROM pg_class WHERE relnamespace = to_regnamespace(:schema) AND relkind = 'r' AND relname = ANY(:tables)
""")

# The last revision that has left a trace. There is no later one: from 0007 on, a ledger had a schema of its own.
_REVISION = text("""
SELECT CASE WHEN to_regclass(:schema || '.stripe_events_waiting') IS NOT NULL THEN '0006'
            WHEN to_regclass(:schema || '.stripe_events_received') IS NOT NULL THEN '0005'
            WHEN to_regclass(:schema || '.stripe_event_attempts') IS NOT NULL THEN '0004'
            WHEN to_regclass(:schema || '.operator_actions') IS NOT NULL THEN '0003'
            ELSE '0001' END
""")
_STAMP = """
CREATE TABLE {schema}.{table} (version_num varchar(32) NOT NULL CONSTRAINT {table}_pkc PRIMARY KEY);
INSERT INTO {schema}.{table} VALUES ('{revision}')
"""

# Whoever may use a table of the ledger may use the view in its place, and may look into the schema.
_GRANT = """
DO $$
DECLARE
    granted record;
BEGIN
    FOR granted IN
        SELECT c.relname AS name, a.privilege_type AS privilege,
               CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE a.grantee::regrole::text END AS grantee
          FROM pg_class c, aclexplode(c.relacl) a
         WHERE c.relnamespace = '{schema}'::regnamespace AND c.relname = ANY('{tables}')
           AND a.privilege_type IN ('SELECT', 'INSERT', 'UPDATE', 'DELETE')
    LOOP
        EXECUTE format('GRANT USAGE ON SCHEMA {schema} TO %s', granted.grantee);
        EXECUTE format('GRANT %s ON {old}.%I TO %s', granted.privilege, granted.name, granted.grantee);
    END LOOP;
END
$$
"""


@dataclass(frozen=True, slots=True)
class OldLedger:
    """A ledger from before: its schema and its owner (both quoted as SQL needs it), and those of its tables."""

    schema: str
    owner: str
    tables: tuple[str, ...]


def find_old_ledger(connection: Connection, schema: str) -> OldLedger | None:
    """The ledger that older builds find by its bare name. Raises `StoreUnsuitable` if its tables cannot be moved."""
    if (found := connection.exec_driver_sql(OLD_LEDGER, (schema,)).one_or_none()) is None:
        return None
    tables = connection.execute(_TABLES, {"schema": found.schema, "tables": list(TABLES)}).all()
    if foreign := [row.name for row in tables if not row.owned]:
        raise StoreUnsuitable(
            f"the ledger in schema {found.schema} is to be moved, and the table {foreign[0]} belongs to another role: "
            f"run `firstclaim migrate` as {found.owner}, or let the present role be a member of it "
            f"(GRANT {found.owner} TO CURRENT_USER)"
        )
    return OldLedger(found.schema, found.owner, tuple(name for name in TABLES if name in {row.name for row in tables}))


def adopt(connection: Connection, old: OldLedger, schema: str) -> None:
    """Move the tables into `schema`, which exists, and note the revision that they are at."""
    revision = connection.scalar(_REVISION, {"schema": old.schema})
    if old.schema != schema:
        names = ", ".join(f"{old.schema}.{name}" for name in old.tables)
        moves = " ".join(f"ALTER TABLE {old.schema}.{name} SET SCHEMA {schema};" for name in old.tables)
        _run(connection, attempted_between_handlers(f"LOCK TABLE {names} IN ACCESS EXCLUSIVE MODE; {moves}"))
    _run(connection, *_STAMP.format(schema=schema, table=VERSION_TABLE, revision=revision).split(";"))
    _run(connection, f"ALTER TABLE {schema}.{VERSION_TABLE} OWNER TO {old.owner}")


def leave_views(connection: Connection, old: OldLedger, schema: str) -> None:
    """In the place of each table, a view for builds from before, with all the columns that the table has by now."""
    for name in old.tables:
        _run(
            connection,
            f"CREATE VIEW {old.schema}.{name} AS SELECT * FROM {schema}.{name}",
            f"ALTER VIEW {old.schema}.{name} OWNER TO {old.owner}",
        )
    tables = "{" + ",".join(old.tables) + "}"
    _run(connection, _GRANT.format(schema=schema, old=old.schema, tables=tables))


def farewell(old: OldLedger, schema: str) -> Sequence[str]:
    """What an operator is to know of the move, a line each."""
    views = ", ".join(f"{old.schema}.{name}" for name in old.tables)
    return (
        f"ledger moved from schema {old.schema} to {schema}; older builds go on through views with the old names",
        f"once no older build runs: DROP VIEW {views}; and, unless another Alembic uses it: "
        f"DROP TABLE {old.schema}.alembic_version;",
    )


def _run(connection: Connection, *statements: str) -> None:
    for each in statements:
        connection.exec_driver_sql(each)
