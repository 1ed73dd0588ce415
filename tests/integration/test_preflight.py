"""The checks before the start: on a Postgres that seems to be set otherwise, and on a Redis that refuses commands."""

import asyncio
import re
import secrets
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import hiredis
import pytest
from pydantic import SecretStr
from redis.crc import key_slot

from firstclaim.server.check import Check, Verdict
from firstclaim.server.preflight import check_notify, check_postgres
from firstclaim.server.redis_check import _key_at, check_redis
from firstclaim.settings import Settings
from tests.notice_receiver import receiving_notices
from tests.proxy import before_postgres
from tests.stores import Stores, redis_user

# The checks call functions by their bare names, and this database's search_path names `public` first.
OURS_FIRST = """
DO $$ BEGIN
    EXECUTE format('ALTER DATABASE %I SET search_path = public, pg_catalog', current_database());
END $$;
"""
PRETEND = """
CREATE FUNCTION current_setting(name text) RETURNS text LANGUAGE sql AS
    $$ SELECT CASE name WHEN '{name}' THEN 'off' ELSE pg_catalog.current_setting(name) END $$;
"""
REVOKED = """
CREATE FUNCTION has_function_privilege(oid, text) RETURNS bool LANGUAGE sql AS $$ SELECT false $$;
"""


@pytest.mark.parametrize("name", ["fsync", "full_page_writes"])
async def test_a_server_that_can_lose_events_is_reported(database_url: str, name: str) -> None:
    """A setting with which a crash loses events that were answered with 200 is a warning that names it."""
    found = await checked(database_url, PRETEND.format(name=name))
    assert found[name].verdict is Verdict.WARN
    assert f"{name} = off" in found[name].detail
    assert "replication" not in found


async def test_a_read_that_cannot_wait_for_replication_is_reported(database_url: str) -> None:
    """Without the right to write a message to the log, no duplicate could be answered by the ledger: it is named."""
    found = await checked(database_url, REVOKED)
    assert found["replication"].verdict is Verdict.FAIL
    assert "pg_logical_emit_message" in found["replication"].detail


PRODUCT = "CREATE FUNCTION version() RETURNS text LANGUAGE sql AS $$ SELECT '{version}' $$;"
CITUS = """
CREATE TABLE pg_dist_partition (logicalrelid regclass, partmethod "char", colocationid integer, repmodel "char");
INSERT INTO pg_dist_partition VALUES ('firstclaim.stripe_events', '{method}', {colocation}, '{model}'),
                                     ('effects', 'h', 7, 's');
"""


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("CockroachDB CCL v25.2.1 (x86_64-pc-linux-gnu, built 2025/06/09, go1.23.7)", "CockroachDB cannot hold"),
        (
            "PostgreSQL 11.2-YB-2.20.1.0-b0 on x86_64-pc-linux-gnu, 64-bit",
            "YugabyteDB is not proved",
        ),
        ("PostgreSQL 15.2-YB-2025.1.0.0-b1 on x86_64-pc-linux-gnu, 64-bit", "YugabyteDB is not proved"),
    ],
)
async def test_a_database_that_is_no_postgresql_is_refused(database_url: str, version: str, said: str) -> None:
    """It is refused by its name, whatever version of PostgreSQL it claims to be, and nothing else is asked of it."""
    found = await checked(database_url, PRODUCT.format(version=version))
    assert list(found) == ["postgres"]
    assert found["postgres"].fatal
    assert said in found["postgres"].detail


@pytest.mark.parametrize(
    ("method", "colocation", "model", "refused"),
    [("h", 1, "s", True), ("n", 2, "t", True), ("n", 3, "s", True), ("n", 0, "s", False)],
    ids=["distributed", "reference", "of one shard", "local"],
)
async def test_a_ledger_that_citus_distributes_is_refused(
    database_url: str, method: str, colocation: int, model: str, refused: bool
) -> None:
    """A table of the ledger that is distributed is named. One that stays on this server, or another's, is no fault."""
    found = await checked(database_url, CITUS.format(method=method, colocation=colocation, model=model))
    assert ("citus" in found) is refused
    if refused:
        assert found["citus"].fatal
        assert "distributes stripe_events of schema firstclaim" in found["citus"].detail


async def test_notices_need_the_index_of_dead_events(database_url: str) -> None:
    """Where notices are sent, a ledger without it is a warning: each look would read all attempts."""
    url = SecretStr("https://hooks.example.com/x")
    assert "notify" not in await checked(database_url, "", notify_url=url)
    drop = "DROP INDEX firstclaim.stripe_event_attempts_final;"
    found = await checked(database_url, drop, notify_url=url)
    assert found["notify"].verdict is Verdict.WARN
    assert "stripe_event_attempts_final is missing" in found["notify"].detail
    assert "notify" not in await checked(database_url, "")


async def checked(database_url: str, pretend: str, **changes: Any) -> dict[str, Check]:
    connection = await asyncpg.connect(database_url)
    await connection.execute(pretend + OURS_FIRST)
    await connection.close()
    settings = Settings(
        database_url=SecretStr(database_url), stripe_webhook_secrets=(SecretStr("whsec_test"),), **changes
    )
    return {check.name: check async for check in check_postgres(settings)}


async def test_a_server_that_falls_silent_at_the_start_is_asked_again(database_url: str) -> None:
    """A connection that is lost in the middle of the checks ends no start: they are made again, from the first on."""
    async with before_postgres(database_url) as (proxy, url):
        met: list[bytes] = []

        def cut_first(chunk: bytes) -> None:
            if b"pg_is_in_recovery" in chunk and not met:
                met.append(chunk)
                proxy.cut()

        proxy.on_sent = cut_first
        settings = Settings(database_url=SecretStr(url), stripe_webhook_secrets=(SecretStr("whsec_test"),))
        [fault] = [check async for check in check_postgres(settings)]
        assert (fault.verdict, "failed during the checks" in fault.detail) == (Verdict.FAIL, True)
        met.clear()
        found = [check async for check in check_postgres(settings, wait=True)]
    assert met
    assert Verdict.FAIL not in {check.verdict for check in found}


# -- connections --------------------------------------------------------------------------------------

NEEDED = Settings.model_construct().postgres_connections


@pytest.fixture
async def role(database_url: str) -> AsyncIterator[tuple[str, asyncpg.Connection]]:
    """A role that may log in to the database, and an administrator's session, which is named as the service's are."""
    admin = await asyncpg.connect(database_url, server_settings={"application_name": "firstclaim"})
    name = f"test_{secrets.token_hex(6)}"
    await admin.execute(f"CREATE ROLE {name} LOGIN")
    yield name, admin
    await admin.execute(f"DROP ROLE {name}")
    await admin.close()


async def connections(url: str, workers: int = 1) -> tuple[Verdict, str]:
    """What `check` says of the connections of that many workers."""
    settings = Settings(database_url=SecretStr(url), workers=workers)
    [check] = [check async for check in check_postgres(settings) if check.name == "connections"]
    return check.verdict, check.detail


@pytest.mark.parametrize("limited", ["DATABASE", "ROLE"])
async def test_too_few_connections(database_url: str, role: tuple[str, asyncpg.Connection], limited: str) -> None:
    """The pools of all workers must fit, within the limits of the role and of the database too."""
    name, admin = role
    user = urlsplit(database_url).username
    url = database_url.replace(f"{user}@", f"{name}@", 1) if limited == "ROLE" else database_url
    limit = f"ALTER {limited} {name if limited == 'ROLE' else urlsplit(url).path[1:]} CONNECTION LIMIT "
    await admin.execute(f"{limit}{NEEDED}")
    enough = f"{NEEDED} for each of 1 worker, of {NEEDED} that Postgres has left"
    assert await connections(url) == (Verdict.OK, enough)
    assert (await connections(url, workers=2))[0] is Verdict.WARN
    await admin.execute(f"{limit}{NEEDED - 1}")
    verdict, detail = await connections(url)
    assert verdict is Verdict.WARN
    assert "raise max_connections, or lower FIRSTCLAIM_HANDLER_SLOTS" in detail


async def test_the_server_reserves_some_connections(database_url: str, role: tuple[str, asyncpg.Connection]) -> None:
    """Without a limit of the role or the database, what the server does not reserve is what there is."""
    names = ("max_connections", "superuser_reserved_connections")
    most, reserved = [int(await role[1].fetchval(f"SHOW {name}")) for name in names]
    verdict, detail = await connections(database_url, workers=64)
    found = re.search(r"of (\d+) that Postgres has left", detail)
    assert verdict is Verdict.WARN
    assert found
    assert most // 2 < int(found[1]) <= most - reserved


async def test_sessions_of_others_are_in_the_way(database_url: str, role: tuple[str, asyncpg.Connection]) -> None:
    """One of another program takes a connection; the service's own sessions may be those of the pools."""
    await role[1].execute(f"ALTER DATABASE {urlsplit(database_url).path[1:]} CONNECTION LIMIT {NEEDED}")
    assert (await connections(database_url))[0] is Verdict.OK
    other = await asyncpg.connect(database_url, server_settings={"application_name": "psql"})
    try:
        assert (await connections(database_url))[0] is Verdict.WARN
    finally:
        await other.close()


def settings_of(redis_url: str) -> Settings:
    return Settings(redis_url=SecretStr(redis_url), stripe_webhook_secrets=(SecretStr("whsec_test"),))


@pytest.mark.parametrize("command", ["EVAL", "PTTL", "GET", "PING"])
async def test_a_missing_right_is_named(stores: Stores, command: str) -> None:
    """A Redis user who may not run one of the lock's commands fails the check, which names the command."""
    async with redis_user(stores, f"-{command.lower()}") as (_, url):
        [check] = [check async for check in check_redis(settings_of(url))]
    assert (check.verdict, check.fatal) == (Verdict.FAIL, True)
    assert f": {command}" in check.detail.partition(". The lock needs")[0]


async def test_a_user_without_info_is_warned(stores: Stores) -> None:
    """A Redis user who may not run INFO, which the lock does not need, gets a warning and the other checks."""
    async with redis_user(stores, "-info") as (_, url):
        found = [check async for check in check_redis(settings_of(url))]
    assert [check.verdict for check in found] == [Verdict.WARN, Verdict.OK]


async def test_a_cluster_whose_keys_have_a_hash_tag() -> None:
    """One master has all keys: the others have none that could be tried, and the check ends."""
    table = [(0, 8191, [("h1", 1)]), (8192, 16383, [("h2", 2)])]
    for prefix in ("{shop}:", "firstclaim:"):
        found = [_key_at(host, table, prefix) for host in [("h1", 1), ("h2", 2)]]
        assert (None in found) is prefix.startswith("{")
        for key, (first, last, _) in zip(found, table, strict=True):
            assert key is None or first <= key_slot(key.encode()) <= last


@pytest.mark.parametrize("reply", [b":1\r\n", b"*0\r\n", b"$5\r\nhello\r\n", b"+OK\r\n", b"$-1\r\n"])
async def test_a_server_that_answers_nonsense_is_a_failed_check(reply: bytes) -> None:
    """A server whose replies have unexpected types or content fails the check, which raises nothing."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        commands = hiredis.Reader()
        while chunk := await reader.read(65_536):
            commands.feed(chunk)
            while (command := commands.gets()) is not False:
                writer.write(b"+OK\r\n" if command[0] == b"CLIENT" else reply)
        writer.close()

    listener = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with listener:
        url = f"redis://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        [check] = [check async for check in check_redis(settings_of(url))]
    assert (check.verdict, check.fatal) == (Verdict.FAIL, True)


async def test_the_address_for_notices_is_tried_without_a_notice(unused_tcp_port: int) -> None:
    """An answer of any kind will do; no answer is a warning; neither shows the path, and nothing is posted."""

    async def check(url: str | None) -> list[Check]:
        settings = Settings(notify_url=None if url is None else SecretStr(url))
        return [each async for each in check_notify(settings)]

    assert await check(None) == []
    async with receiving_notices() as receiver:
        [reached] = await check(receiver.url)
        assert [each.partition(" ")[0] for each in receiver.requests] == ["HEAD"]
    [unreachable] = await check(f"http://127.0.0.1:{unused_tcp_port}/services/c4n4rypath")
    assert (reached.verdict, unreachable.verdict) == (Verdict.OK, Verdict.WARN)
    assert "status 405" in reached.detail
    assert "ConnectError" in unreachable.detail
    assert f"http://127.0.0.1:{unused_tcp_port} " in unreachable.detail
    assert not reached.fatal
    assert not unreachable.fatal
    assert "c4n4rypath" not in reached.detail + unreachable.detail
