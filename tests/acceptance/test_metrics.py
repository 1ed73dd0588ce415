"""`/metrics` of real processes: every event is counted in its series, and no request can add a series."""

import asyncio
import os
import re
import signal
from contextlib import suppress

import httpx
from prometheus_client.parser import text_string_to_metric_families

from firstclaim.status import Status
from firstclaim.web.webhook import WEBHOOK_PATH
from tests.acceptance.harness import (
    DEFERRED,
    FAILED,
    IGNORED,
    PROCESSED,
    SHORT_LEASE,
    UNHANDLED,
    Sandbox,
    Service,
    eventually,
    post,
    sample,
)
from tests.proxy import Mode, before_postgres, before_redis

Series = dict[tuple[str, ...], float]


async def scraped(service: Service) -> Series:
    """The value of each series, by its name and its label values. Fails unless the answer is well formed."""
    answer = await service.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    families = list(text_string_to_metric_families(answer.text))
    assert len({family.name for family in families}) == len(families)
    assert all(family.documentation for family in families)
    return {(each.name, *each.labels.values()): each.value for family in families for each in family.samples}


def grown(before: Series, after: Series) -> Series:
    """The changes, without durations and recovery rounds. Fails if a series was added or removed."""
    assert before.keys() == after.keys()
    excluded = re.compile(r"_bucket$|_seconds_sum$|recovery_rounds|^firstclaim_(?:events|due|oldest|past)")
    return {
        key: value - before[key] for key, value in after.items() if value != before[key] and not excluded.search(key[0])
    }


VERIFIED: Series = {("firstclaim_endpoint_requests_total", "-", "verified"): 1}


async def test_what_happens_is_counted(sandbox: Sandbox) -> None:
    """Each outcome and each way to detect a duplicate is counted in its own series, and nothing else changes."""
    service = await sandbox.service().start()
    before = await scraped(service)

    async def since() -> Series:
        nonlocal before
        now = await scraped(service)
        changes, before = grown(before, now), now
        return changes

    event = sample()
    assert (await sandbox.deliver(service, event)).result == PROCESSED
    attempts = ("firstclaim_attempts_total", "invoice.payment_failed")
    handled = ("firstclaim_handler_seconds_count", "invoice.payment_failed")
    completed: Series = {(*attempts, "completed"): 1, (*handled, "completed"): 1}
    assert await since() == {**VERIFIED, ("firstclaim_deliveries_total", "processed"): 1, **completed}

    assert 0 < before["firstclaim_handler_seconds_sum", "invoice.payment_failed", "completed"] < 10

    assert (await sandbox.deliver(service, event)).result == IGNORED
    assert await since() == {
        **VERIFIED,
        ("firstclaim_deliveries_total", "duplicate"): 1,
        ("firstclaim_duplicates_total", "redis"): 1,
    }
    sandbox.empty_redis()
    assert (await sandbox.deliver(service, event)).result == IGNORED
    assert await since() == {
        **VERIFIED,
        ("firstclaim_deliveries_total", "duplicate"): 1,
        ("firstclaim_duplicates_total", "ledger"): 1,
    }

    assert (await sandbox.deliver(service, sample(type="charge.refunded"))).result == UNHANDLED
    assert await since() == {**VERIFIED, ("firstclaim_deliveries_total", "unhandled"): 1}

    failing = sample("fail", until=1)
    assert (await sandbox.deliver(service, failing)).result == FAILED
    await sandbox.settled(failing, Status.COMPLETED)

    async def recovered() -> float:
        return (await scraped(service))["firstclaim_recovered_total", "processed"]

    await eventually(recovered, lambda value: value == 1)
    assert await since() == {
        **VERIFIED,
        ("firstclaim_deliveries_total", "failed"): 1,
        ("firstclaim_claims_taken_over_total", "recovery"): 1,
        ("firstclaim_recovered_total", "processed"): 1,
        (*attempts, "failed"): 1,
        (*handled, "failed"): 1,
        **completed,
    }


async def test_no_request_adds_a_series(sandbox: Sandbox) -> None:
    """Unknown types, paths, methods, signatures and bodies are counted in series that exist already."""
    service = await sandbox.service().start()
    before = await scraped(service)
    for number in range(3):
        await post(service.url, sample().body.replace(b"invoice.payment_failed", b"made.up.by.%d" % number))
        await service.request("POST", f"/made/up/{number}", b"{}")
        await service.request("DELETE", f"{WEBHOOK_PATH}?made={number}")
        await post(service.url, b"{}", [("stripe-signature", f"t=1,v1=made{number}")])
        await post(service.url, b"{%d}" % number)
    assert grown(before, await scraped(service)) == {
        ("firstclaim_endpoint_requests_total", "-", "verified"): 6,
        ("firstclaim_endpoint_requests_total", "-", "signature_refused"): 3,
        ("firstclaim_deliveries_total", "unhandled"): 3,
        ("firstclaim_rejected_requests_total", "path"): 6,
        ("firstclaim_rejected_requests_total", "signature_stale"): 3,
        ("firstclaim_rejected_requests_total", "content"): 3,
    }


async def test_all_workers_are_one_sum(sandbox: Sandbox) -> None:
    """Every worker reports the sum of all workers."""
    service = await sandbox.service(workers=2).start()
    for _ in range(20):
        assert (await sandbox.deliver(service, sample())).result == PROCESSED
    sums = {(await scraped(service))["firstclaim_deliveries_total", "processed"] for _ in range(10)}
    assert sums == {20}


async def test_a_worker_that_dies_uses_no_slot(sandbox: Sandbox) -> None:
    """The slots of a dead worker are free: what it had in use is not counted any more, what it had counted is."""
    service = await sandbox.service(SHORT_LEASE, workers=2).start()
    assert (await sandbox.deliver(service, sample())).result == PROCESSED
    in_use = ("firstclaim_slots_in_use", "invoice.payment_failed")
    event = sample("hold", gate=str(sandbox.folder / "gate"))
    delivering = asyncio.create_task(post(service.url, event.body))

    async def current() -> Series:
        return await scraped(service)

    await eventually(current, lambda series: series[in_use] == 1)
    [row] = await sandbox.fetch("SELECT claimed_by FROM firstclaim.stripe_events WHERE status = 'processing'")
    os.kill(int(row["claimed_by"].rpartition(":")[2]), signal.SIGKILL)
    with suppress(httpx.HTTPError):
        await delivering
    (sandbox.folder / "gate").touch()
    await sandbox.settled(event)
    idle = await eventually(current, lambda series: series[in_use] == 0)
    assert idle["firstclaim_deliveries_total", "processed"] == 1


async def test_unreachable_stores_are_reported(sandbox: Sandbox) -> None:
    """An unreachable store is 0 in `firstclaim_up`, and an unreachable ledger's series are left out, not outdated."""
    async with (
        before_postgres(sandbox.database_url) as (postgres, database_url),
        before_redis(sandbox.redis_url) as (redis, redis_url),
    ):
        service = await sandbox.service({"DATABASE_URL": database_url, "REDIS_URL": redis_url}).start()
        healthy = await scraped(service)
        assert {key[1]: value for key, value in healthy.items() if key[0] == "firstclaim_up"} == dict.fromkeys(
            ("process", "redis", "postgres", "schema", "recovery", "handlers"), 1.0
        )
        assert {key[1] for key in healthy if key[0] == "firstclaim_events"} == set(Status)

        redis.switch(Mode.REFUSE)
        assert (await sandbox.deliver(service, sample())).result == DEFERRED
        found = await scraped(service)
        assert (found["firstclaim_up", "redis"], found["firstclaim_redis_outages_total",]) == (0, 1)
        assert found["firstclaim_up", "postgres"] == 1
        redis.switch(Mode.OPEN)

        postgres.switch(Mode.REFUSE)

        async def current() -> Series:
            return await scraped(service)

        unreachable = await eventually(current, lambda series: ("firstclaim_due_events",) not in series)
        assert unreachable["firstclaim_up", "postgres"] == 0
        postgres.switch(Mode.OPEN)
        await eventually(current, lambda series: ("firstclaim_due_events",) in series)
