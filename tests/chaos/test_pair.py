"""Rows 49 and 50: a pair of Postgres servers by one address. The primary dies or freezes, the standby is promoted."""

import asyncio
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.acceptance.command import Command
from tests.acceptance.harness import PROCESSED, PYTHON_PATH, Sandbox, Service, sample
from tests.chaos.actions import retried
from tests.chaos.history import History
from tests.chaos.pair import (
    BACK_BESIDE_A_FROZEN_HOST_SECONDS,
    BACK_SECONDS,
    FAILOVERS,
    SHIPPED,
    FailoverLoad,
    Pair,
)
from tests.chaos.servers import Servers
from tests.chaos.verdict import verdict
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


async def started(history: History, pair: Pair) -> list[Service]:
    """Two services by the address of both servers, which have processed an event."""
    services = [history.service(SHIPPED | {"DATABASE_URL": pair.url}) for _ in range(2)]
    await asyncio.gather(*(service.start() for service in services))
    assert (await retried(history, services[0], sample())).result == PROCESSED
    return services


async def test_row_49_a_synchronous_pair(pair: Pair, history: History) -> None:
    """The primary is killed, the standby promoted: processed within a second, nothing acknowledged lost or doubled."""
    await pair.replicate(synchronous=True)
    load = FailoverLoad(history, await started(history, pair))
    async with load.running():
        for left in reversed(range(FAILOVERS)):
            await load.processed(EVENTS)
            await pair.primary.kill()
            assert await load.back_after(await pair.promote()) < BACK_SECONDS
            await load.processed(EVENTS)
            if left:
                await pair.replicate(synchronous=True)
    history.sandbox.database_url = pair.primary.url
    evidence = await verdict(history)
    assert load.acknowledged <= evidence.rows.keys()


async def test_row_49_an_asynchronous_pair(pair: Pair, history: History, tmp_path: Path) -> None:
    """The standby lags when the primary is killed: what is lost of the acknowledged events, reconcile finds."""
    lost: set[str] = set()
    async with before_postgres(pair.primary.url) as (link, _):
        await pair.replicate(synchronous=False, port=link.port)
        load = FailoverLoad(history, await started(history, pair))
        async with load.running():
            await load.processed(EVENTS)
            link.switch(Mode.FROZEN)
            await load.processed(EVENTS)
            await pair.primary.kill()
            link.switch(Mode.REFUSE)
            completed = "SELECT event_id FROM firstclaim.stripe_events WHERE status = 'completed'"
            kept = {row["event_id"] for row in await pair.standby.execute(completed)}
            lost = load.acknowledged - kept
            assert lost, "the fault had no effect: every acknowledged event was replicated"
            history.restored(event for event in load.load.events if event.id not in kept)
            assert await load.back_after(await pair.promote()) < BACK_SECONDS
            await load.processed(EVENTS)
    print(f"{len(lost)} acknowledged events were lost")
    history.sandbox.database_url = pair.primary.url
    async with StripeApi().listening() as api:
        for event in load.load.events:
            api.add(event.body, int(time.time()), event.id)
        await reconcile(api, pair, tmp_path)
    evidence = await verdict(history)
    assert load.acknowledged <= evidence.rows.keys()
    assert lost <= {effect.event_id for effect in evidence.effects}


async def test_row_50_the_first_host_frozen(pair: Pair, history: History) -> None:
    """The first host is frozen, the second promoted: processed within 3 s, nothing acknowledged lost or doubled."""
    await pair.replicate(synchronous=True)
    load = FailoverLoad(history, await started(history, pair))
    async with load.running():
        await load.processed(EVENTS)
        pair.primary.pause()
        assert await load.back_after(await pair.promote()) < BACK_BESIDE_A_FROZEN_HOST_SECONDS
        await load.processed(EVENTS)
    history.sandbox.database_url = pair.primary.url
    evidence = await verdict(history)
    assert load.acknowledged <= evidence.rows.keys()


async def reconcile(api: StripeApi, pair: Pair, folder: Path) -> None:
    """`firstclaim reconcile` by the address of both servers, the first of which is down."""
    working = folder / "operator"
    working.mkdir()
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": PYTHON_PATH, "DATABASE_URL": pair.url}
    run = await Command(working, environment | {"STRIPE_API_KEY": KEY, "STRIPE_API_BASE": api.base})(
        "reconcile", "--since", "1d"
    )
    assert run.code == 0, run.output
