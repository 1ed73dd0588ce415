"""A failover, as the pools see it: the server is another one, or takes no more writes. `tests/chaos` has real ones."""

import asyncio
from datetime import UTC, datetime

import asyncpg
import pytest

from firstclaim.errors import LedgerUnavailable
from firstclaim.postgres import probe as probe_module
from firstclaim.postgres.connection import Backend
from firstclaim.postgres.pool import Pool
from firstclaim.status import Status
from tests.integration.test_places import pooled
from tests.integration.world import World, effect

TIMEOUT_SECONDS = 5.0
WRITE = "INSERT INTO effects (event_id, attempt, pid, xid) VALUES ('evt_1', 1, 1, '1')"
DEMOTE = "SET default_transaction_read_only = on"
BEFORE = datetime(2026, 1, 1, tzinfo=UTC)


async def pids(pool: Pool, count: int, statement: str = "SELECT 1") -> list[int]:
    """The backends of so many connections that are in use at once, each of which executes a statement."""
    gate = asyncio.Barrier(count)

    async def use() -> int:
        async with pool.acquire(TIMEOUT_SECONDS) as connection:
            await connection.execute(statement)
            await gate.wait()
            return connection.get_server_pid()

    return sorted(await asyncio.gather(*(use() for _ in range(count))))


def is_of_another_server(pool: Pool) -> None:
    """The free connections lead to a server that is not the one which the next connection is opened to."""
    for connection in pool._free:
        connection.server_started_at = BEFORE
    pool._places._probe.server_started_at = BEFORE


async def test_connections_to_the_old_server_are_given_up(database_url: str) -> None:
    """Once a connection to another server is open, none of those to the old one is used: each may be silent."""
    async with pooled(database_url, size=3) as pool:
        old = await pids(pool, 2)
        assert await pids(pool, 2) == old
        is_of_another_server(pool)
        seen = await pids(pool, 3)  # two old ones, and a new one
        assert set(old) < set(seen)
        [new] = set(seen) - set(old)
        assert not set(await pids(pool, 3)) & set(old)
        assert new in await pids(pool, 3)


async def test_a_server_that_has_become_read_only_is_left(database_url: str) -> None:
    """The first write that it refuses gives up all connections to it: the next work is on new ones."""
    async with pooled(database_url, size=2) as pool:
        old = await pids(pool, 2, DEMOTE)
        is_of_another_server(pool)
        with pytest.raises(LedgerUnavailable, match="ReadOnlySQLTransactionError"):
            await pids(pool, 1, WRITE)
        assert not set(await pids(pool, 2, WRITE)) & set(old)


async def test_a_read_only_server_does_not_charge_the_event(world: World) -> None:
    """Its server was demoted before the handler's transaction began: nobody is blamed, and the next attempt works."""
    async with world.seat() as seat:
        await seat.driver.execute(DEMOTE)
        old = seat.driver.get_server_pid()
    claim = await world.claim()
    with pytest.raises(LedgerUnavailable, match="ReadOnlySQLTransactionError"):
        await world.dispatch(effect, claim)
    row = await world.row(claim.event_id)
    assert (row["status"], row["failures"], row["abandoned"]) == (Status.PENDING, 0, 0)
    [again] = await world.ledger.take_over([claim.event_id])
    assert (await world.dispatch(effect, again)).kind == "processed"
    async with world.seat() as seat:
        assert seat.driver.get_server_pid() != old


async def test_the_fate_of_a_transaction_is_not_asked_of_another_server(world: World) -> None:
    """A promoted standby gives transactions the ids that the old primary's had: a commit of those says nothing."""
    claim = await world.claim()
    async with world.seat() as seat:
        transaction = await world.ledger.hold(seat, claim)
        assert transaction is not None
        await seat.driver.execute("COMMIT")
    assert await world.ledger.committed(transaction)
    old = type(transaction)(transaction.xid, transaction.pid, BEFORE, transaction.began_at)
    assert not await world.ledger.committed(old)


async def test_the_pid_of_another_session_is_not_ours(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a connection that was lost at once, the pid alone is known: on a new server that may be anybody's session."""
    monkeypatch.setattr(probe_module, "_IDLE_SECONDS", -1)
    other = await asyncpg.connect(database_url)
    async with pooled(database_url) as pool:
        gone = asyncio.Event()
        pool._places._probe.leave(Backend(other.get_server_pid(), None), gone.set)
        async with asyncio.timeout(TIMEOUT_SECONDS):
            await gone.wait()
    assert await other.fetchval("SELECT 1") == 1
    await other.close()
