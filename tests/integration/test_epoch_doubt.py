"""Which connections put the ledger's epoch in doubt when they end: those that were lost, not those that we end."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import asyncpg
import pytest
from sqlalchemy import text

from firstclaim import Context, Event
from firstclaim.errors import LedgerUnavailable
from firstclaim.inbox.claim import Claim
from firstclaim.outcome import Kind, Outcome
from firstclaim.postgres.connection import PinnedConnection
from firstclaim.postgres.epoch import Epoch
from firstclaim.postgres.handler_connections import HandlerConnection
from firstclaim.postgres.places import Places
from firstclaim.postgres.pool import Pool
from firstclaim.postgres.probe import Probe
from tests.integration.conftest import MakeWorld
from tests.integration.world import Function, World, effect, until

SECONDS = 20.0


@pytest.fixture
async def hasty(make_world: MakeWorld) -> World:
    """A deadline that a test can wait for."""
    return await make_world(handler_deadline_seconds=0.3)


async def keeps_its_epoch(world: World, function: Function, kind: Kind) -> None:
    """Dispatch a claim to `function`: its connection has ended, and markers count as before."""
    claim = await world.marked()
    confirmed = world.claims._epoch.current
    assert confirmed is not None
    assert (await world.dispatch(function, claim)).kind is kind
    await listeners_have_run()
    assert world.claims._epoch.current == confirmed
    assert not world.components.handler_connections._free


async def listeners_have_run() -> None:
    """The driver calls them in the loop's next round."""
    for _ in range(3):
        await asyncio.sleep(0)


# -- a handler's connection ---------------------------------------------------------------------------


async def idles(event: Event, context: Context) -> None:
    await effect(event, context)
    await asyncio.Event().wait()


async def runs_a_statement(event: Event, context: Context) -> None:
    await effect(event, context)
    await context.connection.execute(text("SELECT pg_sleep(60)"))


async def fetches(event: Event, context: Context) -> None:
    await effect(event, context)
    await context.fetch("SELECT pg_sleep(60)")


def waits_in_a_thread(_event: Event, context: Context) -> None:
    context.execute(text("SELECT pg_sleep(60)"))


@pytest.mark.parametrize("function", [idles, runs_a_statement, fetches, waits_in_a_thread])
async def test_a_deadline_puts_no_epoch_in_doubt(hasty: World, function: Function) -> None:
    """A slow dependency of the handlers must not send the duplicates of all other events to Postgres."""
    await keeps_its_epoch(hasty, function, Kind.FAILED)


async def test_a_statement_left_running_puts_no_epoch_in_doubt(world: World) -> None:
    """A handler failed while a statement of its own still ran: the connection is ended, and the server is well."""
    tasks: list[asyncio.Task[object]] = []

    async def function(event: Event, context: Context) -> None:
        await effect(event, context)
        tasks.append(asyncio.create_task(context.fetch("SELECT pg_sleep(60)")))
        await until(lambda: world.database.fetchval(sleeping))
        raise RuntimeError

    sleeping = "SELECT count(*) > 0 FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'PgSleep'"
    await keeps_its_epoch(world, function, Kind.FAILED)
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_an_own_end_puts_no_epoch_in_doubt(world: World) -> None:
    """The connection of a handler that has ended its transaction is not used again."""

    async def function(event: Event, context: Context) -> None:
        await effect(event, context)
        await context.connection.execute(text("COMMIT"))

    await keeps_its_epoch(world, function, Kind.FAILED)


async def test_a_drain_puts_no_epoch_in_doubt(world: World) -> None:
    """Its running handlers' connections are ended while the process still answers duplicates."""
    claim = await world.marked()
    confirmed = world.claims._epoch.current
    started = asyncio.Event()

    async def function(event: Event, context: Context) -> None:
        started.set()
        await idles(event, context)

    dispatching = asyncio.create_task(world.dispatch(function, claim))
    await started.wait()
    dispatching.cancel()
    await asyncio.wait({dispatching})
    await listeners_have_run()
    assert world.claims._epoch.current == confirmed is not None


async def test_a_silent_server_puts_the_epoch_in_doubt(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rollback that is not answered: the server may be gone, and another may answer next."""

    async def silent(_connection: HandlerConnection, _timeout_seconds: float | None = None) -> None:
        raise TimeoutError

    async def function(_event: Event, _context: Context) -> None:
        raise RuntimeError

    claim = await world.marked()
    assert world.claims._epoch.current is not None
    with monkeypatch.context() as patch:
        patch.setattr(HandlerConnection, "roll_back", silent)
        await world.dispatch(function, claim)
    await in_doubt(world.claims._epoch)


async def test_a_commit_that_is_not_answered_puts_the_epoch_in_doubt(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its result is unknown, and the markers are too, until the epoch is read on a new connection."""
    seen: list[str | None] = []

    async def silent(*_: object, **__: object) -> None:
        raise TimeoutError

    async def settle(claim: Claim, handler: object, result: object) -> Outcome:
        await listeners_have_run()
        seen.append(world.claims._epoch.current)
        return await settle_unknown(claim, handler, result)

    settle_unknown: Callable[..., Awaitable[Outcome]] = world.dispatcher._settle_unknown
    monkeypatch.setattr(world.dispatcher, "_settle_unknown", settle)
    monkeypatch.setattr(HandlerConnection, "commit", silent)
    await world.dispatch(effect, await world.marked())
    assert seen == [None]


async def in_doubt(epoch: Epoch) -> None:
    """Wait until no marker counts."""

    async def seen() -> bool:
        return epoch.current is None

    await until(seen)


# -- a connection of a pool ---------------------------------------------------------------------------


@pytest.fixture
async def epoch() -> Epoch:
    """An epoch that is confirmed for long."""
    return Epoch(fresh_seconds=600)


@pytest.fixture
async def pool(module_database: str, epoch: Epoch) -> AsyncIterator[Pool]:
    """A pool as the service has it."""
    probe = Probe(module_database, timeout_seconds=SECONDS)
    pool = Pool(Places(module_database, probe, size=2, timeout_seconds=SECONDS, epoch=epoch))
    yield pool
    await pool.close()
    await probe.close()


async def test_a_statement_that_times_out_puts_the_epoch_in_doubt(pool: Pool, epoch: Epoch) -> None:
    """The server may have stopped answering for good."""

    async def work() -> None:
        async with pool.acquire(0.1) as connection:
            assert epoch.current is not None
            await connection.execute("SELECT pg_sleep(60)")

    with pytest.raises(LedgerUnavailable):
        await work()
    await in_doubt(epoch)


async def test_a_statement_that_we_cancel_puts_no_epoch_in_doubt(pool: Pool, epoch: Epoch) -> None:
    """A shutdown cancels what still waits for the ledger."""
    started = asyncio.Event()

    async def work() -> None:
        async with pool.acquire(SECONDS) as connection:
            started.set()
            await connection.execute("SELECT pg_sleep(60)")

    working = asyncio.create_task(work())
    await started.wait()
    working.cancel()
    await asyncio.wait({working})
    await listeners_have_run()
    assert epoch.current is not None


async def test_a_renewed_connection_puts_no_epoch_in_doubt(
    pool: Pool, epoch: Epoch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a rotation the connections of the old epoch are closed: markers of the new one count all the while."""
    seen: list[str | None] = []

    async def refused() -> PinnedConnection:
        await listeners_have_run()
        seen.append(epoch.current)
        raise OSError

    async with pool.acquire(SECONDS):
        pass
    epoch.confirm("renewed")
    monkeypatch.setattr(pool._places, "open", refused)
    with pytest.raises(LedgerUnavailable):
        await pool.acquire(SECONDS).__aenter__()
    assert seen == ["renewed"]


async def test_a_connection_that_the_server_ended_puts_the_epoch_in_doubt(
    pool: Pool, epoch: Epoch, module_database: str
) -> None:
    """However it was used before."""
    async with pool.acquire(SECONDS) as connection:
        pid = connection.get_server_pid()
    other = await asyncpg.connect(module_database)
    await other.execute("SELECT pg_terminate_backend($1)", pid)
    await other.close()
    await in_doubt(epoch)
