"""Row 56: Stripe's API fails in every way while handlers wait for fresh objects, and a process is killed meanwhile."""

import asyncio
from typing import Any

import orjson

from tests.acceptance.harness import Overrides, Sample, eventually, sample
from tests.chaos import fresh_build
from tests.chaos.actions import dispatched
from tests.chaos.history import History
from tests.chaos.verdict import verdict
from tests.stripe_api import FROZEN, KEY, Response, StripeApi, answer, error

EVENTS = 24
TROUBLE: list[Response] = [
    FROZEN,
    None,
    error(500),
    error(429, headers={"Retry-After": "1"}),
    answer(200, body=b"<html>"),
    error(401),
]


async def test_row_56_stripe_fails_and_a_process_dies(history: History) -> None:
    """Stripe is silent, cut, limits the rate and errs; a process is killed in its fetch: one effect each, of now."""
    async with StripeApi().listening() as api:
        settings: Overrides = {
            "handlers": f"tests.chaos.trace,{fresh_build.__name__}",
            "fresh_api_keys": KEY,
            "fresh_timeout_seconds": 0.5,
            "lease_seconds": 2,
            "STRIPE_API_BASE": api.base,
        }
        patient: Overrides = {"fresh_timeout_seconds": 2, "lease_seconds": 8}  # the one that is killed while it waits
        services = [await history.service({**settings, **more}).start() for more in (patient, {})]
        events = [_sample(api) for _ in range(EVENTS)]
        asked, gone = asyncio.Event(), asyncio.Event()

        async def hold() -> None:
            asked.set()
            await gone.wait()

        api.on_request = hold
        killed = asyncio.create_task(history.deliver(services[0], events[0]))
        await asked.wait()
        assert dispatched(history, events[0]) == []
        await services[0].kill()
        gone.set()
        api.on_request = None
        await killed
        await services[0].start()
        api.responses = TROUBLE * 3
        for number, event in enumerate(events[1:]):
            assert await history.deliver(services[number % 2], event) is not None
        await eventually(lambda: _none_left(api), lambda done: done)
        rows = await history.sandbox.all_settled(events)
        assert {row.action for row in rows} == {"is_void"}
        assert rows[0].abandoned == 1
    await verdict(history)


def _sample(api: StripeApi) -> Sample:
    """An event whose invoice is void by now."""
    event = sample(type=fresh_build.FRESH)
    invoice: dict[str, Any] = orjson.loads(event.body)["data"]["object"]
    api.objects[f"/v1/invoices/{invoice['id']}"] = {**invoice, "status": "void"}
    return event


async def _none_left(api: StripeApi) -> bool:
    return not api.responses
