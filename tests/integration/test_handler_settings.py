"""What a handler sets on its connection (search_path, role, durability), and the completion mark that follows it."""

import secrets
from collections.abc import AsyncIterator

import pytest
from sqlalchemy import text

from firstclaim import Context, Event
from firstclaim.outcome import Kind
from firstclaim.status import Status
from tests.integration.test_dispatch import fails, still_works
from tests.integration.world import World, effect

# A schema of the handler's with a ledger of the same names, and what each is there to do to our statements.
ELSEWHERE = """
CREATE SCHEMA elsewhere;
CREATE TABLE elsewhere.stripe_events (LIKE firstclaim.stripe_events);
CREATE TABLE elsewhere.effects (LIKE effects);
"""


@pytest.fixture
async def elsewhere(world: World) -> AsyncIterator[None]:
    """The schema `elsewhere`."""
    await world.database.execute(ELSEWHERE)
    yield
    await world.database.execute("DROP SCHEMA elsewhere CASCADE")


@pytest.fixture
async def role(world: World) -> AsyncIterator[str]:
    """A role that may write effects and has no right on the ledger."""
    name = f"test_{secrets.token_hex(6)}"
    await world.database.execute(f"CREATE ROLE {name}; GRANT {name} TO CURRENT_USER; GRANT INSERT ON effects TO {name}")
    yield name
    await world.database.execute(f"DROP OWNED BY {name}; DROP ROLE {name}")


async def completes(world: World, *settings: str, through_sqlalchemy: bool = False) -> None:
    """A handler with an effect and these statements is completed, and so is the next one on its connection."""

    async def function(event: Event, context: Context) -> None:
        await effect(event, context)
        for each in settings:
            if through_sqlalchemy:
                await context.connection.execute(text(each))
            else:
                await context.fetch(each)

    claim = await world.marked()
    assert (await world.dispatch(function, claim)).kind is Kind.PROCESSED
    row = await world.row(claim.event_id)
    assert (row["status"], row["attempt"], row["failures"]) == (Status.COMPLETED, 1, 0), row["last_error"]
    assert await world.effects(claim.event_id) == 1


@pytest.mark.parametrize("path", ["elsewhere", "elsewhere, public", "pg_catalog", "''"])
@pytest.mark.usefixtures("elsewhere")
async def test_any_search_path_leads_to_the_ledger(world: World, path: str) -> None:
    """The mark is written to the ledger, whatever tables the handler's search_path leads to."""
    await completes(world, f"SET LOCAL search_path = {path}")
    await still_works(world)
    assert await world.database.fetchval("SELECT count(*) FROM elsewhere.stripe_events") == 0


@pytest.mark.usefixtures("elsewhere")
async def test_a_search_path_that_stays_leads_to_the_ledger(world: World) -> None:
    """Without LOCAL it stays on the connection: the next handler is held and marked all the same."""
    await completes(world, "SET search_path = elsewhere")
    claim = await world.marked()

    async def nothing(_event: Event, context: Context) -> None:
        assert [row[0] for row in await context.fetch("SHOW search_path")] == ["elsewhere"], "the same connection"

    assert (await world.dispatch(nothing, claim)).kind is Kind.PROCESSED
    assert await world.status(claim.event_id) is Status.COMPLETED


@pytest.mark.parametrize("through_sqlalchemy", [False, True], ids=["fetch", "sqlalchemy"])
@pytest.mark.parametrize("setting", ["SET LOCAL ROLE {}", "SET ROLE {}", "SELECT set_config('role', '{}', true)"])
async def test_another_role_is_reset_before_the_mark(
    world: World, role: str, setting: str, through_sqlalchemy: bool
) -> None:
    """A handler may leave its transaction in a role without a right on the ledger."""
    await completes(world, setting.format(role), through_sqlalchemy=through_sqlalchemy)
    await still_works(world)


@pytest.mark.usefixtures("superuser")
@pytest.mark.parametrize("through_sqlalchemy", [False, True], ids=["fetch", "sqlalchemy"])
async def test_another_user_of_the_session_is_reset_before_the_mark(
    world: World, role: str, through_sqlalchemy: bool
) -> None:
    """The same by SET SESSION AUTHORIZATION, which only a superuser may."""
    await completes(world, f"SET SESSION AUTHORIZATION {role}", through_sqlalchemy=through_sqlalchemy)
    await still_works(world)


async def test_a_role_that_a_function_sets_is_named(world: World, role: str) -> None:
    """What is not seen in the handler's SQL fails with the cause and the cure, charges one failure, and stays alone."""
    await world.database.execute(
        f"CREATE FUNCTION log_in() RETURNS text LANGUAGE sql AS $$ SELECT set_config('role', '{role}', true) $$"
    )

    async def function(event: Event, context: Context) -> None:
        await effect(event, context)
        await context.fetch("SELECT log_in()")

    try:
        await fails(world, function, "HandlerRuleBroken: the handler has left its transaction in another role")
    finally:
        await world.database.execute("DROP FUNCTION log_in()")


async def test_a_read_only_transaction_is_named(world: World) -> None:
    """The completion mark cannot be written in it: failed, with the reason."""

    async def function(event: Event, context: Context) -> None:
        await effect(event, context)
        await context.fetch("SET TRANSACTION READ ONLY")

    await fails(world, function, "HandlerRuleBroken: the handler has made its transaction read-only")


async def test_a_handler_cannot_weaken_its_commit(world: World) -> None:
    """Its COMMIT waits for the disk, also when it has switched that off: the 2xx is no less durable for it.

    The warning that its wait for a standby was cancelled is sent, also when it has switched warnings off.
    """
    await world.database.execute("""
        CREATE TABLE committed (event_id text, how text, messages text);
        CREATE FUNCTION note_commit() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            INSERT INTO committed VALUES
                (NEW.event_id, current_setting('synchronous_commit'), current_setting('client_min_messages'));
            RETURN NULL; END $$;
        CREATE CONSTRAINT TRIGGER note AFTER INSERT ON effects DEFERRABLE INITIALLY DEFERRED
            FOR EACH ROW EXECUTE FUNCTION note_commit()
    """)
    try:
        await completes(world, "SET LOCAL synchronous_commit = off")
        await completes(world, "SET client_min_messages = error")
        rows = await world.database.fetch("SELECT how, messages FROM committed")
        assert {tuple(row) for row in rows} == {("on", "warning")}
    finally:
        await world.database.execute("DROP TRIGGER note ON effects; DROP FUNCTION note_commit(); DROP TABLE committed")
