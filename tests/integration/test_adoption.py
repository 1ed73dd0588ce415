"""A ledger of a build from before the schema: moved under load, while that build goes on with its own statements.

The older build is this one with the schema taken out of its SQL: that is what it sent.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import asyncpg
import pytest

from firstclaim import Context, Event
from firstclaim.errors import StoreUnsuitable
from firstclaim.event import Delivery
from firstclaim.inbox.model import metadata
from firstclaim.migrations.schema import head, migrate
from firstclaim.operations.commands import Commands
from firstclaim.operations.prune import Pruned, Retention, prune
from firstclaim.operations.selection import Selection
from firstclaim.outcome import Kind
from firstclaim.postgres import statement
from firstclaim.status import Status
from tests.integration.world import Function, World, build, delivery, effect
from tests.stores import Stores

SECONDS = 30.0
OLD = "an older build"  # instead of the name of a schema
LATER = ["operator_notices", "stripe_event_duplicates", "operator_pauses"]  # of 0009, 0011 and 0013
TABLES = [name for name in metadata.tables if name not in LATER]
OLDER = {  # of what the revisions from 0010 on brought
    "ARRAY(SELECT pattern FROM firstclaim.operator_pauses)": "CAST('{}' AS text[])",
    "body, traceparent, headers)\n    SELECT event_id, body, traceparent, headers": "body) SELECT event_id, body",
    ", duplicates AS (\n    DELETE FROM firstclaim.stripe_event_duplicates d USING doomed"
    " WHERE d.event_id = doomed.event_id\n)": "",
    "claimed_by, endpoint)": "claimed_by)",
    "END,\n           endpoint": "END",
    "p.traceparent, e.endpoint": "CAST(NULL AS text) AS traceparent, CAST(NULL AS text) AS endpoint",
}
Process = Callable[[str], Awaitable[World]]
EFFECT_TYPE = "invoice.payment_failed"


async def as_before(connection: asyncpg.Connection, revision: str = "0006") -> None:
    """Make of a new ledger what an older build left: tables and revision in `public`."""
    for table in TABLES:
        await connection.execute(f"ALTER TABLE firstclaim.{table} SET SCHEMA public")
    await connection.execute("DROP SCHEMA firstclaim CASCADE")
    await connection.execute("DROP INDEX stripe_event_attempts_final")
    for column in ("failure_group", "handler", "error_class", "place"):  # of 0008
        await connection.execute(f"ALTER TABLE stripe_event_attempts DROP COLUMN {column}")
    await connection.execute(
        "ALTER TABLE stripe_event_payloads DROP COLUMN traceparent, DROP COLUMN headers, DROP COLUMN received_at"
    )
    await connection.execute("ALTER TABLE stripe_events DROP COLUMN endpoint, DROP COLUMN parent_id")
    await connection.execute("CREATE TABLE alembic_version (version_num varchar(32) PRIMARY KEY)")
    await connection.execute("INSERT INTO alembic_version VALUES ($1)", revision)


@pytest.fixture
async def admin(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection of the test's own to an old ledger."""
    connection = await asyncpg.connect(database_url)
    await as_before(connection)
    yield connection
    await connection.close()


@pytest.fixture(autouse=True)
def older_statements(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections whose schema is `OLD` send each statement as the older build did."""
    in_schema = statement.in_schema

    def sent(sql: str, schema: str) -> str:
        if schema != OLD:
            return in_schema(sql, schema)
        for now, then in OLDER.items():
            sql = sql.replace(now, then)
        return sql.replace("firstclaim.", "")

    monkeypatch.setattr(statement, "in_schema", sent)


async def handles(event: Event, context: Context) -> str:
    """One effect."""
    await effect(event, context)
    return "handled"


@pytest.fixture
async def process(stores: Stores, database_url: str, redis_prefix: str) -> AsyncIterator[Process]:
    """Starts a process of the build whose statements have that schema."""
    worlds: list[World] = []

    async def start(schema: str) -> World:
        handlers: dict[str, Function] = {EFFECT_TYPE: handles}
        worlds.append(await build(database_url, stores.redis_url, redis_prefix, handlers, schema_name=schema))
        return worlds[-1]

    yield start
    for world in worlds:
        await world.close()


async def test_an_older_build_goes_on_while_its_ledger_is_moved(
    database_url: str, admin: asyncpg.Connection, process: Process
) -> None:
    """Under load nothing is refused, lost or doubled; afterwards both builds work on the same rows."""
    old = await process(OLD)
    given: list[Delivery] = []
    moved = asyncio.Event()
    said: list[str] = []

    async def deliver_until_moved() -> None:
        while not moved.is_set() or len(given) < 200:
            batch = [delivery() for _ in range(8)]
            given.extend(batch)
            results = await asyncio.gather(*(old.pipeline.deliver(each) for each in batch))
            assert {result.kind for result in results} <= {Kind.PROCESSED, Kind.DEFERRED}

    async def move() -> None:
        results = await asyncio.gather(*(migrate(database_url, SECONDS, say=said.append) for _ in range(3)))
        assert sorted(results) == [("0006", head()), *[(head(), head())] * 2]
        moved.set()

    await asyncio.gather(deliver_until_moved(), move())
    assert len([line for line in said if "moved from schema public to firstclaim" in line]) == 1
    assert any("DROP VIEW public.stripe_events, " in line for line in said)

    new = await process("firstclaim")
    while any([await world.pipeline.recover() for world in (old, new)]):
        pass
    for each in given:
        assert (await new.status(each.event.id), await new.effects(each.event.id)) == (Status.COMPLETED, 1)
    # Each refuses what the other has done, asked without Redis' markers.
    here, there = [await world.pipeline.deliver(delivery()) for world in (new, old)]
    assert {here.kind, there.kind} == {Kind.PROCESSED}
    await old.redis.delete(old.lock._key(given[0].event.id))
    for world in (old, new):
        assert (await world.pipeline.deliver(given[0])).kind is Kind.DUPLICATE
    assert await admin.fetchval("SELECT version_num FROM alembic_version") == "0006"


@pytest.mark.parametrize("schema", [OLD, "firstclaim"])
async def test_every_statement_works_on_a_moved_ledger(
    database_url: str, admin: asyncpg.Connection, process: Process, schema: str
) -> None:
    """Claim, record, take over, fail, abandon, give up, replay, prune: through the views as in the schema itself."""
    await migrate(database_url, SECONDS)
    world = await process(schema)
    ledger = world.ledger
    claim = await world.claim()
    assert await ledger.fail_if_held(claim, "boom", due_in_seconds=0) is Status.FAILED
    [again] = await ledger.take_over([claim.event_id])
    assert again.attempt == 2
    assert await ledger.abandon_if_held(again, "hung") is Status.PENDING
    [third] = await ledger.take_over([claim.event_id])
    assert await ledger.release_if_held(third) is Status.PENDING
    [fourth] = await ledger.take_over([claim.event_id])
    await world.change(claim.event_id, due_at=-1.0)
    assert [each.event_id for each in await ledger.return_abandoned(10)] == [claim.event_id]
    assert await ledger.kill_if_held(fourth, "no") is Status.DEAD  # taken back first
    assert await ledger.queues(abandoned=True) == []
    waiting = await world.state_of(delivery(), Status.PENDING)
    await world.change(waiting.event.id, due_at=-1.0, give_up_at=-2 * 86_400.0)
    [queue] = await ledger.queues(abandoned=False)
    assert [each.event_id for each in await ledger.due({queue: None}, 5, abandoned=False)] == [waiting.event.id]
    assert [each.event_id for each in await ledger.give_up([queue], 5)] == [waiting.event.id]
    async with Commands.connect(database_url, 10) as operations:
        operations._connection.schema = schema
        chosen = await operations.select_candidates(Selection())
        replayed = [ids async for ids in operations.replay(chosen, "", "me", give_up_seconds=60)]
        assert sum(map(len, replayed)) == 2
        await admin.execute(
            "UPDATE stripe_events SET status = 'dead', settled_at = now() - interval '500 days',"
            " received_at = now() - interval '500 days'"
        )
        pruned = [each async for each in prune(operations, "me", Retention(90, 400, include_dead=True))]
        assert pruned == [Pruned(rows=2)]
        assert await operations.backlog() is not None
    assert await admin.fetchval("SELECT count(*) FROM firstclaim.operator_actions") == 2


@pytest.mark.parametrize("revision", ["0001", "0003", "0004", "0006"])
async def test_the_revision_is_that_of_the_tables(database_url: str, admin: asyncpg.Connection, revision: str) -> None:
    """It is told from what each revision has left: `alembic_version` may say anything, or be yours."""
    if revision <= "0004":
        for name in ("received", "unsuccessful", "waiting", "waiting_abandoned", "processing", "give_up"):
            await admin.execute(f"DROP INDEX stripe_events_{name}")
    if revision <= "0003":
        await admin.execute("ALTER TABLE stripe_events DROP COLUMN claimed_at, DROP COLUMN claimed_by")
        await admin.execute("DROP TABLE stripe_event_attempts")
    if revision <= "0001":
        await admin.execute("DROP TABLE operator_actions")
    await admin.execute("UPDATE alembic_version SET version_num = 'c0ffee'")
    before = [tuple(row) for row in await admin.fetch("SELECT * FROM ledger_epoch")]
    assert await migrate(database_url, SECONDS) == (revision, head())
    assert await migrate(database_url, SECONDS) == (head(), head())
    assert [tuple(row) for row in await admin.fetch("SELECT * FROM firstclaim.ledger_epoch")] == before
    assert await admin.fetchval("SELECT version_num FROM alembic_version") == "c0ffee"
    assert await relations(admin, "firstclaim", "r") == sorted([*TABLES, *LATER, "ledger_revision"])


async def relations(admin: asyncpg.Connection, schema: str, kind: str) -> list[Any]:
    """The names of its tables or views."""
    query = "SELECT relname FROM pg_class WHERE relnamespace = $1::regnamespace AND relkind = $2 ORDER BY 1"
    return [row[0] for row in await admin.fetch(query.replace("$1", f"'{schema}'").replace("$2", f"'{kind}'"))]


async def test_rights_go_with_the_tables(database_url: str, admin: asyncpg.Connection) -> None:
    """A service's role that did not own its tables keeps its rights on them, and has them on the views."""
    role = f"{await admin.fetchval('SELECT current_database()')}_service"
    await admin.execute(f"CREATE ROLE {role}; GRANT {role} TO CURRENT_USER")  # who may be no superuser
    try:
        await admin.execute(f"GRANT SELECT, INSERT, UPDATE ON ALL TABLES IN SCHEMA public TO {role}")
        await migrate(database_url, SECONDS)
        await admin.execute(f"SET ROLE {role}")
        for place in ("firstclaim.", ""):
            assert await admin.fetch(f"SELECT FROM {place}stripe_events FOR UPDATE") == []
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await admin.execute(f"DELETE FROM {place}stripe_events")
    finally:
        await admin.execute(f"RESET ROLE; DROP OWNED BY {role}; DROP ROLE {role}")


async def test_another_owner_is_named(database_url: str, admin: asyncpg.Connection) -> None:
    """Only their owner can move the tables: a migration by another role changes nothing, and says whose they are."""
    name = await admin.fetchval("SELECT current_database()")
    owner, other = f"{name}_owner", f"{name}_other"
    try:
        await admin.execute(
            f"CREATE ROLE {owner}; CREATE ROLE {other} LOGIN; GRANT CREATE ON DATABASE {name} TO {other};"
            f"GRANT {owner}, {other} TO CURRENT_USER; GRANT CREATE ON SCHEMA public TO {owner}"
        )
        for table in TABLES:
            await admin.execute(f"ALTER TABLE {table} OWNER TO {owner}")
        with pytest.raises(StoreUnsuitable, match=rf"run `firstclaim migrate` as {owner}"):
            await migrate(f"{database_url}&role={other}", SECONDS)
        assert await relations(admin, "public", "v") == []
        assert await migrate(database_url, SECONDS) == ("0006", head())
        owners = "SELECT DISTINCT relowner::regrole::text FROM pg_class WHERE relname = 'stripe_events'"
        assert [row[0] for row in await admin.fetch(owners)] == [owner], "the view's owner is the table's"
    finally:
        await admin.execute(f"DROP OWNED BY {owner}, {other} CASCADE; DROP ROLE {owner}; DROP ROLE {other}")


async def test_a_table_of_yours_is_no_ledger(empty_url: str) -> None:
    """A table `stripe_events` of an application is neither moved nor changed."""
    connection = await asyncpg.connect(empty_url)
    try:
        await connection.execute("CREATE TABLE stripe_events (event_id text PRIMARY KEY, status text)")
        assert await migrate(empty_url, SECONDS) == (None, head())
        assert await relations(connection, "public", "r") == ["payment_failures", "stripe_events"]
        assert await relations(connection, "public", "v") == []
    finally:
        await connection.close()
