"""Fixtures of the chaos suite."""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from tests import clock as clocks
from tests.acceptance.harness import Sandbox
from tests.chaos.failovers import Failovers
from tests.chaos.history import History
from tests.chaos.own import Own
from tests.chaos.servers import Servers, make_template, own_servers
from tests.stores import Stores


@pytest.fixture
async def history(stores: Stores, tmp_path: Path) -> AsyncIterator[History]:
    """A history on the shared servers, for faults of processes and not of servers."""
    sandbox = await Sandbox.prepare(stores, tmp_path)
    try:
        yield History(sandbox)
    finally:
        await sandbox.close()


@pytest.fixture
def failovers(history: History, record_property: Callable[[str, object], None]) -> Failovers:
    """The failovers of this test, for the table at the end of the run."""
    return Failovers(history, record_property)


@pytest.fixture
async def clock(history: History) -> AsyncIterator[clocks.Clock]:
    """The clock of the history's database: it runs, and the test can advance it."""
    async with clocks.installed(history.sandbox.database_url) as clock:
        yield clock


@pytest.fixture(scope="session")
def template() -> Iterator[Path]:
    """A cluster with the migrated ledger, to be copied: creating one takes far longer."""
    with tempfile.TemporaryDirectory(prefix="firstclaim-chaos-") as folder:
        yield asyncio.run(make_template(Path(folder)))


@pytest.fixture
async def servers(template: Path) -> AsyncIterator[Servers]:
    """Servers that this test may break; none of them is left after it."""
    async with own_servers(template) as servers:
        yield servers


@pytest.fixture
async def own(servers: Servers, tmp_path: Path) -> AsyncIterator[Own]:
    """A history on a Postgres and a Redis that belong to this test."""
    postgres, redis = await servers.postgres(), await servers.redis()
    own = Own(History(Sandbox(postgres.url, redis.url, "chaos:", tmp_path)), postgres, redis)
    try:
        yield own
    finally:
        await own.history.sandbox.end_services()
