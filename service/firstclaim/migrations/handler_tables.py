"""The tables of the shipped handlers. They belong to the handlers, so they are in the search_path, where yours are.

Guarantees: only a handler that `FIRSTCLAIM_HANDLERS` names gets its table. A table that is there is kept, and must have
the columns that the handler writes.
"""

from collections.abc import Iterable, Iterator

from sqlalchemy import Connection, Table, text

from firstclaim.errors import StoreUnsuitable
from firstclaim.handlers.invoices import payment_failures
from firstclaim.handlers.load_probe import load_effects

_OF_MODULE = {
    "firstclaim.handlers": payment_failures,
    "firstclaim.handlers.invoices": payment_failures,
    "firstclaim.handlers.load_probe": load_effects,
}

COLUMNS = """
SELECT n.nspname AS schema, array_agg(a.attname::text) AS columns
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_attribute a ON a.attrelid = c.oid
 WHERE c.oid = to_regclass($1) AND a.attnum > 0 AND NOT a.attisdropped
 GROUP BY n.nspname
"""
# Where an unqualified CREATE TABLE goes; our own schema is in the search_path of a role that has its name.
_TARGET = text("""
SELECT schema, has_schema_privilege(schema, 'CREATE') AS allowed
  FROM unnest(current_schemas(false)) WITH ORDINALITY AS path (schema, number)
 WHERE schema <> :ours ORDER BY number LIMIT 1
""")


def tables_of(modules: Iterable[str]) -> list[Table]:
    """The tables of those of the handler modules that are shipped."""
    return list({table.name: table for name in modules if (table := _OF_MODULE.get(name)) is not None}.values())


def faults(tables: Iterable[Table], found: dict[str, tuple[str, list[str]]]) -> Iterator[str]:
    """What is wrong with tables that exist: `found` has the schema and the columns of each."""
    for table in tables:
        if table.name in found and (missing := {column.name for column in table.columns} - set(found[table.name][1])):
            place = f"{found[table.name][0]}.{table.name}"
            yield (
                f"the table {place} is not that of the shipped handler: it lacks {', '.join(sorted(missing))}. Rename "
                f"it (ALTER TABLE {place} RENAME TO ...;), or leave the shipped handlers out of FIRSTCLAIM_HANDLERS"
            )


def create(connection: Connection, tables: Iterable[Table], schema: str) -> list[str]:
    """Create those that no schema in the search_path has. Returns a line for each. Raises `StoreUnsuitable`."""
    lines = []
    for table in tables:
        row = connection.exec_driver_sql(COLUMNS, (table.name,)).one_or_none()
        if row is not None:
            for fault in faults([table], {table.name: (row.schema, row.columns)}):
                raise StoreUnsuitable(fault)
            continue
        target = connection.execute(_TARGET, {"ours": schema}).one_or_none()
        if target is None:
            raise StoreUnsuitable(f"no schema in the search_path exists to create the table {table.name} in")
        if not target.allowed:
            role = connection.scalar(text("SELECT quote_ident(current_user)"))
            raise StoreUnsuitable(
                f"the role {role} may not create the shipped handler's table {table.name} in schema {target.schema}: "
                f"run GRANT CREATE ON SCHEMA {target.schema} TO {role};, or leave the shipped handlers out of "
                "FIRSTCLAIM_HANDLERS"
            )
        table.to_metadata(type(table.metadata)(), schema=target.schema).create(connection)
        lines.append(f"table {target.schema}.{table.name} created, for the shipped handler in FIRSTCLAIM_HANDLERS")
    return lines
