"""Rows 14 and 15: Redis forgets, all at once or key by key, while deliveries and duplicates keep coming.

Each event is delivered three times, close together and to either service: whenever its lock or marker has gone
missing between two of them, the ledger alone says that it is taken.
"""

import asyncio
import itertools
import os
from typing import Final

import pytest

from tests.acceptance.harness import DEFERRED, IGNORED, PROCESSED
from tests.chaos.checker import Evidence
from tests.chaos.history import History
from tests.chaos.load import Load, repeated
from tests.chaos.servers import Servers
from tests.chaos.verdict import verdict

pytestmark = pytest.mark.timeout(900)

# Of row 14, and a quarter of them of row 15: about half a minute of a quiet machine with two cores.
DELIVERIES: Final = int(os.environ.get("CHAOS_DELIVERIES", "10000"))
SETTLE_SECONDS: Final = 120.0
FLUSH_SECONDS: Final = 0.05


async def loaded(history: History, deliveries: int) -> tuple[Load, Evidence]:
    """Two services under load; nothing but processed, ignored and deferred is answered, and every invariant holds."""
    services = [history.service(), history.service()]
    await asyncio.gather(*(service.start() for service in services))
    load = Load(history, services)
    await load.deliver(deliveries)
    assert set(load.results) <= {PROCESSED, IGNORED, DEFERRED}
    evidence = await verdict(history, seconds=SETTLE_SECONDS)
    delivered = {each.event_id for each in history.deliveries}
    assert evidence.rows.keys() == delivered
    assert len(evidence.effects) == len(delivered)
    print(f"{deliveries} deliveries of {len(delivered)} events: {load.counts}")
    return load, evidence


async def test_row_14_flushed_under_load(servers: Servers, history: History) -> None:
    """FLUSHALL every 50 ms under load: of all events, delivered three times each, none is lost or processed twice."""
    server = await servers.redis()
    history.sandbox.redis_url = server.url
    async with repeated(lambda: server.call("FLUSHALL"), FLUSH_SECONDS):
        load, _ = await loaded(history, DELIVERIES)
    flushed = (await server.call("INFO", "commandstats"))["cmdstat_flushall"]["calls"]
    print(f"flushed {flushed} times")
    assert flushed > 20
    assert load.results[IGNORED]


# A neighbour on the same Redis, whose keys take the place of ours.
NEIGHBOUR: Final = """
for number = 1, 200 do redis.call('SET', 'neighbour:' .. ARGV[1] .. ':' .. number, string.rep('x', 5000)) end
"""


async def test_row_15_evicted_under_load(servers: Servers, history: History) -> None:
    """`maxmemory 2mb allkeys-lru`: locks and markers are evicted under load, and no event is lost or doubled."""
    server = await servers.redis(maxmemory="2mb", maxmemory_policy="allkeys-lru")
    history.sandbox.redis_url = server.url
    rounds = itertools.count()
    async with repeated(lambda: server.call("EVAL", NEIGHBOUR, 0, next(rounds)), FLUSH_SECONDS):
        load, evidence = await loaded(history, DELIVERIES // 4)
    gone = len(evidence.rows) - len(evidence.markers)
    print(f"{gone} of {len(evidence.rows)} markers evicted in {next(rounds)} rounds")
    assert gone > len(evidence.rows) // 2
    assert load.results[IGNORED]
