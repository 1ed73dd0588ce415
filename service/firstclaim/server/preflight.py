"""The checks that must pass before the service starts. `firstclaim check` and `serve` run the same checks.

Guarantees: no check changes a store's data. A failed check names the setting that would break the promise and how to
fix it, and holds no password. A `fatal` check stops `serve`. An unreachable Redis does not stop it, because events are
recorded without Redis.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence

import asyncpg

from firstclaim.errors import ConfigurationError, LedgerRefused, LedgerUnavailable, StoreUnsuitable
from firstclaim.follow_up import is_follow_up
from firstclaim.formatting import number_of
from firstclaim.migrations.rights import unfit_encoding
from firstclaim.notify.sender import Sender
from firstclaim.operations.stripe_objects import faults
from firstclaim.postgres.advice import explain, in_one_line
from firstclaim.postgres.connect import connect
from firstclaim.postgres.connection import UNAVAILABLE, PinnedConnection, describe
from firstclaim.registry import Handler, Registry
from firstclaim.server.check import Check, fail, ok, warn
from firstclaim.server.connection_limiter import affordable_connections
from firstclaim.server.event_types import no_event_type
from firstclaim.server.postgres_product import check_distribution, check_product
from firstclaim.server.redis_check import check_redis
from firstclaim.server.schema_checks import check_schema
from firstclaim.settings import Settings
from firstclaim.urls.notify import shown

_ATTEMPTS = 20  # half a second apart, for a database that is starting at the same time
_PAUSE_SECONDS = 0.5
_MIN_POSTGRES = 140000
# The read that answers a duplicate by the ledger runs this function, so that it waits for the synchronous standby.
_MAY_EMIT = """
SELECT bool_and(has_function_privilege(oid, 'EXECUTE')) FROM pg_proc
 WHERE proname = 'pg_logical_emit_message' AND pronamespace = 'pg_catalog'::regnamespace
   AND proargtypes[2] = 'text'::regtype
"""
# What our role may still open besides the sessions of others. A session of ours counts as none: it may be of the very
# service that is checked, whose pools are counted in full.
_AVAILABLE_CONNECTIONS = """
SELECT least(
           current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int
               - coalesce(current_setting('reserved_connections', true)::int, 0) - count(other),
           nullif(datconnlimit, -1) - count(other) FILTER (WHERE other.datid = d.oid),
           nullif(rolconnlimit, -1) - count(other) FILTER (WHERE other.usesysid = r.oid))
  FROM pg_roles r JOIN pg_database d ON d.datname = current_database() AND r.rolname = session_user
  LEFT JOIN pg_stat_activity other ON other.datid IS NOT NULL AND other.usesysid IS NOT NULL
       AND other.application_name IS DISTINCT FROM current_setting('application_name')
 GROUP BY r.oid, rolconnlimit, d.oid, datconnlimit
"""
_FINDS_DEAD_EVENTS = """
SELECT EXISTS (
       SELECT FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE n.nspname = $1 AND c.relname = 'stripe_event_attempts_final' AND i.indisvalid)
"""
_POOLER_PROBES = 4
_NO_ADVICE = "the server's log says more"


async def all_checks(settings: Settings, *, wait: bool = False) -> list[Check]:
    """Run every check. `wait` allows some seconds for a Postgres that is still starting."""
    found = [ok("configuration", "every setting is valid")]
    found += check_handlers(settings)
    found += check_files(settings)
    found += [check async for check in check_postgres(settings, wait=wait)]
    found += [check async for check in check_redis(settings)]
    found += [check async for check in check_notify(settings)]
    return found


async def check_notify(settings: Settings) -> AsyncIterator[Check]:
    """Check that something answers at the address for notices, which are sent again until it does. Sends none."""
    if settings.notify_url is None:
        return
    url = settings.notify_url.get_secret_value()
    sender = Sender(url)
    try:
        reached, answer = await sender.reach()
    finally:
        await sender.close()
    if reached:
        yield ok(
            "notify", f"{shown(url)} answers HEAD with {answer}; whether it takes a notice shows only when one is sent"
        )
    else:
        yield warn("notify", f"{shown(url)} cannot be reached: {answer}; notices wait in the ledger until it can")


def check_handlers(settings: Settings) -> list[Check]:
    """Check that the handler modules can be loaded together, and that their event types exist at Stripe."""
    try:
        handlers = list(Registry.load(settings.handlers, settings))
    except ConfigurationError as error:
        return [fail("handlers", fault, exit_code=error.exit_code) for fault in error.faults]
    if faulty := faults(settings, handlers):
        return [fail("handlers", fault, exit_code=ConfigurationError.exit_code) for fault in faulty]
    if not handlers:
        return [warn("handlers", f"{', '.join(settings.handlers)} declare none: every event will be ignored")]
    if advice := no_event_type(handler.pattern for handler in handlers if not is_follow_up(handler.pattern)):
        return [warn("handlers", advice), *check_limits(handlers, settings)]
    return [ok("handlers", ", ".join(sorted(h.pattern for h in handlers))), *check_limits(handlers, settings)]


def check_limits(handlers: Sequence[Handler], settings: Settings) -> Iterator[Check]:
    """Show the options of the handlers, and those that will not do what was probably meant."""
    shown = [f"{each.pattern}: {', '.join(each.options.words)}" for each in handlers if each.options.words]
    advice = [f"{each.pattern}: {advice}" for each in handlers for advice in each.options.advice(settings)]
    if shown:
        yield ok("limits", "; ".join(sorted(shown)))
    if advice:
        yield warn("limits", "; ".join(sorted(advice)))


def check_files(settings: Settings) -> list[Check]:
    """Check that the limit on open files allows the configured number of connections."""
    affordable, wanted = affordable_connections(settings), settings.connections_most
    if affordable < wanted:
        detail = f"the limit on open files allows {affordable} connections per process, not {wanted}: raise it"
        return [warn("files", f"{detail} (ulimit -n)")]
    return [ok("files", f"enough for {wanted} connections per process")]


async def check_postgres(settings: Settings, *, wait: bool = False) -> AsyncIterator[Check]:
    """Check the version, the pooler, that it is writable, durability, the schema and the connection limit.

    `wait`: if it cannot be reached, or falls silent, all is tried again for a while: it may be starting just now.
    """
    for left in reversed(range(_ATTEMPTS if wait else 1)):
        try:
            found = await _check_postgres_once(settings)
        except LedgerRefused as error:
            yield fail("postgres", error.explained, exit_code=error.exit_code)
            return
        except LedgerUnavailable as error:
            if left:
                await asyncio.sleep(_PAUSE_SECONDS)
                continue
            yield fail("postgres", str(error))
            return
        for check in found:
            yield check
        return


async def _check_postgres_once(settings: Settings) -> list[Check]:
    dsn = settings.database_url.get_secret_value() if settings.database_url else ""
    try:
        connection = await connect(dsn, settings.postgres_timeout_seconds, PinnedConnection, statement_cache_size=0)
    except asyncpg.PostgresError as error:
        # With the server's message, which holds no password.
        raise LedgerUnavailable(f"cannot connect: {in_one_line(error)} ({explain(error, _NO_ADVICE)})") from error
    except UNAVAILABLE as error:
        raise LedgerUnavailable(f"cannot connect: {explain(error)}") from error
    try:
        connection.schema = settings.schema_name
        return [check async for check in _inspect_postgres(connection, dsn, settings)]
    except (*UNAVAILABLE, LedgerUnavailable) as error:
        raise LedgerUnavailable(f"failed during the checks: {describe(error)}") from error
    finally:
        connection.terminate()


async def _inspect_postgres(connection: PinnedConnection, dsn: str, settings: Settings) -> AsyncIterator[Check]:
    if (unsuitable := await check_product(connection)) is not None:  # before its version, which is not PostgreSQL's
        yield unsuitable
        return
    version = await _setting(connection, "server_version")
    number = int(await _setting(connection, "server_version_num"))
    if number < _MIN_POSTGRES:
        yield fail("postgres", f"version {version} is too old: 14 or newer is required")
        return
    yield ok("postgres", f"version {version}")
    if await _pooled_by_transaction(connection, dsn, settings.postgres_timeout_seconds):
        yield fail(
            "pooler",
            "DATABASE_URL leads to PgBouncer (or a similar pooler) in transaction mode, which keeps no session "
            "settings, timeouts or ledger epoch; use session mode or the direct address",
        )
    async with connection.transaction():
        recovering = await connection.fetchval("SELECT pg_is_in_recovery()")
        if recovering or await _setting(connection, "default_transaction_read_only") == "on":
            yield fail("writable", "the server is read-only (a standby, or default_transaction_read_only = on)")
    for name, lost in (
        ("fsync", "a crash of the machine can lose or corrupt"),
        ("full_page_writes", "a torn page can corrupt"),
    ):
        if await _setting(connection, name) == "off":
            yield warn(name, f"{name} = off: {lost} events that were answered with 200; turn it on")
    async for check in _check_database(connection, settings):
        yield check


async def _check_database(connection: PinnedConnection, settings: Settings) -> AsyncIterator[Check]:
    if await _setting(connection, "synchronous_commit") not in ("on", "remote_apply"):
        yield ok("synchronous_commit", "is not on by default; our connections set it to on")
    if not await connection.fetchval(_MAY_EMIT):
        yield fail("replication", "the role may not execute pg_logical_emit_message(boolean, text, text): grant it")
    if (encoding := await _setting(connection, "server_encoding")) != "UTF8":
        yield fail("encoding", unfit_encoding(encoding))
    if (distributed := await check_distribution(connection, settings.schema_name)) is not None:
        yield distributed
    yield await _check_connections(connection, settings)
    async for check in check_schema(connection, settings.handlers):
        yield check
    if settings.notify_url is not None and not await connection.fetchval(_FINDS_DEAD_EVENTS, settings.schema_name):
        yield warn(
            "notify",
            "the index stripe_event_attempts_final is missing: each look for dead events reads all attempts; create it "
            "(docs/how-to/large-ledger.md)",
        )


async def _setting(connection: asyncpg.Connection, name: str) -> str:
    value: str = await connection.fetchval("SELECT current_setting($1)", name)
    return value


async def _check_connections(connection: asyncpg.Connection, settings: Settings) -> Check:
    """Whether all pools of all workers of this service fit; a rolling deploy needs twice as many for a while."""
    each, workers = settings.postgres_connections, settings.workers
    needed, available = each * workers, await connection.fetchval(_AVAILABLE_CONNECTIONS)
    detail = f"{each} for each of {number_of(workers, 'worker', 'workers')}, of {available} that Postgres has left"
    if needed <= available:
        return ok("connections", detail)
    return warn("connections", f"{detail}: raise max_connections, or lower FIRSTCLAIM_HANDLER_SLOTS")


async def _pooled_by_transaction(connection: asyncpg.Connection, dsn: str, timeout_seconds: float) -> bool:
    """Whether a pooler assigns one server connection to several clients in turn.

    Behind a pooler, the backend's pid differs from the pid that was reported when the connection started. In
    transaction mode, the server process of an idle client is assigned to the next client that begins a transaction. In
    session mode it never is.
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
            other = await connect(dsn, timeout_seconds, asyncpg.Connection, statement_cache_size=0)
            others.append(other)
            await other.execute("BEGIN")
            if await backend(other) == mine:
                return True
        async with connection.transaction():
            return await backend(connection) != mine
    finally:
        for other in others:
            other.terminate()


def raise_if_fatal(checks: list[Check]) -> None:
    """Raise `ConfigurationError` with the checks that find the environment at fault, or `StoreUnsuitable` with all."""
    fatal = [check for check in checks if check.fatal]
    if faults := [check.detail for check in fatal if check.exit_code == ConfigurationError.exit_code]:
        raise ConfigurationError(faults)
    if fatal:
        raise StoreUnsuitable("\n".join(f"{check.name}: {check.detail}" for check in fatal))
