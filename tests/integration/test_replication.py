"""What is answered rests on rows that are replicated: a read waits for the synchronous standby as a COMMIT does.

The function that makes a read wait is replaced by one of ours, first in the search_path, which counts its calls. A
COMMIT whose wait was cancelled succeeds with a warning; triggers raise one of the same SQLSTATE.
"""

from collections.abc import AsyncIterator

import asyncpg
import pytest

from firstclaim.errors import LedgerUnavailable
from firstclaim.event import Delivery
from firstclaim.inbox import statements
from firstclaim.inbox.claim import Claim
from firstclaim.inbox.existing_row import ExistingRow
from firstclaim.outcome import Kind
from firstclaim.status import Status
from tests.integration.conftest import MakeWorld
from tests.integration.world import World, build, delivery, effect
from tests.stores import Stores

SPY = """
CREATE TABLE waits (warned bool);
CREATE TABLE cancelled (yes bool);
CREATE FUNCTION pg_logical_emit_message(transactional bool, prefix text, content text) RETURNS pg_lsn
LANGUAGE plpgsql AS $$ BEGIN
    IF transactional THEN
        INSERT INTO waits VALUES (EXISTS (SELECT FROM cancelled));
    END IF;
    IF EXISTS (SELECT FROM cancelled) THEN
        RAISE WARNING 'canceling wait for synchronous replication due to user request';
    END IF;
    RETURN '0/0';
END $$;
CREATE FUNCTION warn() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    RAISE WARNING 'canceling wait for synchronous replication due to user request';
    RETURN NULL;
END $$;
DO $$ BEGIN
    EXECUTE format('ALTER DATABASE %I SET search_path = public, pg_catalog', current_database());
END $$;
"""
# Deferred: raised at COMMIT, where the server raises its own.
WARN = """
CREATE CONSTRAINT TRIGGER warn AFTER INSERT OR UPDATE ON firstclaim.stripe_events DEFERRABLE INITIALLY DEFERRED
   FOR EACH ROW EXECUTE FUNCTION warn()
"""
CANCEL_READS = "INSERT INTO cancelled VALUES (true)"


@pytest.fixture
async def spied(database_url: str, stores: Stores, redis_prefix: str) -> AsyncIterator[World]:
    """A process on a database of its own, whose reads that wait are counted."""
    connection = await asyncpg.connect(database_url)
    await connection.execute(SPY)
    await connection.close()
    world = await build(database_url, stores.redis_url, redis_prefix)
    yield world
    await world.close()


async def waits(world: World) -> int:
    """How many reads have waited."""
    count: int = await world.database.fetchval("SELECT count(*) FROM waits")
    return count


async def test_a_read_waits_for_the_standby(spied: World) -> None:
    """Each answer that rests on a row which was there has waited; the COMMIT of a new row waits itself."""
    given = delivery()
    assert isinstance(await spied.ledger.claim(given), Claim)
    assert await waits(spied) == 0
    assert isinstance(await spied.ledger.claim(given), ExistingRow)
    assert await waits(spied) == 1
    assert isinstance(await spied.ledger.record(given, due_in_seconds=0), ExistingRow)
    assert await waits(spied) == 2
    assert isinstance(await spied.ledger.ignore(given), ExistingRow)
    assert await waits(spied) == 3
    assert isinstance(await spied.ledger.find(given.event.id), ExistingRow)
    assert await waits(spied) == 4


async def test_a_read_commits_on_the_real_server(make_world: MakeWorld) -> None:
    """With the server's own function the read is a transaction with an id, so its COMMIT is written to the log."""
    world = await make_world()
    given = delivery()
    await world.ledger.claim(given)
    async with world.components.ingest.acquire(10) as connection, connection.transaction():
        assert await statements.FIND.fetch(connection, event_ids=[given.event.id])
        assert await connection.fetchval("SELECT pg_current_xact_id_if_assigned()") is not None


@pytest.mark.parametrize("way", ["claim", "record", "ignore"])
async def test_an_insert_whose_wait_was_cancelled_is_followed_by_a_read(spied: World, way: str) -> None:
    """The insert is committed, perhaps not replicated: the read waits in its place, and the answer is the same."""
    await spied.database.execute(WARN)
    inserted = await insert(spied, way, delivery())
    assert not isinstance(inserted, ExistingRow)
    assert await waits(spied) == 1


@pytest.mark.parametrize("way", ["claim", "record", "ignore"])
async def test_nothing_is_promised_of_an_insert_that_may_not_be_replicated(spied: World, way: str) -> None:
    """The read's wait is cancelled too: nothing is known, so nothing is promised."""
    await spied.database.execute(WARN)
    await spied.database.execute(CANCEL_READS)
    with pytest.raises(LedgerUnavailable, match="the wait for the synchronous standby was cancelled"):
        await insert(spied, way, delivery())


async def insert(world: World, way: str, given: Delivery) -> object:
    if way == "claim":
        return await world.ledger.claim(given)
    if way == "ignore":
        return await world.ledger.ignore(given)
    return await world.ledger.record(given, due_in_seconds=0)


async def test_a_duplicate_whose_read_was_cancelled_gets_no_promise(spied: World) -> None:
    """The row is visible, perhaps not replicated: the delivery is refused, and no marker is written."""
    given = delivery()
    await spied.claim(given)
    await spied.database.execute(CANCEL_READS)
    with pytest.raises(LedgerUnavailable):
        await spied.claims.claim(given, await spied.claims.lock(given.event.id), unwanted=None)
    assert await spied.value(given.event.id) is None


async def test_a_take_over_whose_wait_was_cancelled_is_followed_by_a_read(spied: World) -> None:
    """A delivery takes a recorded row over: claimed once the read has waited, and not at all if that is cancelled."""
    given, other = delivery(), delivery()
    await spied.ledger.record(given, due_in_seconds=60)
    await spied.ledger.record(other, due_in_seconds=60)
    await spied.database.execute(WARN)
    [claim] = await spied.ledger.take_over([given.event.id])
    assert (claim.event_id, claim.attempt) == (given.event.id, 1)
    assert await waits(spied) == 1
    await spied.database.execute(CANCEL_READS)
    with pytest.raises(LedgerUnavailable):
        await spied.ledger.take_over([other.event.id])


async def test_a_completion_whose_wait_was_cancelled_is_read_again(spied: World) -> None:
    """The handler's COMMIT succeeded with the warning: processed once the read has waited, else nothing is promised."""
    first, second = await spied.claim(), await spied.claim()
    await spied.database.execute(WARN)
    done = await spied.dispatch(effect, first)
    assert (done.kind, await spied.status(first.event_id)) == (Kind.PROCESSED, Status.COMPLETED)
    assert await waits(spied) == 1
    await spied.database.execute(CANCEL_READS)
    with pytest.raises(LedgerUnavailable):
        await spied.dispatch(effect, second)
    assert await spied.status(second.event_id) is Status.COMPLETED


async def test_a_handlers_transaction_keeps_the_stronger_setting(spied: World) -> None:
    """`remote_apply` holds for the next attempt too, although a handler has changed the session's setting."""
    name = await spied.database.fetchval("SELECT quote_ident(current_database())")
    await spied.database.execute(f"ALTER DATABASE {name} SET synchronous_commit = remote_apply")
    claim = await spied.claim()
    async with spied.seat() as seat:
        await seat.driver.execute("SET synchronous_commit = off")
        assert await spied.ledger.hold(seat, claim) is not None
        assert await seat.driver.fetchval("SHOW synchronous_commit") == "remote_apply"
        await seat.roll_back()
