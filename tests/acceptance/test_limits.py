"""The bounds that a service keeps: the answer's budget, its handler slots, the lease, a body's time, its mode."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from firstclaim.status import Status
from tests.acceptance.harness import (
    DEFERRED,
    IGNORED,
    PROCESSED,
    UNHANDLED,
    Overrides,
    Sample,
    Sandbox,
    Service,
    StalledDelivery,
    eventually,
    parallel_reason,
    sample,
)

# One slot, so that one slow event fills the house; half a lease is how long the next may wait for it.
NARROW: Overrides = {
    "handler_slots": 1,
    "lease_seconds": 1,
    "answer_budget_seconds": 0.5,
    "body_timeout_seconds": 0.5,
    "livemode": "live",
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(shared_sandbox: Sandbox) -> Service:
    """One narrow service for the whole module."""
    return await shared_sandbox.service(NARROW).start()


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Path]:
    """What `held` events wait for; open at the latest when the test is over, so that the slot is free again."""
    gate = tmp_path / "gate"
    yield gate
    gate.touch()


def held(gate: Path, event_type: str = "invoice.payment_failed") -> Sample:
    """An event whose handler waits for the gate."""
    return sample("hold", event_type, livemode=True, gate=str(gate))


@pytest.mark.parametrize("event_type", ["invoice.payment_failed", "invoice.paid"])
async def test_a_handler_slower_than_the_answers_budget(
    event_type: str, shared_sandbox: Sandbox, service: Service, gate: Path
) -> None:
    """Past the budget: 202, deferred, never before the row is there; the handler goes on, and its effect is one."""
    event = held(gate, event_type)
    answer = await shared_sandbox.deliver(service, event)
    assert (answer.result, answer.reason) == (DEFERRED, "Recorded; still being processed")
    assert answer.seconds < 5
    again = await shared_sandbox.deliver(service, event)
    assert (again.result, again.reason) == (IGNORED, parallel_reason(event.id))
    gate.touch()
    assert (await shared_sandbox.settled(event)).counts == (1, 0, 0)


async def test_a_live_handler_is_not_taken_over(shared_sandbox: Sandbox, service: Service, gate: Path) -> None:
    """A handler that runs for two leases keeps its event: its row's lock is the lease."""
    event = held(gate)
    assert (await shared_sandbox.deliver(service, event)).result == DEFERRED
    await eventually(lambda: shared_sandbox.row(event), lambda row: row is not None and row.due_in_seconds < -1)
    gate.touch()
    assert (await shared_sandbox.settled(event)).counts == (1, 0, 0)


async def test_a_client_that_hangs_up_cancels_nothing(shared_sandbox: Sandbox, service: Service, gate: Path) -> None:
    """The work is not the request's: its client leaves in the middle, and the event completes on that attempt."""
    event = held(gate)
    delivery = await StalledDelivery.begin(service.url, event.body)
    delivery.finish()
    await shared_sandbox.settled(event, Status.PROCESSING)
    await delivery.hang_up()
    gate.touch()
    assert (await shared_sandbox.settled(event)).counts == (1, 0, 0)


async def test_a_client_that_hangs_up_before_the_end_left_nothing(shared_sandbox: Sandbox, service: Service) -> None:
    """A delivery cut off before its last byte is no delivery."""
    event = sample(livemode=True)
    delivery = await StalledDelivery.begin(service.url, event.body)
    await delivery.hang_up()
    assert (await shared_sandbox.deliver(service, sample(livemode=True))).result == PROCESSED
    assert await shared_sandbox.row(event) is None


async def test_a_body_that_arrives_too_slowly(shared_sandbox: Sandbox, service: Service) -> None:
    """A body that does not end within its time: 408, the connection closed, no row."""
    event = sample(livemode=True)
    delivery = await StalledDelivery.begin(service.url, event.body)
    answer = await delivery.answer()
    assert (answer.status, answer.content["action"]) == (408, "rejected")
    assert answer.headers["connection"] == "close"
    assert await shared_sandbox.row(event) is None


async def test_an_event_of_the_other_mode_is_ignored(shared_sandbox: Sandbox, service: Service) -> None:
    """A service for live mode records a test event as ignored, says why, and dispatches nothing."""
    event = sample(livemode=False)
    answer = await shared_sandbox.deliver(service, event)
    assert answer.result == UNHANDLED
    assert answer.reason == f"Event {event.id} is a test mode event; this service takes live mode only"
    await shared_sandbox.settled(event, Status.IGNORED)
