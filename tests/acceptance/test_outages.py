"""A store is away, refusing or frozen: what is promised meanwhile is kept afterwards, and answers stay quick."""

from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
import pytest_asyncio

from service.inbox.model import Status
from tests.acceptance.harness import (
    DEFERRED,
    IGNORED,
    PROCESSED,
    SHORT_LEASE,
    UNAVAILABLE,
    Ground,
    Overrides,
    Service,
    eventually,
    post,
    sample,
)
from tests.proxy import Mode, Proxy, before_postgres, before_redis

pytestmark = pytest.mark.asyncio(loop_scope="module")  # the proxies live on one loop with the tests

# As shipped: these tests are about just these times.
AS_SHIPPED: Overrides = {
    "redis_timeout_seconds": 0.2,
    "redis_breaker_seconds": 1,
    "postgres_timeout_seconds": 1.5,
    "answer_budget_seconds": 5,
}
AWAY = pytest.mark.parametrize("mode", [Mode.REFUSE, Mode.FROZEN])


@dataclass(frozen=True, slots=True)
class Proxied:
    """A service that reaches both stores through proxies."""

    service: Service
    postgres: Proxy
    redis: Proxy
    redis_url: str  # through the proxy


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def proxied_service(shared_ground: Ground) -> AsyncIterator[Proxied]:
    """One service for the whole module."""
    async with (
        before_postgres(shared_ground.database_url) as (postgres, database_url),
        before_redis(shared_ground.redis_url) as (redis, redis_url),
    ):
        addresses: Overrides = {"DATABASE_URL": database_url, "REDIS_URL": redis_url}
        service = shared_ground.service(SHORT_LEASE | AS_SHIPPED | addresses)
        await service.start()
        yield Proxied(service, postgres, redis, redis_url)
        await service.kill()


@pytest_asyncio.fixture(loop_scope="module")
async def proxied(proxied_service: Proxied) -> AsyncIterator[Proxied]:
    """With both stores back and seen to be so, before each test and after it."""
    yield proxied_service
    for proxy in (proxied_service.postgres, proxied_service.redis):
        proxy.switch(Mode.OPEN)
    await eventually(proxied_service.service.parts, lambda parts: parts[0] == 200 and set(parts[1].values()) == {"ok"})


@AWAY
async def test_redis_away(mode: Mode, proxied: Proxied, shared_ground: Ground) -> None:
    """Without Redis events are recorded within a second and deferred; once it is back each is completed once."""
    known = sample()
    assert (await shared_ground.deliver(proxied.service, known)).said == PROCESSED

    proxied.redis.switch(mode)
    events = [sample() for _ in range(3)]
    for event in events:
        answer = await shared_ground.deliver(proxied.service, event)
        assert (answer.said, answer.reason) == (DEFERRED, "Recorded; dispatched when the lock is back")
        assert answer.seconds < 1
    assert (await shared_ground.deliver(proxied.service, events[0])).said == DEFERRED
    duplicate = await shared_ground.deliver(proxied.service, known)
    assert (duplicate.said, duplicate.reason) == (IGNORED, f"Event {known.id} already completed")
    status, parts = await proxied.service.parts()
    assert (status, parts["redis"], parts["postgres"]) == (200, "degraded", "ok")
    for event in events:
        assert (await shared_ground.settled(event, Status.PENDING)).counts == (0, 0, 0)

    proxied.redis.switch(Mode.OPEN)
    for row in await shared_ground.all_settled(events):
        assert row.counts == (1, 0, 0)


@AWAY
async def test_postgres_away(mode: Mode, proxied: Proxied, shared_ground: Ground) -> None:
    """Without Postgres nothing is promised: 503 and Retry-After, in time; a retry after it is processed once."""
    known = sample()
    assert (await shared_ground.deliver(proxied.service, known)).said == PROCESSED

    proxied.postgres.switch(mode)
    event = sample()
    answer = await post(proxied.service.url, event.body)
    assert answer.said == UNAVAILABLE
    assert answer.content["event_id"] is None
    assert int(answer.headers["retry-after"]) > 0
    assert answer.seconds < (2 if mode is Mode.REFUSE else 5)
    assert await shared_ground.row(event) is None
    health = await proxied.service.get("/readyz")
    assert health.status_code == 503
    assert health.elapsed.total_seconds() < 2
    assert (await proxied.service.get("/livez")).status_code == 200

    proxied.postgres.switch(Mode.OPEN)
    await eventually(proxied.service.parts, lambda parts: parts[0] == 200)
    # Thawed, the server may yet run what it was sent while frozen: then the row is there, and recovery's.
    assert (await shared_ground.deliver(proxied.service, event)).said in (
        {PROCESSED} if mode is Mode.REFUSE else {PROCESSED, IGNORED}
    )
    assert (await shared_ground.settled(event)).failures == 0


async def test_no_marker_answers_for_a_ledger_that_cannot_be_asked(proxied: Proxied, shared_ground: Ground) -> None:
    """While Postgres is away, perhaps being restored, a duplicate of what it held is promised nothing for long."""
    event = sample()
    assert (await shared_ground.deliver(proxied.service, event)).said == PROCESSED
    assert (await shared_ground.deliver(proxied.service, event)).said == IGNORED
    proxied.postgres.switch(Mode.REFUSE)

    async def said() -> tuple[int, bool, str]:
        return (await post(proxied.service.url, event.body)).said

    await eventually(said, lambda said: said == UNAVAILABLE)
    proxied.postgres.switch(Mode.OPEN)
    await eventually(said, lambda said: said == IGNORED)
    assert (await shared_ground.settled(event)).counts == (1, 0, 0)


async def test_a_start_without_redis(proxied: Proxied, shared_ground: Ground) -> None:
    """Redis away is no reason not to start: the service is ready, degraded, records, and dispatches later."""
    proxied.redis.switch(Mode.REFUSE)
    service = await shared_ground.service(AS_SHIPPED | {"REDIS_URL": proxied.redis_url}).start()
    status, parts = await service.parts()
    assert (status, parts["redis"]) == (200, "degraded")
    event = sample()
    assert (await shared_ground.deliver(service, event)).said == DEFERRED
    proxied.redis.switch(Mode.OPEN)
    assert (await shared_ground.settled(event)).counts == (1, 0, 0)
    assert await service.stop() == 0


async def test_both_away(proxied: Proxied, shared_ground: Ground) -> None:
    """With neither store nothing can be promised, and the answer says so; both back, the retry is processed."""
    proxied.redis.switch(Mode.REFUSE)
    proxied.postgres.switch(Mode.REFUSE)
    event = sample()
    assert (await post(proxied.service.url, event.body)).said == UNAVAILABLE
    proxied.postgres.switch(Mode.OPEN)
    assert (await eventually(lambda: post(proxied.service.url, event.body), lambda a: a.status != 503)).said == DEFERRED
    proxied.redis.switch(Mode.OPEN)
    assert (await shared_ground.settled(event)).counts == (1, 0, 0)


async def test_the_answer_of_a_commit_that_was_not_heard(proxied: Proxied, shared_ground: Ground) -> None:
    """The server commits the insert and its reply is lost: 503, and the row that is there is completed once."""
    event = sample()

    def mute_at_the_insert(sent: bytes) -> None:
        if event.id.encode() in sent:
            proxied.postgres.switch(Mode.MUTE)

    proxied.postgres.on_sent = mute_at_the_insert
    answer = await post(proxied.service.url, event.body)
    proxied.postgres.on_sent = None
    assert answer.said == UNAVAILABLE
    await eventually(lambda: shared_ground.row(event))
    proxied.postgres.switch(Mode.OPEN)
    row = await shared_ground.settled(event)
    assert row.failures == 0
    assert (await shared_ground.deliver(proxied.service, event)).said == IGNORED
