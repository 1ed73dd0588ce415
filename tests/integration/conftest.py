"""A database per module that each test finds empty, and the service's parts on it."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import asyncpg
import pytest

from firstclaim.inbox.model import metadata
from tests.integration.world import World, build
from tests.stores import Stores, clone, drop

# What a test writes to: all tables but those of the revision and the epoch.
WRITTEN = (
    "effects",
    *(f"firstclaim.{name}" for name in metadata.tables if name not in ("ledger_epoch", "operator_notices")),
)
MakeWorld = Callable[..., Awaitable[World]]


@pytest.fixture(scope="module")
def module_database(stores: Stores) -> Iterator[str]:
    """One clone for the module's tests: cloning takes longer than most of them."""
    url = asyncio.run(clone(stores))
    yield url
    asyncio.run(drop(url))


@pytest.fixture
async def make_world(module_database: str, stores: Stores, redis_prefix: str) -> AsyncIterator[MakeWorld]:
    """Puts the parts together over an empty ledger, as often as asked: each is a process of its own."""
    connection = await asyncpg.connect(module_database)
    await connection.execute("".join(f"DELETE FROM {table};" for table in WRITTEN))
    await connection.close()
    worlds: list[World] = []

    async def make(*arguments: object, **changes: object) -> World:
        worlds.append(await build(module_database, stores.redis_url, redis_prefix, *arguments, **changes))  # type: ignore[arg-type]
        return worlds[-1]

    yield make
    for world in worlds:
        await world.close()


@pytest.fixture
async def world(make_world: MakeWorld) -> World:
    """One process's parts, without handlers, with calm limits."""
    return await make_world()


@pytest.fixture
async def empty_url(stores: Stores) -> AsyncIterator[str]:
    """A database that was never migrated."""
    name = f"test_{secrets.token_hex(6)}"
    connection = await asyncpg.connect(stores.postgres_url)
    await connection.execute(f'CREATE DATABASE "{name}" TEMPLATE template0')
    await connection.close()
    url = stores.database(name)
    yield url
    await drop(url)


@pytest.fixture
async def superuser(stores: Stores) -> None:
    """For a test that changes what is the server's own: it is skipped where the role of the tests may not do that."""
    connection = await asyncpg.connect(stores.postgres_url)
    may = await connection.fetchval("SELECT rolsuper FROM pg_roles WHERE rolname = current_user")
    await connection.close()
    if not may:
        pytest.skip("needs a superuser")
