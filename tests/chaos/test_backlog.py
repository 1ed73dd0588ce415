"""Row 36: thousands of events are pending after an outage of Redis, and traffic goes on while they are worked off."""

import asyncio
import os
import time
from typing import Final

import asyncpg
import pytest

from tests.acceptance.harness import DEFERRED, IGNORED, PROCESSED, Overrides, Service, eventually
from tests.chaos.history import History
from tests.chaos.load import Load
from tests.chaos.own import Own
from tests.chaos.verdict import verdict

pytestmark = [pytest.mark.alone, pytest.mark.timeout(900)]

# The matrix says 20,000. The default takes half a minute on a small machine.
BACKLOG: Final = int(os.environ.get("CHAOS_BACKLOG", "4000"))
FRESH: Final = BACKLOG // 4
LIVE: Final = 300
SENDERS: Final = 10
DRAIN_SECONDS: Final = 600.0
ANSWER_BUDGET_SECONDS: Final = 5
# As shipped: how fast it drains depends on these.
AS_SHIPPED: Overrides = {
    "recovery_interval_seconds": 1,
    "redis_timeout_seconds": 0.2,
    "redis_breaker_seconds": 1,
    "answer_budget_seconds": ANSWER_BUDGET_SECONDS,
}


async def test_row_36_a_backlog_with_live_traffic(own: Own) -> None:
    """A backlog completes once, at half the rate of fresh events or better, and live events do not wait for it."""
    history = own.history
    service = await history.service(AS_SHIPPED).start()
    before = await fresh_rate(history, service)
    idle = live_traffic(history, service)
    async with idle.running():
        await idle.more(LIVE)

    await own.redis.stop()
    backlog = Load(history, [service], senders=SENDERS, copies=1)
    await backlog.deliver(BACKLOG)
    assert backlog.results == {DEFERRED: BACKLOG}
    await own.redis.start()
    busy = live_traffic(history, service)
    async with busy.running():
        seconds = await drained(own, backlog)
        await busy.more(LIVE)
    after = await fresh_rate(history, service)

    drain, fresh = BACKLOG / seconds, min(before, after)
    print(f"{BACKLOG} drained at {drain:.0f}/s; fresh events at {before:.0f}/s before and {after:.0f}/s after")
    for name, load in (("idle", idle), ("during the drain", busy)):
        p50, p99 = (1000 * load.percentile(share) for share in (0.5, 0.99))
        print(f"live traffic, {name}: {load.counts}; p50 {p50:.0f} ms, p99 {p99:.0f} ms")
    evidence = await verdict(history)
    for event in {each.event_id for each in history.deliveries}:
        assert evidence.rows[event].counts == (1, 0, 0)
    assert drain >= fresh / 2
    assert busy.percentile(0.99) < ANSWER_BUDGET_SECONDS / 2
    assert set(busy.results) <= {PROCESSED, IGNORED, DEFERRED}  # the latter until the breaker has found Redis back


async def fresh_rate(history: History, service: Service) -> float:
    """Fresh events that are processed in a second, when nothing else is to do."""
    load = Load(history, [service], senders=SENDERS, copies=1)
    began = time.monotonic()
    await load.deliver(FRESH)
    assert load.results == {PROCESSED: FRESH}
    return FRESH / (time.monotonic() - began)


def live_traffic(history: History, service: Service) -> Load:
    """What comes at its own pace: some dozens in a second, half of them duplicates."""
    return Load(history, [service], senders=2, copies=2, pause_seconds=0.04)


async def drained(own: Own, backlog: Load) -> float:
    """Seconds until all of it is completed."""
    began = time.monotonic()
    connection = await asyncpg.connect(own.postgres.url)
    ids = [event.id for event in backlog.events]
    left = "SELECT count(*) FROM firstclaim.stripe_events WHERE event_id = ANY($1) AND status <> 'completed'"

    async def look() -> int:
        await asyncio.sleep(0.2)  # looked at more often, the looks would take the time of the work
        count: int = await connection.fetchval(left, ids)
        return count

    try:
        await eventually(look, lambda count: count == 0, DRAIN_SECONDS)
    finally:
        await connection.close()
    return time.monotonic() - began
