"""What must hold before this may serve: one list of findings, for `firstclaim check` and for `serve` alike.

Guarantees: nothing here changes a store's data; a finding names the setting that would break the promise and
what to do about it, and holds no password. `fatal` findings stop `serve`; an unreachable Redis does not,
because events are recorded all the same.
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, get_args, get_type_hints

import asyncpg
import stripe
from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError

from firstclaim.errors import ConfigurationError, LedgerUnavailable, StoreUnsuitable
from firstclaim.inbox.lock import Lock, LockReply, connect
from firstclaim.migrations.schema import SchemaState, compare, outdated, read_version
from firstclaim.postgres.connection import UNAVAILABLE, describe, read_epoch
from firstclaim.registry import Registry
from firstclaim.server.connection_limiter import affordable_connections
from firstclaim.settings import Settings

_CONNECT_ATTEMPTS = 20  # at half a second: a database that is starting beside us gets its time
_CONNECT_PAUSE_SECONDS = 0.5
_POSTGRES_OLDEST = 140000
_REDIS_OLDEST = (7, 0)
_POOLER_PROBES = 4


class Verdict(StrEnum):
    """How a check came out."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Check:
    """One line of `firstclaim check`."""

    name: str
    verdict: Verdict
    detail: str
    fatal: bool = False


def _ok(name: str, detail: str) -> Check:
    return Check(name, Verdict.OK, detail)


def _warn(name: str, detail: str) -> Check:
    return Check(name, Verdict.WARN, detail)


def _fail(name: str, detail: str, *, fatal: bool = True) -> Check:
    return Check(name, Verdict.FAIL, detail, fatal)


async def all_checks(settings: Settings, *, patient: bool = False) -> list[Check]:
    """Every check; `patient` waits some seconds for a Postgres that is still starting."""
    found = [_ok("configuration", "every setting is valid")]
    found += check_handlers(settings)
    found += check_files(settings)
    found += [check async for check in check_postgres(settings, patient=patient)]
    found += [check async for check in check_redis(settings)]
    return found


def check_handlers(settings: Settings) -> list[Check]:
    """That the handler modules load and agree, and that Stripe has the types they name."""
    try:
        handlers = list(Registry.load(settings.handlers))
    except ConfigurationError as error:
        return [_fail("handlers", fault) for fault in error.faults]
    if not handlers:
        return [_warn("handlers", f"{', '.join(settings.handlers)} declare none: every event will be ignored")]
    # Thin types (v1., v2.) are listed nowhere public; a wildcard is right by its form.
    named = {h.pattern for h in handlers if "*" not in h.pattern and not h.pattern.startswith(("v1.", "v2."))}
    strange = sorted(named - known_event_types())
    if strange:
        return [_warn("handlers", f"not a type that stripe-python knows: {', '.join(strange)}")]
    return [_ok("handlers", ", ".join(sorted(h.pattern for h in handlers)))]


def check_files(settings: Settings) -> list[Check]:
    """That this process may have as many sockets open as it is set to."""
    affordable, wanted = affordable_connections(settings), settings.connections_most
    if affordable < wanted:
        detail = f"the limit on open files leaves room for {affordable} sockets per process, not {wanted}: raise it"
        return [_warn("files", f"{detail} (ulimit -n)")]
    return [_ok("files", f"room for {wanted} sockets per process")]


def known_event_types() -> frozenset[str]:
    """Every snapshot event type that the installed stripe-python lists."""
    return frozenset(get_args(get_type_hints(stripe.Event)["type"]))


# -- Postgres -----------------------------------------------------------------------------------------


async def check_postgres(settings: Settings, *, patient: bool = False) -> AsyncIterator[Check]:
    """Version, pooler, writability, durability settings, schema, connections."""
    dsn = settings.database_url.get_secret_value() if settings.database_url else ""
    try:
        connection = await _connect(dsn, settings.postgres_timeout_seconds, patient=patient)
    except LedgerUnavailable as error:
        yield _fail("postgres", f"cannot connect: {error}; check DATABASE_URL and that the server runs")
        return
    try:
        async for check in _ask_postgres(connection, dsn, settings):
            yield check
    except UNAVAILABLE as error:
        yield _fail("postgres", f"failed while being asked: {describe(error)}")
    finally:
        connection.terminate()


async def _connect(dsn: str, timeout_seconds: float, *, patient: bool) -> asyncpg.Connection:
    for attempt in range(_CONNECT_ATTEMPTS if patient else 1):
        if attempt:
            await asyncio.sleep(_CONNECT_PAUSE_SECONDS)
        try:
            return await asyncpg.connect(dsn, timeout=timeout_seconds, statement_cache_size=0)
        except (asyncpg.InvalidAuthorizationSpecificationError, asyncpg.InvalidCatalogNameError) as error:
            raise LedgerUnavailable(str(error)) from error  # the server's own words, which name no password
        except asyncpg.ClientConfigurationError as error:
            raise LedgerUnavailable(str(error)) from error
        except (*UNAVAILABLE, ValueError) as error:
            failure = describe(error)
    raise LedgerUnavailable(failure)


async def _ask_postgres(connection: asyncpg.Connection, dsn: str, settings: Settings) -> AsyncIterator[Check]:
    version = await _setting(connection, "server_version")
    number = int(await _setting(connection, "server_version_num"))
    if number < _POSTGRES_OLDEST:
        yield _fail("postgres", f"version {version} is too old: 14 or newer is needed")
        return
    yield _ok("postgres", f"version {version}")
    if await _pooled_by_transaction(connection, dsn, settings.postgres_timeout_seconds):
        yield _fail(
            "pooler",
            "DATABASE_URL leads to PgBouncer (or its like) in transaction mode: session settings, timeouts and the "
            "ledger's epoch do not hold across its connections; use session mode or the direct address",
        )
    async with connection.transaction():
        recovering = await connection.fetchval("SELECT pg_is_in_recovery()")
        if recovering or await _setting(connection, "default_transaction_read_only") == "on":
            yield _fail("writable", "the server is read-only (a standby, or default_transaction_read_only = on)")
    for name, lost in (
        ("fsync", "a crash of its machine can lose or corrupt"),
        ("full_page_writes", "a torn page can corrupt"),
    ):
        if await _setting(connection, name) == "off":
            yield _warn(name, f"{name} = off: {lost} events that were answered with 200; turn it on")
    if await _setting(connection, "synchronous_commit") != "on":
        yield _ok("synchronous_commit", "is not on by default; every connection of ours pins it to on")
    yield await _check_connections(connection, settings)
    yield await _check_schema(connection)


async def _check_schema(connection: asyncpg.Connection) -> Check:
    revision = await read_version(connection)
    state = compare(revision)
    if state is SchemaState.OUTDATED:
        return _fail("schema", str(outdated(revision)))
    if state is SchemaState.NEWER:
        return _warn("schema", f"at {revision}, migrated by a newer firstclaim: this build works on it")
    return _ok("schema", f"at {revision}, ledger epoch {await read_epoch(connection)}")


async def _setting(connection: asyncpg.Connection, name: str) -> str:
    value: str = await connection.fetchval("SELECT current_setting($1)", name)
    return value


async def _check_connections(connection: asyncpg.Connection, settings: Settings) -> Check:
    most = int(await _setting(connection, "max_connections"))
    ours = settings.postgres_connections
    detail = f"{ours} per worker process of the server's {most}"
    return _warn("connections", detail + ": raise max_connections") if ours > most // 2 else _ok("connections", detail)


async def _pooled_by_transaction(connection: asyncpg.Connection, dsn: str, timeout_seconds: float) -> bool:
    """Whether a pooler hands one server connection to several clients in turn.

    A pooler shows itself by a backend pid that is not the one of the connection's start. In transaction mode
    an idle client's server process goes to the next client that begins; in session mode it never does.
    """

    async def backend(of: asyncpg.Connection) -> int:
        pid: int = await of.fetchval("SELECT pg_backend_pid()")
        return pid

    async with connection.transaction():
        mine = await backend(connection)
    if mine == connection.get_server_pid():
        return False
    others: list[asyncpg.Connection] = []
    try:
        for _ in range(_POOLER_PROBES):
            other = await asyncpg.connect(dsn, timeout=timeout_seconds, statement_cache_size=0)
            others.append(other)
            await other.execute("BEGIN")
            if await backend(other) == mine:
                return True
        async with connection.transaction():
            return await backend(connection) != mine
    finally:
        for other in others:
            other.terminate()


# -- Redis --------------------------------------------------------------------------------------------


async def check_redis(settings: Settings) -> AsyncIterator[Check]:
    """Version, role, and that the lock's own commands are understood and allowed."""
    url = settings.redis_url.get_secret_value() if settings.redis_url else ""
    redis = connect(url, timeout_seconds=max(1.0, settings.redis_timeout_seconds))
    try:
        async for check in _ask_redis(redis, settings):
            yield check
    except ResponseError as error:
        yield _fail("redis", f"refuses what the lock needs: {str(error).split(' ', 1)[0]}", fatal=False)
    except (RedisError, OSError, TimeoutError) as error:
        yield _fail(
            "redis",
            f"cannot be reached ({type(error).__name__}): events are recorded, and dispatched when it is back",
            fatal=False,
        )
    finally:
        await redis.aclose()


async def _ask_redis(redis: Redis, settings: Settings) -> AsyncIterator[Check]:
    info: dict[str, Any] = await redis.info()
    valkey = info.get("valkey_version")
    version = str(valkey or info["redis_version"])
    name = f"{'Valkey' if valkey else 'Redis'} {version}"
    if tuple(int(part) for part in version.split(".")[:2]) < _REDIS_OLDEST:
        yield _fail("redis", f"{name} is too old: Redis 7 or Valkey 8, or newer, is needed (SET with NX and GET)")
        return
    if info.get("cluster_enabled"):
        yield _fail("redis", f"{name} runs as a Cluster, which is not supported: give a single primary")
        return
    if info.get("role") != "master":
        yield _fail("redis", f"{name} is a replica: give the primary's address", fatal=False)
        return
    lock = Lock(redis, prefix=settings.redis_prefix, lock_ttl_seconds=1, marker_ttl_seconds=2, breaker_seconds=1)
    token = lock.new_token()
    reply = await lock.acquire(f"check-{token}", token, None)
    await lock.forget(f"check-{token}", token, None)
    await lock.close()
    if reply is LockReply.HELD:
        yield _ok("redis", name)
    else:
        yield _fail("redis", f"{name} refuses SET NX GET: check the user's permissions and maxmemory", fatal=False)


def refuse(checks: list[Check]) -> None:
    """Raise `StoreUnsuitable` (or `ConfigurationError` for handlers) with every fatal finding."""
    fatal = [check for check in checks if check.fatal]
    if handlers := [check.detail for check in fatal if check.name == "handlers"]:
        raise ConfigurationError(handlers)
    if fatal:
        raise StoreUnsuitable("\n".join(f"{check.name}: {check.detail}" for check in fatal))
