"""The ledger's SQL: each of its tables is named with its schema, whatever the search_path of a connection is.

Guarantees: a handler may set `search_path`, and a database may hold tables of the same names. A statement is written
with the default schema (`firstclaim.stripe_events`), so that it can be read, and run in psql, as it stands. It is sent
with the schema of the connection that it runs on.
"""

from __future__ import annotations

import re
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from sqlalchemy import text
from sqlalchemy.dialects.postgresql.asyncpg import PGDialect_asyncpg

from firstclaim.schema_name import DEFAULT_SCHEMA

if TYPE_CHECKING:
    from firstclaim.postgres.connection import PinnedConnection

_QUALIFIER = re.compile(rf"\b{DEFAULT_SCHEMA}\.(?=[a-z])")


@cache
def in_schema(sql: str, schema: str) -> str:
    """`sql`, written with the default schema, for a ledger in `schema`. Cached: `sql` must be a constant."""
    return sql if schema == DEFAULT_SCHEMA else _QUALIFIER.sub(f'"{schema}".', sql)


@dataclass(frozen=True, slots=True)
class Statement:
    """SQL as the driver takes it, and the names of its parameters in their order."""

    sql: str
    names: tuple[str, ...]

    def fetch(self, connection: PinnedConnection, **values: object) -> Coroutine[Any, Any, list[Any]]:
        """Its rows, to be awaited. Raises what asyncpg raises.

        After a timeout of the caller's, terminate the connection before any await. (A timeout of the driver's own
        begins to cancel the statement before it raises.)
        """
        sql, bound = self.on(connection, values)
        return connection.fetch(sql, *bound)

    def on(self, connection: PinnedConnection, values: Mapping[str, object]) -> tuple[str, list[object]]:
        """Its SQL for this connection, and its values in their order."""
        return in_schema(self.sql, connection.schema), [values[name] for name in self.names]


def statement(sql: str) -> Statement:
    """Compile `sql` with its `:named` parameters, once: built per call, it cost more than the database's work."""
    compiled = text(sql).compile(dialect=PGDialect_asyncpg())  # type: ignore[no-untyped-call]
    return Statement(str(compiled), tuple(compiled.positiontup or ()))
