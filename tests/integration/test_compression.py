"""How Postgres compresses the bodies of events, on a server with lz4 and on one without.

The wheel's server has no lz4, and Debian's has: where that is not installed, its tests are skipped.
"""

import asyncio
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path

import asyncpg
import pytest
from alembic import command

from firstclaim.embedded import data_folder
from firstclaim.embedded.processes import _popen_options
from firstclaim.migrations.schema import head, migrate
from tests.fixtures import event_body
from tests.integration.world import until
from tests.stores import Stores, drop, with_database

SECONDS = 30.0
INSERT = "INSERT INTO firstclaim.stripe_event_payloads VALUES ($1, $2)"
SERVERS = ["stores", "installed"]
DEBIAN = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))


@pytest.fixture(scope="module")
def installed() -> Iterator[str]:
    """The address of a server of the newest PostgreSQL that the system has."""
    if not DEBIAN:
        pytest.skip("no PostgreSQL of the system's is installed")
    program = DEBIAN[-1]
    # Not pytest's folder: as root, that is closed to the user of the servers.
    folder = Path(tempfile.mkdtemp(prefix="firstclaim-lz4-"))
    user = data_folder._server_user(folder / "no-cluster-yet")
    if user is not None:
        shutil.chown(folder, user.uid, user.gid)
    data, options = folder / "data", _popen_options(signal.SIGQUIT, user)
    make = [str(program.with_name("initdb")), "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "-N"]
    subprocess.run([*make, "-D", str(data)], check=True, capture_output=True, **options)
    run = [str(program), "-D", str(data), "-k", str(folder), "-c", "listen_addresses=", "-F"]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(run, stdout=log, stderr=log, **options)
    try:
        url = f"postgresql://postgres@/postgres?host={folder}"
        asyncio.run(until(lambda: accepts(url)))
        yield url
    finally:
        server.send_signal(signal.SIGQUIT)
        server.wait(SECONDS)
        shutil.rmtree(folder)


async def accepts(url: str) -> bool:
    with suppress(OSError, asyncpg.PostgresError):
        await (await asyncpg.connect(url)).close()
        return True
    return False


@pytest.fixture
def server_url(request: pytest.FixtureRequest) -> str:
    """The address of the server that the parameter names."""
    server = request.getfixturevalue(request.param)
    return server.postgres_url if isinstance(server, Stores) else str(server)


@pytest.fixture
async def old_url(server_url: str) -> AsyncIterator[str]:
    """A ledger that revision 0006 has left."""
    name = f"test_{secrets.token_hex(6)}"
    await run(server_url, f"CREATE DATABASE {name} ENCODING 'UTF8' TEMPLATE template0")
    url = with_database(server_url, name)
    await migrate(url, SECONDS)
    await run(url, "ALTER TABLE firstclaim.stripe_event_payloads ALTER COLUMN body SET COMPRESSION default")
    for column in ("failure_group", "handler", "error_class", "place"):  # of 0008
        await run(url, f"ALTER TABLE firstclaim.stripe_event_attempts DROP COLUMN {column}")
    for table in ("operator_notices", "stripe_event_duplicates", "operator_pauses"):  # of 0009, 0011 and 0013
        await run(url, f"DROP TABLE firstclaim.{table}")
    await run(
        url,
        "ALTER TABLE firstclaim.stripe_event_payloads"
        " DROP COLUMN traceparent, DROP COLUMN headers, DROP COLUMN received_at",
    )
    await run(url, "ALTER TABLE firstclaim.stripe_events DROP COLUMN endpoint, DROP COLUMN parent_id")  # of 0012
    await run(url, "UPDATE firstclaim.ledger_revision SET version_num = '0006'")
    yield url
    await drop(url)


async def run(url: str, statement: str, *arguments: object) -> list[asyncpg.Record]:
    connection = await asyncpg.connect(url)
    try:
        return await connection.fetch(statement, *arguments)
    finally:
        await connection.close()


async def has_lz4(url: str) -> bool:
    """Whether the server can compress with it, by trying."""
    try:
        await run(url, "CREATE TABLE tried (a text COMPRESSION lz4)")
    except asyncpg.FeatureNotSupportedError:
        return False
    return True


async def compression(url: str) -> dict[str, str | None]:
    """That of each body, by the id of the event."""
    rows = await run(url, "SELECT event_id, pg_column_compression(body) FROM firstclaim.stripe_event_payloads")
    return {row[0]: row[1] for row in rows}


@pytest.mark.parametrize("server_url", SERVERS, indirect=True)
async def test_new_bodies_are_compressed_with_lz4(old_url: str) -> None:
    """Where the server has lz4, and only there; bodies from before are not rewritten, and all are read as written."""
    body = event_body()
    await run(old_url, INSERT, "evt_old", body)
    assert await migrate(old_url, SECONDS) == ("0006", head())
    await run(old_url, INSERT, "evt_new", body)
    assert await compression(old_url) == {"evt_old": "pglz", "evt_new": "lz4" if await has_lz4(old_url) else "pglz"}
    assert {row[0] for row in await run(old_url, "SELECT body FROM firstclaim.stripe_event_payloads")} == {body}


@pytest.mark.parametrize("server_url", SERVERS, indirect=True)
async def test_a_role_that_does_not_own_the_table_migrates(old_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compression is left as it was. (Later revisions add columns, which only the owner may.)"""
    upgrade = command.upgrade
    monkeypatch.setattr(command, "upgrade", lambda config, _: upgrade(config, "0007"))
    role = f"test_{secrets.token_hex(6)}"
    await run(old_url, f"CREATE ROLE {role}")
    try:
        await run(old_url, f"GRANT {role} TO CURRENT_USER")
        await run(old_url, f"GRANT USAGE ON SCHEMA firstclaim TO {role}")
        await run(old_url, f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA firstclaim TO {role}")
        assert await migrate(f"{old_url}&role={role}", SECONDS, handlers=["shop.handlers"]) == ("0006", head())
        await run(old_url, INSERT, "evt_new", event_body())
        assert await compression(old_url) == {"evt_new": "pglz"}
    finally:
        await run(old_url, f"DROP OWNED BY {role}")
        await run(old_url, f"DROP ROLE {role}")


@pytest.mark.parametrize("server_url", ["installed"], indirect=True)
async def test_a_backup_is_waited_for_and_no_delivery_waits(old_url: str) -> None:
    """While a dump reads the table, the migration gives way to deliveries; then it is done."""
    backup, delivery = [await asyncpg.connect(old_url) for _ in range(2)]
    try:
        await backup.execute("BEGIN; LOCK TABLE firstclaim.stripe_event_payloads IN ACCESS SHARE MODE")
        migrating = asyncio.create_task(migrate(old_url, SECONDS))
        waiting = "SELECT count(*) > 0 FROM pg_locks WHERE NOT granted AND mode = 'AccessExclusiveLock'"

        async def waits() -> bool:
            return migrating.done() or bool(await delivery.fetchval(waiting))

        for number in range(3):
            await until(waits)
            assert not migrating.done()
            await delivery.execute("SET lock_timeout = '1s'")
            await delivery.execute(INSERT, f"evt_{number}", event_body())
        await backup.execute("COMMIT")
        assert await migrating == ("0006", head())
    finally:
        await asyncio.gather(backup.close(), delivery.close())
