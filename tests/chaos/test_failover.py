"""Row 16: the Redis primary dies with its last writes, and a replica without them takes its place."""

import asyncio

import pytest

from tests.acceptance.harness import DEFERRED, IGNORED, PROCESSED
from tests.chaos.history import History
from tests.chaos.load import Load
from tests.chaos.servers import Servers
from tests.chaos.verdict import verdict
from tests.proxy import Mode, Upstream, before_redis

pytestmark = pytest.mark.timeout(600)

FAILOVERS = 3
DELIVERIES = 400  # in each part of a failover


async def test_row_16_failed_over_without_the_last_writes(servers: Servers, history: History) -> None:
    """Locks and markers are lost and older ones return: under load no event is lost or processed twice."""
    primary, replica = await servers.redis(), await servers.redis()
    async with before_redis(primary.url) as (address, through):  # the address that a failover moves
        services = [history.service({"REDIS_URL": through}) for _ in range(2)]
        await asyncio.gather(*(service.start() for service in services))
        load = Load(history, services)
        async with load.running():
            for _ in range(FAILOVERS):
                async with before_redis(primary.url) as (link, _):
                    await replica.replicate(primary, port=link.port)
                    await load.more(DELIVERIES)
                    link.switch(Mode.FROZEN)
                    await load.more(DELIVERIES)
                    lost = await primary.call("DBSIZE") - await replica.call("DBSIZE")
                    await primary.kill()
                print(f"{lost} keys lost")
                assert lost > 0
                await replica.promote()
                address.upstream = Upstream("127.0.0.1", replica.port)
                address.cut()
                await load.more(DELIVERIES)
                primary, replica = replica, await primary.start()
    history.sandbox.redis_url = primary.url
    print(load.counts)
    assert set(load.results) <= {PROCESSED, IGNORED, DEFERRED}
    assert load.results[PROCESSED]
    evidence = await verdict(history)
    assert evidence.rows.keys() == {each.event_id for each in history.deliveries}
