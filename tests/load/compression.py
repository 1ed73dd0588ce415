"""`python -m tests.load.compression`: what it costs Postgres to compress the body of an event, by method.

It reads the CPU time of one backend from /proc, so Postgres must run on this machine: that of TEST_DATABASE_URL, or an
embedded one, which has no lz4. The table is temporary: nothing but the compression differs.
"""

import asyncio
import os
import statistics
import tempfile
from pathlib import Path

import asyncpg
from rich.console import Console
from rich.table import Table

from firstclaim.sending.events import build_event
from tests.stores import running

METHODS = {  # by name, as ALTER COLUMN body ... takes them
    "pglz": "SET STORAGE EXTENDED, ALTER COLUMN body SET COMPRESSION pglz",
    "lz4": "SET STORAGE EXTENDED, ALTER COLUMN body SET COMPRESSION lz4",
    "none": "SET STORAGE EXTERNAL",
}
ROUNDS = 40
BODIES = 300


def _cpu_microseconds(pid: int) -> float:
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1000


async def _measure(url: str) -> None:
    connection = await asyncpg.connect(url)
    bodies = [build_event("invoice.payment_failed") for _ in range(BODIES)]
    times: dict[str, list[float]] = {method: [] for method in METHODS}
    sizes: dict[str, int] = {}
    try:
        await connection.execute("CREATE TEMPORARY TABLE bodies (body bytea)")
        for method in list(METHODS) * ROUNDS:  # in turn, so that all meet the same machine
            try:
                await connection.execute(f"ALTER TABLE bodies ALTER COLUMN body {METHODS[method]}")
            except asyncpg.FeatureNotSupportedError:
                continue
            before = _cpu_microseconds(connection.get_server_pid())
            await connection.execute("INSERT INTO bodies SELECT unnest($1::bytea[])", bodies)
            times[method].append((_cpu_microseconds(connection.get_server_pid()) - before) / BODIES)
            sizes[method] = await connection.fetchval("SELECT avg(pg_column_size(body))::int FROM bodies")
            await connection.execute("TRUNCATE bodies")
        table = Table("compression", "CPU microseconds of a body (median)", "bytes stored")
        for method in sizes:
            table.add_row(method, f"{statistics.median(times[method]):.0f}", f"{sizes[method]:,}")
        version = await connection.fetchval("SHOW server_version")
        Console().print(f"PostgreSQL {version}, bodies of {len(bodies[0]):,} bytes", table)
    finally:
        await connection.close()


def main() -> None:
    """Print the version and the costs."""
    addresses = os.environ.get("TEST_DATABASE_URL"), os.environ.get("TEST_REDIS_URL")
    with tempfile.TemporaryDirectory(prefix="firstclaim-bench-") as path, running(Path(path), *addresses) as stores:
        asyncio.run(_measure(stores.postgres_url))


if __name__ == "__main__":
    main()
