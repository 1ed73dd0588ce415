"""What a migration or a check finds in its way: each time the schema, the table and the statement that helps."""

import re
import secrets
from collections.abc import AsyncIterator

import asyncpg
import pytest
from pydantic import SecretStr

from firstclaim.errors import StoreUnsuitable
from firstclaim.migrations.schema import head, migrate, read_version
from firstclaim.postgres.connection import open_connection
from firstclaim.server.check import Check, Verdict
from firstclaim.server.preflight import check_postgres
from firstclaim.settings import Settings
from firstclaim.web.health import Health
from firstclaim.web.readiness_checks import readiness_checks
from tests.integration.test_adoption import TABLES, as_before
from tests.integration.world import build, delivery
from tests.stores import Stores, drop

SECONDS = 30.0


@pytest.fixture
async def admin(empty_url: str) -> AsyncIterator[asyncpg.Connection]:
    """The owner of an empty database."""
    connection = await asyncpg.connect(empty_url)
    yield connection
    await connection.close()


@pytest.fixture
async def role(admin: asyncpg.Connection) -> AsyncIterator[str]:
    """A role without rights."""
    name = f"test_{secrets.token_hex(6)}"
    await admin.execute(f"CREATE ROLE {name}; GRANT {name} TO CURRENT_USER")  # who may be no superuser
    yield name
    await admin.execute(f"DROP OWNED BY {name} CASCADE; DROP ROLE {name}")


def of_role(url: str, role: str) -> str:
    """The same database, as `role`."""
    return f"{url}&role={role}" if "?" in url else f"{url}?role={role}"


async def checked(url: str, **changes: object) -> dict[str, Check]:
    """The checks of Postgres that are not ok, by name; all are there if none is."""
    settings = Settings(database_url=SecretStr(url)).model_copy(update=changes)
    found = [check async for check in check_postgres(settings)]
    return {check.name: check for check in found if check.verdict is not Verdict.OK and check.name != "fsync"}


async def test_a_missing_right_to_create_the_schema(empty_url: str, admin: asyncpg.Connection, role: str) -> None:
    """The statement that the error names is enough for the rest."""
    await admin.execute(f"GRANT CREATE ON SCHEMA public TO {role}")
    database = await admin.fetchval("SELECT current_database()")
    with pytest.raises(
        StoreUnsuitable, match=rf"in database {database}: .* CREATE SCHEMA firstclaim AUTHORIZATION {role};"
    ):
        await migrate(of_role(empty_url, role), SECONDS)
    await admin.execute(f"CREATE SCHEMA firstclaim AUTHORIZATION {role};")
    assert await migrate(of_role(empty_url, role), SECONDS) == (None, head())


async def test_a_missing_right_in_the_schema(empty_url: str, admin: asyncpg.Connection, role: str) -> None:
    """Someone else's schema: its owner grants the right."""
    await admin.execute(f"CREATE SCHEMA firstclaim; GRANT CREATE ON SCHEMA public TO {role}")
    with pytest.raises(StoreUnsuitable, match=rf"GRANT USAGE, CREATE ON SCHEMA firstclaim TO {role};"):
        await migrate(of_role(empty_url, role), SECONDS)
    await admin.execute(f"GRANT USAGE, CREATE ON SCHEMA firstclaim TO {role};")
    assert await migrate(of_role(empty_url, role), SECONDS) == (None, head())


@pytest.mark.usefixtures("superuser")  # the schema `public` is the server's before 15
async def test_the_shipped_handlers_table(empty_url: str, admin: asyncpg.Connection, role: str) -> None:
    """Where its table cannot be created the error names both ways out; one that your migrations made is kept."""
    await admin.execute(f"CREATE SCHEMA firstclaim AUTHORIZATION {role}; REVOKE CREATE ON SCHEMA public FROM PUBLIC")
    url = of_role(empty_url, role)
    with pytest.raises(
        StoreUnsuitable, match=rf"payment_failures in schema public: run GRANT CREATE ON SCHEMA public TO {role};"
    ):
        await migrate(url, SECONDS)
    assert await migrate(url, SECONDS, handlers=["shop.handlers"]) == (None, head())
    assert (await checked(url))["handlers"].detail.endswith("payment_failures is missing: run `firstclaim migrate`")
    await migrate(empty_url, SECONDS)
    assert await migrate(url, SECONDS) == (head(), head())


async def test_a_foreign_table_in_the_schema(empty_url: str, admin: asyncpg.Connection) -> None:
    """A table of our name that is no ledger's is neither used nor changed."""
    await admin.execute("CREATE SCHEMA firstclaim; CREATE TABLE firstclaim.ledger_epoch (mine int)")
    with pytest.raises(StoreUnsuitable, match=r"ALTER TABLE firstclaim\.ledger_epoch RENAME TO .*FIRSTCLAIM_SCHEMA"):
        await migrate(empty_url, SECONDS)
    assert await migrate(empty_url, SECONDS, schema="ledger") == (None, head())


@pytest.mark.parametrize("columns", ["version int", "version_num int"])
async def test_a_foreign_table_with_the_name_of_the_revision(
    empty_url: str, admin: asyncpg.Connection, columns: str
) -> None:
    """`check` and `migrate` name it as not ours, with the statement to run, and that statement helps."""
    await admin.execute(f"CREATE SCHEMA firstclaim; CREATE TABLE firstclaim.ledger_revision ({columns})")
    said = (
        r"^firstclaim\.ledger_revision exists and is no table of a ledger: rename it \(ALTER TABLE firstclaim\.ledger_"
    )
    with pytest.raises(StoreUnsuitable, match=said):
        await migrate(empty_url, SECONDS)
    found = (await checked(empty_url))["schema"]
    assert re.match(said, found.detail)
    await admin.execute("ALTER TABLE firstclaim.ledger_revision RENAME TO mine;")
    assert await migrate(empty_url, SECONDS) == (None, head())


async def test_a_foreign_table_beside_the_revision(database_url: str) -> None:
    """A table of events without event ids is not ours either."""
    connection = await asyncpg.connect(database_url)
    await connection.execute(
        "DROP TABLE firstclaim.stripe_events CASCADE; CREATE TABLE firstclaim.stripe_events (a int)"
    )
    await connection.close()
    with pytest.raises(StoreUnsuitable, match=r"^firstclaim\.stripe_events exists and is no table"):
        await migrate(database_url, SECONDS)
    assert "stripe_events exists and is no table" in (await checked(database_url))["schema"].detail


async def test_a_role_of_the_service_alone(empty_url: str, admin: asyncpg.Connection, role: str) -> None:
    """Where another role migrates, `check` names the grants, first for the schema and then for a single right."""
    await migrate(empty_url, SECONDS)
    grants = (
        f"GRANT USAGE ON SCHEMA firstclaim TO {role}; GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA "
    )
    url = of_role(empty_url, role)
    assert f"let its owner run {grants}firstclaim TO {role};" in (await checked(url))["schema"].detail
    with pytest.raises(StoreUnsuitable, match=f"the role {role} may not use the schema firstclaim .*{grants}"):
        await migrate(url, SECONDS)
    await admin.execute(f"{grants} firstclaim TO {role};")
    assert await migrate(url, SECONDS, handlers=["shop.handlers"]) == (head(), head())
    assert set(await checked(url)) == set()
    await admin.execute(f"REVOKE UPDATE ON firstclaim.stripe_events FROM {role}")
    found = (await checked(url))["schema"]
    assert (found.verdict, found.fatal) == (Verdict.FAIL, True)
    assert f"the role {role} may not UPDATE firstclaim.stripe_events: run {grants}" in found.detail


async def test_a_role_with_the_schemas_name_is_warned_of(empty_url: str, admin: asyncpg.Connection, role: str) -> None:
    """Its search_path begins with our schema; its tables are created there, and the shipped handler's are not."""
    await admin.execute(f"CREATE SCHEMA {role} AUTHORIZATION {role}; GRANT CREATE ON SCHEMA public TO {role}")
    url = of_role(empty_url, role)
    await migrate(url, SECONDS, schema=role)
    assert await admin.fetchval("SELECT to_regclass('public.payment_failures') IS NOT NULL")
    found = (await checked(url, schema_name=role))["search_path"]
    assert found.verdict is Verdict.WARN
    assert f"ALTER ROLE {role} IN DATABASE" in found.detail


async def test_a_second_ledger_is_warned_of(database_url: str) -> None:
    """An older build that was run on a new ledger has made its own in `public`: nobody dispatches its events."""
    connection = await asyncpg.connect(database_url)
    await as_before(connection)
    await migrate(database_url, SECONDS, schema="other")
    assert "ledger" not in await checked(database_url, schema_name="other")  # views
    await connection.execute(f"DROP VIEW {', '.join(TABLES)}; DROP SCHEMA other CASCADE")
    await migrate(database_url, SECONDS)
    await connection.execute("SET search_path = public")
    for table in TABLES:
        await connection.execute(f"CREATE TABLE {table} (LIKE firstclaim.{table} INCLUDING ALL)")
    assert "a second ledger in schema public" in (await checked(database_url))["ledger"].detail
    await connection.close()


async def test_a_database_that_is_not_utf8(stores: Stores) -> None:
    """It could not hold every event: refused before the start, with the statement that creates another one."""
    name = f"test_{secrets.token_hex(6)}"
    connection = await asyncpg.connect(stores.postgres_url)
    await connection.execute(f"CREATE DATABASE {name} ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
    await connection.close()
    url = stores.database(name)
    try:
        with pytest.raises(StoreUnsuitable, match=r"LATIN1.*ENCODING 'UTF8'"):
            await migrate(url, SECONDS)
        found = (await checked(url))["encoding"]
        assert (found.verdict, found.fatal) == (Verdict.FAIL, True)
        assert "LATIN1" in found.detail
        assert "ENCODING 'UTF8'" in found.detail
    finally:
        await drop(url)


@pytest.mark.parametrize("schema", ["ledger", "order"], ids=["another", "a-reserved-word"])
async def test_a_schema_of_another_name(
    stores: Stores, empty_url: str, redis_prefix: str, admin: asyncpg.Connection, schema: str
) -> None:
    """FIRSTCLAIM_SCHEMA names it: everything goes there, and nothing to the default."""
    assert await migrate(empty_url, SECONDS, schema=schema) == (None, head())
    assert await checked(empty_url, schema_name=schema) == {}
    world = await build(empty_url, stores.redis_url, redis_prefix, schema_name=schema)
    given = delivery()
    await world.pipeline.deliver(given)
    assert await admin.fetchval(f'SELECT event_id FROM "{schema}".stripe_events') == given.event.id
    assert await admin.fetchval("SELECT to_regnamespace('firstclaim')") is None
    await world.close()


async def test_a_revision_without_a_ledger_is_not_ready(database_url: str, stores: Stores, redis_prefix: str) -> None:
    """`/readyz` and `check` look into the ledger: a table of revisions says nothing of the table of events."""
    world = await build(database_url, stores.redis_url, redis_prefix)
    parts = world.components
    checks = readiness_checks(None, parts.lock, parts.ingest, parts.recovery, parts.slots)  # type: ignore[arg-type]
    [ready] = [check for check in checks if check.name == "schema"]
    assert (await ready.run())[0].health is Health.OK
    await world.database.execute("ALTER TABLE firstclaim.stripe_events RENAME TO elsewhere")
    finding, _ = await ready.run()
    assert finding.health is Health.DOWN
    assert "no table stripe_events" in str(finding.detail)
    assert "no table stripe_events" in (await checked(database_url))["schema"].detail
    await world.close()


async def test_a_missing_right_is_named_when_it_is_read(empty_url: str, admin: asyncpg.Connection, role: str) -> None:
    """The version is read with the message of the server, and the grants."""
    await migrate(empty_url, SECONDS)
    connection = await open_connection(of_role(empty_url, role), SECONDS) if await granted(admin, role) else None
    assert connection is not None
    try:
        with pytest.raises(StoreUnsuitable, match=r"permission denied for table stripe_events: .*GRANT USAGE"):
            await read_version(connection)
    finally:
        await connection.close()


async def granted(admin: asyncpg.Connection, role: str) -> bool:
    """All that opening a connection reads."""
    await admin.execute(f"GRANT USAGE ON SCHEMA firstclaim TO {role}")
    await admin.execute(f"GRANT SELECT ON firstclaim.ledger_epoch, firstclaim.ledger_revision TO {role}")
    return True
