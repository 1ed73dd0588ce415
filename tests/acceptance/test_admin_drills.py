"""Drills of the person on call: something breaks, and the first sentence of the page says what.

Guarantees: each test reads only what the page shows, of a real service, and finds the cause in its first sentence.
"""

import re
from collections.abc import AsyncIterator

import pytest

from tests.acceptance.harness import PROCESSED, SHORT_LEASE, Sandbox, Service, eventually, post, sample
from tests.acceptance.test_admin import ON, at
from tests.fixtures import signed
from tests.pages import Visitor
from tests.proxy import Mode, before_postgres, before_redis


@pytest.fixture
async def service(sandbox: Sandbox) -> Service:
    """With the page switched on."""
    return await sandbox.service(ON).start()


@pytest.fixture
async def admin(service: Service) -> AsyncIterator[Visitor]:
    """Logged in."""
    async with at(service) as admin:
        assert (await admin.log_in()).status_code == 303
        yield admin


async def verdict(admin: Visitor) -> str:
    """The first sentences of the page."""
    _, page = await admin.get("/admin")
    found = re.search(r'<section class="card verdict .*?</section>', page.html, re.DOTALL)
    assert found is not None
    return " ".join(re.sub(r"<[^>]+>", " ", found.group()).split())


async def test_a_secret_was_rolled(sandbox: Sandbox, service: Service, admin: Visitor) -> None:
    """Deliveries that are signed with another secret: all of the last requests, why, and what to ask."""
    for _ in range(3):
        assert (await sandbox.deliver(service, sample())).result == PROCESSED

    async def said() -> str:
        body = sample().body
        assert (await post(service.url, body, list(signed(body, secret="whsec_rolled").items()))).status == 400
        return await verdict(admin)

    # The window begins with the next sample of the counters.
    said_last = await eventually(
        said, lambda text: re.match(r"(\d+) of the last \1 requests were refused: signature mismatch \(replica ", text)
    )
    assert "Was a secret rolled at Stripe" in said_last


async def test_one_type_fails(sandbox: Sandbox, service: Service, admin: Visitor) -> None:
    """All events of a type fail beside others that succeed: the type's handler, all of them, and the error."""
    for _ in range(20):
        await sandbox.deliver(service, sample("permanent"))
    text = await verdict(admin)
    assert re.match(r"All 20 events of [\w.*]+ in the last 24 hours have failed: Permanent: never\.", text), text


async def test_redis_is_down(sandbox: Sandbox) -> None:
    """An unreachable Redis is named, and what it means for deliveries."""
    async with before_redis(sandbox.redis_url) as (redis, url):
        service = await sandbox.service({**ON, **SHORT_LEASE, "REDIS_URL": url}).start()
        async with at(service) as admin:
            await admin.log_in()
            redis.switch(Mode.REFUSE)
            await eventually(lambda: verdict(admin), lambda text: text.startswith("redis is degraded"))
            assert "Events are recorded and answered with 202, and dispatch waits." in await verdict(admin)


async def test_postgres_is_down(sandbox: Sandbox) -> None:
    """An unreachable Postgres is named first, with what it means for deliveries."""
    async with before_postgres(sandbox.database_url) as (postgres, url):
        service = await sandbox.service({**ON, **SHORT_LEASE, "DATABASE_URL": url}).start()
        async with at(service) as admin:
            await admin.log_in()
            postgres.switch(Mode.REFUSE)
            text = await eventually(lambda: verdict(admin), lambda text: text.startswith("postgres is down"))
            assert "Deliveries are answered with 503, and Stripe sends them again." in text
            assert "The ledger cannot be read" in text


async def test_stripe_no_longer_sends(sandbox: Sandbox, service: Service, admin: Visitor) -> None:
    """No event for hours, where one came every minute: since when, and what is usual."""
    assert (await sandbox.deliver(service, sample())).result == PROCESSED
    await sandbox.execute(
        """
        INSERT INTO firstclaim.stripe_events
               (event_id, type, livemode, created_at, status, attempt, received_at, due_at, give_up_at, settled_at)
        SELECT event_id || n, type, livemode, created_at, 'ignored', attempt, received_at - n * interval '1 minute',
               due_at, give_up_at, settled_at FROM firstclaim.stripe_events, generate_series(1, 200) AS n;
        UPDATE firstclaim.stripe_events SET received_at = received_at - interval '3 hours'
        """
    )
    text = await verdict(admin)
    assert text.startswith("No event has come for 3 h; of the gaps between the newest 1"), text
    assert "one in a hundred is longer than 1 min" in text
    assert "Has the endpoint been disabled at Stripe" in text
