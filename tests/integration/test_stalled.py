"""A Postgres that stalls meets bounded demand: what waits on the server ends there; what is unknown is not guessed."""

import asyncio

import asyncpg
import pytest

from firstclaim.errors import LedgerUnavailable
from firstclaim.inbox.claim import Claim
from tests.integration.conftest import MakeWorld
from tests.integration.world import NOTHING, World, build, delivery
from tests.stores import Stores

TIMEOUT_SECONDS = 0.5
ATTEMPTS = 6
BACKENDS = """
SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'firstclaim'
"""


async def test_a_locked_table_leaves_no_backend_behind(make_world: MakeWorld) -> None:
    """ACCESS EXCLUSIVE on the ledger: each claim fails on the connection that it had, and the next one uses it too."""
    world = await make_world(postgres_timeout_seconds=TIMEOUT_SECONDS)
    await world.claim()
    before = await world.database.fetchval(BACKENDS)
    async with world.database.transaction():
        await world.database.execute("LOCK TABLE firstclaim.stripe_events IN ACCESS EXCLUSIVE MODE")
        for _ in range(ATTEMPTS):
            with pytest.raises(LedgerUnavailable, match="QueryCanceled"):
                await world.ledger.claim(delivery())
        assert await world.database.fetchval(BACKENDS) == before
    assert isinstance(await world.ledger.claim(delivery()), Claim)


async def test_a_locked_table_does_not_keep_a_handlers_backend(make_world: MakeWorld) -> None:
    """The first statement of its transaction waits for the table: the server ends it, before the client does."""
    world = await make_world(postgres_timeout_seconds=TIMEOUT_SECONDS)
    claim = await world.claim()
    async with world.database.transaction():
        await world.database.execute("LOCK TABLE firstclaim.stripe_events IN ACCESS EXCLUSIVE MODE")
        async with world.seat() as seat:
            with pytest.raises(asyncpg.QueryCanceledError):
                async with asyncio.timeout(TIMEOUT_SECONDS * 10):
                    await world.ledger.hold(seat, claim)
            await seat.discard()


async def test_a_transaction_in_progress_is_waited_for(make_world: MakeWorld) -> None:
    """It is unknown whether a transaction was committed until it ends: neither yes nor no."""
    world = await make_world(postgres_timeout_seconds=TIMEOUT_SECONDS)
    claim = await world.claim()
    async with world.seat() as seat:
        transaction = await world.ledger.hold(seat, claim)
        assert transaction is not None
        with pytest.raises(LedgerUnavailable, match="has not ended"):
            await world.ledger.committed(transaction)
        waiting = asyncio.create_task(world.ledger.committed(transaction))
        await asyncio.sleep(0)
        await seat.commit(NOTHING)
        assert await waiting


async def test_a_backend_that_waits_for_the_standby_is_not_ended(
    database_url: str, stores: Stores, redis_prefix: str
) -> None:
    """Its transaction is committed: ended, it would be visible without being replicated."""
    connection = await asyncpg.connect(database_url)
    await connection.execute(
        """
        CREATE VIEW public.pg_stat_activity AS
            SELECT pid, backend_start, state, backend_xid, application_name, 'SyncRep'::text AS wait_event
              FROM pg_catalog.pg_stat_activity;
        DO $$ BEGIN
            EXECUTE format('ALTER DATABASE %I SET search_path = public, pg_catalog', current_database());
        END $$;
        """
    )
    await connection.close()
    world: World = await build(database_url, stores.redis_url, redis_prefix)
    claim = await world.claim()
    async with world.seat() as seat:
        transaction = await world.ledger.hold(seat, claim)
        assert transaction is not None
        await world.ledger.end(transaction)
        assert await world.ledger.complete_if_held(seat, claim, transaction, "done")
    await world.close()
