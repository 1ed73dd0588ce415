"""Row 54: a Patroni cluster, by its members' addresses and behind HAProxy: switched over, and the primary killed."""

import asyncio
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.acceptance.harness import PROCESSED, Sandbox, sample
from tests.chaos import patroni
from tests.chaos.actions import retried
from tests.chaos.failovers import FAILOVERS, SWITCHOVER_SECONDS, Failovers, now
from tests.chaos.history import History
from tests.chaos.pair import SHIPPED, FailoverLoad
from tests.chaos.servers import Servers

pytestmark = [
    pytest.mark.failover,
    pytest.mark.timeout(200 * FAILOVERS),
    pytest.mark.skipif(bool(patroni.MISSING), reason=f"not installed: {', '.join(patroni.MISSING)}"),
]

EVENTS = 20


async def test_row_54_patroni_and_haproxy(
    servers: Servers, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Switched over, then killed: processed within a second of the promotion, by the members' addresses and HAProxy."""
    redis = await servers.redis()
    async with patroni.running(servers) as cluster:
        history = History(Sandbox((await cluster.primary()).url(), redis.url, "chaos:", tmp_path))
        by_members, by_haproxy = (
            history.service(SHIPPED | {"DATABASE_URL": url}) for url in (cluster.url, cluster.balanced)
        )
        services = {"by its members": by_members, "behind HAProxy": by_haproxy}
        failovers = Failovers(history, record_property)
        load = FailoverLoad(failovers, [by_members, by_haproxy])

        async def back(what: str, began: float, promoted: float, interrupted_most_seconds: float = math.inf) -> None:
            for way, service in services.items():
                kind = f"Patroni {way}, {what}"
                await load.back(
                    kind, began, promoted, interrupted_most_seconds=interrupted_most_seconds, service=service
                )
            await load.processed(EVENTS)

        try:
            await asyncio.gather(*(service.start() for service in services.values()))
            for service in services.values():
                assert (await retried(history, service, sample())).result == PROCESSED
            async with load.running():
                for left in reversed(range(FAILOVERS)):
                    await load.processed(EVENTS)
                    began = now()
                    await back("switched over", began, await cluster.switch_over(), SWITCHOVER_SECONDS)
                    await cluster.protected()
                    old = await cluster.primary()
                    began = now()
                    await old.kill()
                    await back("killed", began, await cluster.promoted(cluster.other(old)))
                    if left:
                        old.start()
                        await cluster.protected()
            history.sandbox.database_url = (await cluster.primary()).url()
            await failovers.verdict()
        finally:
            await history.sandbox.end_services()
