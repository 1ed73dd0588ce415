"""Rows 49 and 50: a pair of Postgres servers by one address. The primary dies or freezes, the standby is promoted."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import pytest

from tests.acceptance.command import Command
from tests.acceptance.harness import PROCESSED, PYTHON_PATH, Sample, Sandbox, sample
from tests.chaos.actions import retried
from tests.chaos.failovers import BACK_BESIDE_A_FROZEN_HOST_SECONDS, FAILOVERS, Failovers, now
from tests.chaos.history import History
from tests.chaos.pair import SHIPPED, FailoverLoad, Pair
from tests.chaos.servers import Servers
from tests.proxy import Mode, before_postgres
from tests.stripe_api import KEY, StripeApi

pytestmark = [pytest.mark.failover, pytest.mark.timeout(150 * FAILOVERS)]

EVENTS = 20  # processed before and after each failover, at least


@pytest.fixture
async def pair(servers: Servers) -> Pair:
    """Both servers run, and neither knows of the other."""
    return Pair(*await asyncio.gather(servers.postgres_on_port(), servers.postgres_on_port()))


@pytest.fixture
async def history(servers: Servers, pair: Pair, tmp_path: Path) -> AsyncIterator[History]:
    """A history on the pair."""
    history = History(Sandbox(pair.primary.url, (await servers.redis()).url, "chaos:", tmp_path))
    try:
        yield history
    finally:
        await history.sandbox.end_services()


async def started(failovers: Failovers, pair: Pair) -> FailoverLoad:
    """The load of two services by the address of both servers, which have processed an event."""
    history = failovers.history
    services = [history.service(SHIPPED | {"DATABASE_URL": pair.url}) for _ in range(2)]
    await asyncio.gather(*(service.start() for service in services))
    assert (await retried(history, services[0], sample())).result == PROCESSED
    return FailoverLoad(failovers, services)


async def test_row_49_a_synchronous_pair(pair: Pair, history: History, failovers: Failovers) -> None:
    """The primary is killed, the standby promoted: processed within a second, nothing acknowledged lost or doubled."""
    await pair.replicate(synchronous=True)
    load = await started(failovers, pair)
    async with load.running():
        for left in reversed(range(FAILOVERS)):
            await load.processed(EVENTS)
            began = now()
            await pair.primary.kill()
            await load.back("pair, synchronous", began, await pair.promote())
            await load.processed(EVENTS)
            if left:
                await pair.replicate(synchronous=True)
    history.sandbox.database_url = pair.primary.url
    await failovers.verdict()


async def test_row_49_an_asynchronous_pair(pair: Pair, history: History, failovers: Failovers, tmp_path: Path) -> None:
    """The standby lags when the primary is killed: what is lost of the acknowledged events, reconcile finds."""
    await pair.standby.stop()
    load = await started(failovers, pair)
    async with load.running():
        for _ in range(FAILOVERS):
            async with before_postgres(pair.primary.url) as (link, _):
                await pair.replicate(synchronous=False, port=link.port)
                await load.processed(EVENTS)
                link.switch(Mode.FROZEN)
                await load.processed(EVENTS)
                began = now()
                await pair.primary.kill()
                link.switch(Mode.REFUSE)
                kept = await completed(pair)
                missing = load.acknowledged - kept
                assert missing, "the fault had no effect: every acknowledged event was replicated"
                history.restored(event for event in load.load.events if event.id not in kept)
                await load.back("pair, asynchronous", began, await pair.promote(), missing=missing)
                await reconcile(load.load.events, pair, tmp_path)
                await load.processed(EVENTS)
    history.sandbox.database_url = pair.primary.url
    await failovers.verdict()


async def test_row_50_the_first_host_frozen(pair: Pair, history: History, failovers: Failovers) -> None:
    """The first host is frozen, the second promoted: processed within 3 s, nothing acknowledged lost or doubled."""
    await pair.replicate(synchronous=True)
    load = await started(failovers, pair)
    async with load.running():
        for left in reversed(range(FAILOVERS)):
            await load.processed(EVENTS)
            began = now()
            frozen = pair.primary
            frozen.pause()
            await load.back("pair, frozen", began, await pair.promote(), BACK_BESIDE_A_FROZEN_HOST_SECONDS)
            await load.processed(EVENTS)
            if left:
                await frozen.kill()
                await pair.replicate(synchronous=True)
    history.sandbox.database_url = pair.primary.url
    await failovers.verdict()


async def completed(pair: Pair) -> set[str]:
    """The ids of the events that are completed on the standby."""
    found = await pair.standby.execute("SELECT event_id FROM firstclaim.stripe_events WHERE status = 'completed'")
    return {row["event_id"] for row in found}


async def reconcile(events: Iterable[Sample], pair: Pair, folder: Path) -> None:
    """`firstclaim reconcile` with all events of Stripe, by the address of both servers, one of which is down."""
    working = folder / "operator"
    working.mkdir(exist_ok=True)
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": PYTHON_PATH, "DATABASE_URL": pair.url}
    async with StripeApi().listening() as api:
        for event in events:
            api.add(event.body, int(time.time()), event.id)
        run = await Command(working, environment | {"STRIPE_API_KEY": KEY, "STRIPE_API_BASE": api.base})(
            "reconcile", "--since", "1d"
        )
    assert run.code == 0, run.output
