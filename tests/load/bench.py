"""What the benchmarks that start their own services share: stores, databases, and services as they are shipped.

Guarantees: the settings are the defaults and the handler is the load probe; at the end every database is checked
for effects that do not agree with the completion marks, so a benchmark cannot be fast by being wrong.
"""

import asyncio
import contextlib
import io
import os
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import asyncpg

from firstclaim.settings import Settings
from tests.acceptance.harness import QUICK, Sandbox, Service
from tests.stores import Stores, running

SHIPPED = {name: Settings.model_fields[name].default for name in QUICK}

# The sandbox's own check at the end reads `effects`: let it see the probe's.
_PROBE_EFFECTS = """
DROP TABLE effects;
CREATE VIEW effects AS SELECT event_id, attempt, 0 AS pid, xid, recorded_at AS at FROM load_effects
"""


@asynccontextmanager
async def served(stores: Stores, folder: Path) -> AsyncIterator[tuple[Sandbox, Service]]:
    """One process of `serve` on an empty database of its own."""
    sandbox = await Sandbox.prepare(stores, folder)
    try:
        await execute(sandbox, _PROBE_EFFECTS)
        yield sandbox, await sandbox.service({**SHIPPED, "handlers": "firstclaim.handlers.load_probe"}).start()
    finally:
        with contextlib.redirect_stdout(io.StringIO()):  # a service's log, which a test would show
            await sandbox.close()


async def execute(sandbox: Sandbox, statement: str) -> None:
    """Run SQL on a sandbox's database, however long it takes."""
    connection = await asyncpg.connect(sandbox.database_url)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()


def on_stores(run: Callable[[Stores, Path], Coroutine[None, None, None]]) -> None:
    """Run `run` on TEST_DATABASE_URL and TEST_REDIS_URL or on embedded servers, with a folder of its own."""
    addresses = os.environ.get("TEST_DATABASE_URL"), os.environ.get("TEST_REDIS_URL")
    with tempfile.TemporaryDirectory(prefix="firstclaim-bench-") as path:
        folder = Path(path)
        with running(folder, *addresses) as stores:
            asyncio.run(run(stores, folder))


def on_servers(count: int, measure: Callable[[list[tuple[Sandbox, Service]]], Awaitable[None]]) -> None:
    """Run `measure` with `count` services, each on a database of its own of the servers of `on_stores`."""

    async def run(stores: Stores, folder: Path) -> None:
        async with AsyncExitStack() as stack:
            await measure([await stack.enter_async_context(served(stores, folder)) for _ in range(count)])

    on_stores(run)
