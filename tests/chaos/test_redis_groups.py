"""Rows 51 to 53: Redis as a Cluster, and behind Sentinels, while its masters are killed and slots migrate."""

import pytest
from pydantic import SecretStr
from redis.crc import key_slot

from firstclaim.errors import StoreUnsuitable
from firstclaim.server.check import Check, Verdict
from firstclaim.server.preflight import raise_if_fatal
from firstclaim.server.redis_check import check_redis
from firstclaim.settings import Settings
from tests.acceptance.harness import DEFERRED, IGNORED, PROCESSED, eventually, sample
from tests.chaos.actions import answered
from tests.chaos.failovers import FAILOVERS, Failovers
from tests.chaos.history import History
from tests.chaos.load import Load
from tests.chaos.redis_failover import PATIENCE, SENDERS, masters_killed
from tests.chaos.redis_groups import Cluster, Watched
from tests.chaos.redis_server import SERVICE
from tests.chaos.servers import Servers
from tests.chaos.verdict import verdict

pytestmark = [pytest.mark.failover, pytest.mark.timeout(180 * FAILOVERS)]


async def checks(url: str) -> list[Check]:
    """What `firstclaim check` says of Redis at this address."""
    settings = Settings(redis_url=SecretStr(url), stripe_webhook_secrets=(SecretStr("whsec_test"),))
    return [check async for check in check_redis(settings)]


async def refused(url: str) -> str:
    """What the last check says, which must stop `serve`."""
    found = await checks(url)
    with pytest.raises(StoreUnsuitable):
        raise_if_fatal(found)
    assert not any("cannot be reached" in check.detail for check in found)
    return found[-1].detail


async def test_row_51_a_master_of_a_cluster_killed(servers: Servers, failovers: Failovers) -> None:
    """No 503, nothing lost or doubled, and normal within 5 s of the promotion; the old master is a replica again."""
    cluster = await Cluster.form(servers)
    [check] = await checks(cluster.url)
    assert (check.verdict, check.detail.partition(": ")[2]) == (Verdict.OK, "a Cluster of 3 masters")
    await masters_killed(failovers, "Redis Cluster, a master killed", cluster)


async def test_row_51_a_slot_migrates(servers: Servers, history: History) -> None:
    """The slot of all keys migrates under load, and moves, twice: ASK and MOVED are followed, nothing is deferred."""
    cluster = await Cluster.form(servers, 2, replicas=False)
    history.sandbox.redis_url, history.sandbox.redis_prefix = cluster.url, "{shop}:"
    service = await history.service(PATIENCE).start()
    load = Load(history, [service], senders=SENDERS, copies=2)
    async with load.running():
        for _ in range(2 * FAILOVERS):
            await load.more(100)
            async with cluster.migrating(key_slot(b"shop")):
                await load.more(150)
        await load.more(100)
    await verdict(history)
    print(f"{len(load.events)} acknowledged events: {load.counts}")
    assert set(load.results) == {PROCESSED, IGNORED}


async def test_row_52_a_part_of_a_cluster_down(servers: Servers, history: History) -> None:
    """A master without a replica is down: events of the other masters are processed, its own are deferred."""
    cluster = await Cluster.form(servers, replicas=False, requirepass="secret", cluster_require_full_coverage="no")
    url = cluster.url.replace("://", "://:secret@")
    history.sandbox.redis_url = url
    assert "refuses the login" in await refused(cluster.url)
    assert "refuses the login" in await refused(url.replace("secret", "wrong"))
    single = f"redis://:secret@127.0.0.1:{cluster.servers[0].port}"
    assert "is a node of a Cluster; expected redis+cluster://" in await refused(single)
    assert "no Sentinel" in await refused(single.replace("redis:", "redis+sentinel:") + "/x?sentinel_password=secret")

    service = await history.service(PATIENCE).start()
    load = Load(history, [service], senders=SENDERS, copies=2)
    await load.deliver(100)
    assert set(load.results) == {PROCESSED, IGNORED}
    killed = (await cluster.masters())[0]
    await killed.kill()
    load.results.clear()
    await load.deliver(300)
    assert set(load.results) == {PROCESSED, IGNORED, DEFERRED}
    assert load.results[PROCESSED] + load.results[IGNORED] > load.results[DEFERRED]  # two masters of three
    found = await checks(url)
    assert [(check.verdict, check.fatal) for check in found] == [
        (Verdict.WARN, False), (Verdict.FAIL, False), (Verdict.OK, False)
    ]  # fmt: skip
    assert f"127.0.0.1:{killed.port}: cannot be reached: connection refused" in found[1].detail
    status, components = await service.components()
    assert (status, components["redis"]) == (200, "degraded")

    await killed.start()
    await verdict(history)
    print(f"{len(load.events)} acknowledged events: {load.counts}")

    async def all_processed() -> bool:
        results = [(await answered(history, service, sample())).result for _ in range(9)]
        return set(results) == {PROCESSED}

    await eventually(all_processed, bool)


async def test_row_53_the_master_of_sentinels_killed(servers: Servers, failovers: Failovers) -> None:
    """A planned failover, then the master killed: no 503, and normal in 5 s; the old one is a replica again."""
    group = await Watched.form(servers)
    [check] = await checks(group.url)
    [master] = await group.masters()
    assert f"the master at 127.0.0.1:{master.port} of 3 of 3 Sentinels" in check.detail
    assert f"they know {SERVICE}" in await refused(group.url.replace(SERVICE, "nobody"))
    assert "is a Sentinel" in await refused(f"redis://127.0.0.1:{group.sentinels[0].port}")

    async def fail_over(load: Load) -> None:
        await group.sentinels[0].raw("SENTINEL", "FAILOVER", SERVICE)
        await group.has_failed_over(master)
        await eventually(master.is_synced_replica, bool)
        await load.more(200)

    kind = "Redis with Sentinels, the master killed"
    await masters_killed(failovers, kind, group, rejoin=False, before=fail_over)
