"""Row 44: a Postgres that stalls. It meets bounded demand; afterwards everything settles, with one effect each.

A minute of each: `STALL_SECONDS=60 python -m pytest -m chaos tests/chaos/test_stalled.py -s`.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass

import asyncpg
import pytest

from tests.acceptance.harness import PROCESSED, UNAVAILABLE, Overrides, Row, Sample, eventually
from tests.chaos.history import History
from tests.chaos.load import Load
from tests.chaos.own import Own
from tests.chaos.verdict import verdict

pytestmark = [pytest.mark.alone, pytest.mark.timeout(400)]

STALL_SECONDS = float(os.environ.get("STALL_SECONDS", "10"))
DETECTED_SECONDS = 3.0
SENDERS = 40
TIMEOUT_SECONDS = 1.5
POOLED = 15  # connections of a process, as shipped, without those of the page and the metrics
SHIPPED: Overrides = {
    "postgres_timeout_seconds": TIMEOUT_SECONDS,
    "answer_budget_seconds": 2,  # what was recorded before the stall is answered with 202 until then
    "lease_seconds": 4,
    "lock_ttl_seconds": 4,
}
BACKENDS = """
SELECT count(*) AS backends, count(*) FILTER (WHERE wait_event = 'SyncRep') AS waiting
  FROM pg_stat_activity WHERE application_name = 'firstclaim'
"""


Stall = Callable[[Own], AbstractAsyncContextManager[None]]


@dataclass(slots=True)
class Most:
    """The most backends of the service at one moment, and the most of them that waited for the standby."""

    backends: int = 0
    waiting: int = 0


@asynccontextmanager
async def watched(own: Own) -> AsyncIterator[Most]:
    """Count the service's backends while the block runs, on a connection that was opened before."""
    most, connection = Most(), await asyncpg.connect(own.postgres.url)

    async def look() -> None:
        while True:
            row = await connection.fetchrow(BACKENDS)
            assert row is not None
            most.backends, most.waiting = max(most.backends, row["backends"]), max(most.waiting, row["waiting"])
            await asyncio.sleep(0.005)  # how closely it looks

    looking = asyncio.create_task(look())
    try:
        yield most
    finally:
        looking.cancel()
        await asyncio.wait({looking})
        connection.terminate()


@asynccontextmanager
async def no_standby(own: Own) -> AsyncIterator[None]:
    """The synchronous standby is gone: every COMMIT hangs."""
    await own.postgres.configure(synchronous_standby_names="absent")
    yield
    await own.postgres.configure(synchronous_standby_names="")


@asynccontextmanager
async def locked(own: Own) -> AsyncIterator[None]:
    """Somebody has an ACCESS EXCLUSIVE lock on the ledger."""
    connection = await asyncpg.connect(own.postgres.url)
    async with connection.transaction():
        await connection.execute(
            "LOCK TABLE firstclaim.stripe_events, firstclaim.ledger_epoch IN ACCESS EXCLUSIVE MODE"
        )
        yield
    await connection.close()


@asynccontextmanager
async def frozen(own: Own) -> AsyncIterator[None]:
    """Nothing of the server runs."""
    own.postgres.pause()
    yield
    own.postgres.resume()


@asynccontextmanager
async def unread(history: History) -> AsyncIterator[None]:
    """The test does not read the ledger while the block runs: it would wait, and send nothing meanwhile."""

    async def look(_: Sample) -> Row | None:
        raise TimeoutError

    before, history.look = history.look, look
    with history.postgres_unreachable():
        yield
    history.look = before


@pytest.mark.parametrize("stall", [no_standby, locked, frozen])
async def test_row_44_stalled(own: Own, stall: Stall) -> None:
    """No standby, a lock on the ledger, a frozen server, under load: few backends, quick 503s; then all settle."""
    history = own.history
    service = await history.service(SHIPPED).start()
    load = Load(history, [service], senders=SENDERS, copies=2, pause_seconds=0.02)
    async with watched(own) as most, load.running():
        await load.more(400)
        async with unread(history):
            async with stall(own):
                await asyncio.sleep(DETECTED_SECONDS)  # until the first timeouts
                load.results.clear()
                load.seconds.clear()
                await asyncio.sleep(STALL_SECONDS)  # the length of the stall
                during, seconds = dict(load.results), load.percentile(0.99)
                load.results.clear()
            print(f"{stall.__name__}: {during}, p99 {seconds:.3f} s, most {most}")
            await eventually(processed(load))
        await load.more(200)
    print(f"since: {load.counts}; most {most}")
    assert set(during) == {UNAVAILABLE}
    assert during[UNAVAILABLE] > SENDERS
    assert most.backends <= 2 * POOLED
    assert most.waiting <= POOLED + 1  # one probes
    if stall is not locked:  # there, each statement is ended by the server, which is not silent
        assert seconds < TIMEOUT_SECONDS
    await verdict(history, seconds=60)


def processed(load: Load) -> Callable[[], Awaitable[bool]]:
    """Whether an event was processed."""

    async def seen() -> bool:
        return load.results[PROCESSED] > 0

    return seen
