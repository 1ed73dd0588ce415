"""What a migration finds in its way: a right that is missing, or a table of our name that is not ours.

Guarantees: each is refused with the schema, the table and the statement to run, before anything is changed.
"""

from sqlalchemy import Connection, text

from firstclaim.errors import StoreUnsuitable
from firstclaim.migrations.adoption import TABLES, VERSION_TABLE

_RIGHTS = text("""
SELECT quote_ident(current_user) AS role, quote_ident(current_database()) AS database,
       EXISTS (SELECT FROM pg_namespace WHERE nspname = :schema) AS found,
       (SELECT has_schema_privilege(oid, 'USAGE') FROM pg_namespace WHERE nspname = :schema) AS usable,
       CASE WHEN EXISTS (SELECT FROM pg_namespace WHERE nspname = :schema)
            THEN has_schema_privilege(:schema, 'USAGE') AND has_schema_privilege(:schema, 'CREATE')
            ELSE has_database_privilege(current_database(), 'CREATE') END AS allowed
""")
_RELATIONS = text("""
SELECT relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE n.nspname = :schema AND relname = ANY(:tables) ORDER BY relname
""")

# A table of ours, in the schema $1, that lacks the column which every build reads.
FOREIGN_TABLE = f"""
SELECT c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
  JOIN (VALUES ('{VERSION_TABLE}', 'version_num'), ('stripe_events', 'event_id')) AS ours (name, key)
    ON ours.name = c.relname
 WHERE n.nspname = $1 AND NOT EXISTS (
       SELECT FROM pg_attribute a
        WHERE attrelid = c.oid AND attname = ours.key AND NOT attisdropped
          AND atttypid IN ('text'::regtype, 'varchar'::regtype))
 ORDER BY c.relname LIMIT 1
"""


def grants(schema: str, role: str) -> str:
    """The statements that give a service's role its rights, where another role migrates."""
    return (
        f"GRANT USAGE ON SCHEMA {schema} TO {role}; "
        f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA {schema} TO {role};"
    )


def unfit_encoding(encoding: str) -> str:
    """Why a database of another encoding than UTF-8 is refused."""
    return (
        f"the database's encoding is {encoding}, which cannot hold every event: create a database with "
        "CREATE DATABASE ... ENCODING 'UTF8' TEMPLATE template0;"
    )


def refuse_encoding(connection: Connection) -> None:
    """Raise `StoreUnsuitable` if the database is not UTF-8."""
    if (encoding := connection.scalar(text("SHOW server_encoding"))) != "UTF8":
        raise StoreUnsuitable(unfit_encoding(encoding))


def refuse_without_usage(connection: Connection, schema: str) -> None:
    """Raise `StoreUnsuitable` if the role cannot see into `schema`, in which there is a ledger."""
    rights = connection.execute(_RIGHTS, {"schema": schema}).one()
    if not rights.usable:
        raise StoreUnsuitable(
            f"the role {rights.role} may not use the schema {schema} in database {rights.database}: migrate as its "
            f"owner, and let it run {grants(schema, rights.role)}"
        )


def refuse_foreign_tables(connection: Connection, schema: str) -> None:
    """Raise `StoreUnsuitable` if `schema`, in which there is no ledger, has a table of our names."""
    found = connection.execute(_RELATIONS, {"schema": schema, "tables": list(TABLES)}).scalars().all()
    if found:
        raise foreign_table(schema, found[0])


def refuse_foreign_columns(connection: Connection, schema: str) -> None:
    """Raise `StoreUnsuitable` if `schema` has a table of our names that lacks its column: it is not ours."""
    if (found := connection.exec_driver_sql(FOREIGN_TABLE, (schema,)).scalar()) is not None:
        raise foreign_table(schema, found)


def foreign_table(schema: str, name: str) -> StoreUnsuitable:
    """The error to raise for a table of our name that is not ours."""
    place = f"{schema}.{name}"
    return StoreUnsuitable(
        f"{place} exists and is no table of a ledger: rename it (ALTER TABLE {place} RENAME TO ...;), or name "
        "another schema in FIRSTCLAIM_SCHEMA"
    )


def make_schema(connection: Connection, schema: str, owner: str | None) -> None:
    """Create `schema` unless it exists; `owner`: another role that is to own it. Raises `StoreUnsuitable`."""
    rights = connection.execute(_RIGHTS, {"schema": schema}).one()
    if not rights.allowed:
        wanted = (
            f"GRANT USAGE, CREATE ON SCHEMA {schema} TO {rights.role};"
            if rights.found
            else f"CREATE SCHEMA {schema} AUTHORIZATION {rights.role};"
        )
        action = f"create tables in schema {schema}" if rights.found else f"create the schema {schema}"
        raise StoreUnsuitable(
            f"the role {rights.role} may not {action} in database {rights.database}: let its owner run {wanted}"
        )
    if not rights.found:
        connection.exec_driver_sql(f'CREATE SCHEMA "{schema}"' + (f" AUTHORIZATION {owner}" if owner else ""))
