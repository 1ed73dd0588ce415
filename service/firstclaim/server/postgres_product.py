"""Databases that speak PostgreSQL's protocol and cannot keep the promise, refused by their names.

The protocol rests on row locks with SKIP LOCKED, on transaction ids that the server tells the fate of, on backends that
can be looked for, and on a COMMIT of effects and mark that is one commit of one server. A database without these would
accept events, and lose or double them when a process or a connection ends.
"""

import re
from collections.abc import Iterator

import asyncpg

from firstclaim.server.check import Check, fail

_VERSION = "SELECT version()"
_INSTEAD = "use PostgreSQL 14 or newer"
_PRODUCTS = (
    (
        re.compile("CockroachDB"),
        "CockroachDB cannot hold the ledger: its transactions have no ids to ask for, its sessions no backends to look "
        "for, and its advisory locks do nothing",
    ),
    (
        re.compile(r"-YB-|Yugabyte"),
        "YugabyteDB is not proved to hold the ledger: its transactions, row locks and backends are not PostgreSQL's",
    ),
)

# A table that Citus knows and keeps on this server alone has this method, this model and no colocation.
_HAS_CITUS = "SELECT to_regclass('pg_dist_partition') IS NOT NULL"
_DISTRIBUTED = """
SELECT c.relname FROM pg_dist_partition p JOIN pg_class c ON c.oid = p.logicalrelid
 WHERE c.relnamespace = to_regnamespace(quote_ident($1))
   AND (p.partmethod, p.repmodel, p.colocationid) IS DISTINCT FROM ('n', 's', 0)
 ORDER BY c.relname
"""


async def check_product(connection: asyncpg.Connection) -> Check | None:
    """A failed check if the server is a product that cannot hold the ledger. Raises what asyncpg raises."""
    version: str = await connection.fetchval(_VERSION)
    return next(_unsuitable(version), None)


async def check_distribution(connection: asyncpg.Connection, schema: str) -> Check | None:
    """A failed check if Citus distributes tables of the ledger. Raises what asyncpg raises."""
    if not await connection.fetchval(_HAS_CITUS):
        return None
    if not (tables := [row["relname"] for row in await connection.fetch(_DISTRIBUTED, schema)]):
        return None
    return fail(
        "citus",
        f"Citus distributes {', '.join(tables)} of schema {schema}: an event and its effects would be committed by "
        f"several servers; run undistribute_table for each",
    )


def _unsuitable(version: str) -> Iterator[Check]:
    for pattern, reason in _PRODUCTS:
        if pattern.search(version):
            yield fail("postgres", f"{reason}; {_INSTEAD}")
