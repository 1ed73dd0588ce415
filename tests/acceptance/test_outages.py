"""One store or both are unreachable, and every promise is kept. (The fault matrix has longer outages of one store.)"""

from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
import pytest_asyncio

from tests.acceptance.harness import (
    DEFERRED,
    IGNORED,
    PROCESSED,
    SHORT_LEASE,
    UNAVAILABLE,
    Overrides,
    Sandbox,
    Service,
    eventually,
    post,
    sample,
)
from tests.proxy import Mode, Proxy, before_postgres, before_redis

pytestmark = pytest.mark.asyncio(loop_scope="module")  # the proxies live on one loop with the tests

# The defaults: these tests are about exactly these times.
AS_SHIPPED: Overrides = {
    "redis_timeout_seconds": 0.2,
    "redis_breaker_seconds": 1,
    "postgres_timeout_seconds": 1.5,
    "answer_budget_seconds": 5,
}


@dataclass(frozen=True, slots=True)
class Proxied:
    """A service that reaches both stores through proxies."""

    service: Service
    postgres: Proxy
    redis: Proxy
    redis_url: str  # through the proxy


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def proxied_service(shared_sandbox: Sandbox) -> AsyncIterator[Proxied]:
    """One service for the whole module."""
    async with (
        before_postgres(shared_sandbox.database_url) as (postgres, database_url),
        before_redis(shared_sandbox.redis_url) as (redis, redis_url),
    ):
        addresses: Overrides = {"DATABASE_URL": database_url, "REDIS_URL": redis_url}
        service = shared_sandbox.service(SHORT_LEASE | AS_SHIPPED | addresses)
        await service.start()
        yield Proxied(service, postgres, redis, redis_url)
        await service.kill()


@pytest_asyncio.fixture(loop_scope="module")
async def proxied(proxied_service: Proxied) -> AsyncIterator[Proxied]:
    """Both stores are reachable, and the service reports that, before and after each test."""
    yield proxied_service
    for proxy in (proxied_service.postgres, proxied_service.redis):
        proxy.switch(Mode.OPEN)
    await eventually(
        proxied_service.service.components, lambda seen: seen[0] == 200 and set(seen[1].values()) == {"ok"}
    )


async def test_no_marker_answers_for_an_unreachable_ledger(proxied: Proxied, shared_sandbox: Sandbox) -> None:
    """While Postgres is unreachable, perhaps for a restore, a duplicate soon gets a 503 in spite of its marker."""
    event = sample()
    assert (await shared_sandbox.deliver(proxied.service, event)).result == PROCESSED
    assert (await shared_sandbox.deliver(proxied.service, event)).result == IGNORED
    proxied.postgres.switch(Mode.REFUSE)

    async def said() -> tuple[int, bool, str]:
        return (await post(proxied.service.url, event.body)).result

    await eventually(said, lambda said: said == UNAVAILABLE)
    proxied.postgres.switch(Mode.OPEN)
    await eventually(said, lambda said: said == IGNORED)
    assert (await shared_sandbox.settled(event)).counts == (1, 0, 0)


async def test_a_start_without_redis(proxied: Proxied, shared_sandbox: Sandbox) -> None:
    """A service starts without Redis: it is ready and degraded, records events, and dispatches them later."""
    proxied.redis.switch(Mode.REFUSE)
    service = await shared_sandbox.service(AS_SHIPPED | {"REDIS_URL": proxied.redis_url}).start()
    status, components = await service.components()
    assert (status, components["redis"]) == (200, "degraded")
    event = sample()
    assert (await shared_sandbox.deliver(service, event)).result == DEFERRED
    proxied.redis.switch(Mode.OPEN)
    assert (await shared_sandbox.settled(event)).counts == (1, 0, 0)
    assert await service.stop() == 0


@pytest.mark.smoke
async def test_both_unreachable(proxied: Proxied, shared_sandbox: Sandbox) -> None:
    """With neither store nothing can be promised, and the answer says so; both back, the retry is processed."""
    proxied.redis.switch(Mode.REFUSE)
    proxied.postgres.switch(Mode.REFUSE)
    event = sample()
    assert (await post(proxied.service.url, event.body)).result == UNAVAILABLE
    proxied.postgres.switch(Mode.OPEN)
    assert (
        await eventually(lambda: post(proxied.service.url, event.body), lambda a: a.status != 503)
    ).result == DEFERRED
    proxied.redis.switch(Mode.OPEN)
    assert (await shared_sandbox.settled(event)).counts == (1, 0, 0)
