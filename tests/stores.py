"""Real servers for the tests: those of TEST_DATABASE_URL and TEST_REDIS_URL, or else the embedded ones.

Every test gets a database of its own, cloned from a migrated template, and a Redis key prefix of its own.
"""

import asyncio
import os
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote, urlsplit, urlunsplit

import asyncpg
import redis
from pydantic import SecretStr
from redis.asyncio import Redis

from firstclaim.embedded import data_folder
from firstclaim.migrations import schema
from firstclaim.settings import Settings
from firstclaim.urls.postgres import postgres_dsn
from firstclaim.urls.redis import RedisAddress, RedisKind

SHIPPED = ("firstclaim.handlers", "firstclaim.handlers.load_probe")  # both have a table

# Deliberately without a unique constraint: a duplicate effect must be visible.
EFFECTS = """
CREATE TABLE effects (
    event_id text NOT NULL, attempt integer NOT NULL, pid integer NOT NULL, xid text NOT NULL,
    at timestamptz NOT NULL DEFAULT clock_timestamp()
)
"""


@dataclass(frozen=True, slots=True)
class Stores:
    """Addresses of a running Postgres and Redis, and the database that tests clone."""

    postgres_url: str
    redis_url: str
    template: str

    def database(self, name: str) -> str:
        """The address of database `name` on the same server."""
        return with_database(self.postgres_url, name)


def with_database(url: str, name: str) -> str:
    """`url` with another database."""
    return urlunsplit(urlsplit(url)._replace(path=f"/{name}"))


@contextmanager
def running(folder: Path, postgres_url: str | None, redis_url: str | None) -> Iterator[Stores]:
    """Both stores, running, with a migrated template. Embedded servers keep their data in `folder`."""
    settings = Settings(
        data_dir=folder,
        database_url=SecretStr(postgres_url) if postgres_url else None,
        redis_url=SecretStr(redis_url) if redis_url else None,
        stripe_webhook_secrets=(SecretStr("whsec_test"),),
    )
    with data_folder.servers(settings) as ready:
        assert ready.database_url is not None
        assert ready.redis_url is not None
        url = postgres_dsn(ready.database_url.get_secret_value())
        if template := os.environ.get("TEST_TEMPLATE"):  # that of the run which started this one
            yield Stores(url, ready.redis_url.get_secret_value(), template)
            return
        template = f"firstclaim_template_{secrets.token_hex(4)}"
        asyncio.run(_make_template(url, template))
        try:
            yield Stores(url, ready.redis_url.get_secret_value(), template)
        finally:
            asyncio.run(_execute(url, f'DROP DATABASE IF EXISTS "{template}" WITH (FORCE)'))


async def _make_template(url: str, template: str) -> None:
    await _execute(url, f'CREATE DATABASE "{template}"')
    await schema.migrate(with_database(url, template), 10, handlers=SHIPPED)
    await _execute(with_database(url, template), EFFECTS)


async def forgo_fsync(stores: Stores) -> None:
    """For a server that ends with this run. With fsync, dropping a test's database takes a second: a checkpoint."""
    await _execute(stores.postgres_url, "ALTER SYSTEM SET fsync = off")
    await _execute(stores.postgres_url, "SELECT pg_reload_conf()")


@asynccontextmanager
async def redis_user(stores: Stores, *rights: str) -> AsyncIterator[tuple[str, str]]:
    """The name and the address of a Redis user with all rights, and then these (`-eval`)."""
    name = f"test-{secrets.token_hex(4)}"
    parts = urlsplit(stores.redis_url)
    async with Redis.from_url(stores.redis_url) as admin:
        await admin.acl_setuser(name, enabled=True, passwords=["+right"], keys=["*"], commands=["+@all", *rights])
        try:
            yield name, urlunsplit(parts._replace(netloc=f"{name}:right@{parts.netloc.rpartition('@')[2]}"))
        finally:
            await admin.acl_deluser(name)


def redis_client(url: str, seconds: float | None = None) -> redis.Redis:
    """A client of one server, of a Sentinel's master, or of a Cluster; `seconds` is its timeout."""
    address = RedisAddress.parse(url)
    options: dict[str, Any] = {} if seconds is None else {"socket_timeout": seconds}
    options["password"] = unquote(urlsplit(url).password or "") or None
    match address.kind:
        case RedisKind.SENTINEL:
            master = redis.Sentinel(address.hosts).master_for(address.service, **options)  # type: ignore[no-untyped-call]
            return cast(redis.Redis, master)
        case RedisKind.CLUSTER:
            nodes = [
                redis.cluster.ClusterNode(*host)  # type: ignore[no-untyped-call]
                for host in address.hosts
            ]
            return cast(redis.Redis, redis.RedisCluster(startup_nodes=nodes, **options))
        case RedisKind.SINGLE:
            return redis.Redis.from_url(url, socket_timeout=seconds)


async def clone(stores: Stores) -> str:
    """Clone the template; returns the address of the new database."""
    name = f"test_{secrets.token_hex(6)}"
    await _execute(stores.postgres_url, f'CREATE DATABASE "{name}" TEMPLATE "{stores.template}"')
    return stores.database(name)


async def drop(url: str) -> None:
    """Drop a cloned database, even if clients are connected to it."""
    parts = urlsplit(url)
    name = parts.path.removeprefix("/")
    await _execute(with_database(url, "postgres"), f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')


async def _execute(url: str, statement: str) -> None:
    connection = await asyncpg.connect(url, timeout=10)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()
