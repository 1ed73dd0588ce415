"""Row 54: a Patroni cluster, by its members' addresses and behind HAProxy: switched over, and the primary killed."""

import asyncio
from pathlib import Path

import pytest

from tests.acceptance.harness import PROCESSED, Sandbox, sample
from tests.chaos import patroni
from tests.chaos.actions import retried
from tests.chaos.history import History
from tests.chaos.pair import BACK_SECONDS, FAILOVERS, SHIPPED, SWITCHOVER_SECONDS, FailoverLoad, now
from tests.chaos.servers import Servers
from tests.chaos.verdict import verdict

pytestmark = [
    pytest.mark.failover,
    pytest.mark.timeout(200 * FAILOVERS),
    pytest.mark.skipif(bool(patroni.MISSING), reason=f"not installed: {', '.join(patroni.MISSING)}"),
]

EVENTS = 20


async def test_row_54_patroni_and_haproxy(servers: Servers, tmp_path: Path) -> None:
    """Switched over, then killed: processed within a second of the promotion, by the members' addresses and HAProxy."""
    redis = await servers.redis()
    async with patroni.running(servers) as cluster:
        history = History(Sandbox((await cluster.primary()).url(), redis.url, "chaos:", tmp_path))
        services = [history.service(SHIPPED | {"DATABASE_URL": url}) for url in (cluster.url, cluster.balanced)]
        try:
            await asyncio.gather(*(service.start() for service in services))
            for service in services:
                assert (await retried(history, service, sample())).result == PROCESSED
            load = FailoverLoad(history, services)
            async with load.running():
                for left in reversed(range(FAILOVERS)):
                    await load.processed(EVENTS)
                    before = now()
                    promoted = await cluster.switch_over()
                    for service in services:
                        assert await load.back_after(promoted, service) < BACK_SECONDS
                        assert load.longest_gap_of(service, since=before) < SWITCHOVER_SECONDS
                    await cluster.protected()
                    await load.processed(EVENTS)
                    old = await cluster.primary()
                    await old.kill()
                    promoted = await cluster.promoted(cluster.other(old))
                    for service in services:
                        assert await load.back_after(promoted, service) < BACK_SECONDS
                    await load.processed(EVENTS)
                    if left:
                        old.start()
                        await cluster.protected()
            history.sandbox.database_url = (await cluster.primary()).url()
            evidence = await verdict(history)
            assert load.acknowledged <= evidence.rows.keys()
        finally:
            await history.sandbox.end_services()
