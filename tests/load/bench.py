"""What the benchmarks that start their own services share: stores, databases, and services as they are shipped.

Guarantees: the settings are the defaults, and the handler is the load probe unless another is named; at the end every
database is checked for effects that do not agree with the completion marks, so a benchmark cannot be fast by being
wrong.
"""

import asyncio
import contextlib
import io
import os
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from types import MappingProxyType

import asyncpg

from firstclaim.settings import Settings
from tests.acceptance.harness import QUICK, Sandbox, Service
from tests.stores import Stores, running

SHIPPED = {name: Settings.model_fields[name].default for name in QUICK}

PROBE = "firstclaim.handlers.load_probe"
PROBE_EFFECTS = "load_effects"

# The sandbox's own check at the end reads `effects`: let it see those of the handler.
_EFFECTS = """
DROP TABLE effects;
CREATE VIEW effects AS SELECT event_id FROM {table}
"""


@asynccontextmanager
async def served(
    stores: Stores,
    folder: Path,
    handlers: str = PROBE,
    effects: str = PROBE_EFFECTS,
    prepare: Callable[[Sandbox], Awaitable[None]] | None = None,
    overrides: Mapping[str, str | float] = MappingProxyType({}),
) -> AsyncIterator[tuple[Sandbox, Service]]:
    """One process of `serve` on a database of its own, which is empty, or is filled by `prepare`.

    `effects` is the table that its handlers write to; `overrides` are settings that are not as shipped.
    """
    sandbox = await Sandbox.prepare(stores, folder)
    try:
        await execute(sandbox, _EFFECTS.format(table=effects))
        if prepare is not None:
            await prepare(sandbox)
        yield sandbox, await sandbox.service({**SHIPPED, "handlers": handlers, **overrides}).start()
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
