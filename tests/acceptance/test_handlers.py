"""What a handler may do, what it must not do, and the outcome of its event in each case."""

import asyncio
from pathlib import Path

import pytest
import pytest_asyncio

from firstclaim.status import Status
from tests.acceptance.harness import (
    FAILED,
    IGNORED,
    PROCESSED,
    UNHANDLED,
    Sandbox,
    Service,
    eventually,
    parallel_reason,
    recovery_has_passed,
    sample,
)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(shared_sandbox: Sandbox) -> Service:
    """One service for the whole module: no test here harms it."""
    return await shared_sandbox.service().start()


@pytest.mark.parametrize(
    "event_type",
    [
        "invoice.payment_failed",
        "invoice.paid",  # its handler is a sync one
        "customer.subscription.deleted",  # by the wildcard customer.subscription.*
        "v1.billing.meter.error_report_triggered",  # a thin event: no data, a handler that needs it fetches it
    ],
)
async def test_each_kind_of_handler_is_dispatched_once(
    event_type: str, shared_sandbox: Sandbox, service: Service
) -> None:
    """An async, a sync, a wildcard and a thin event's handler run once, and their action is the answer."""
    event = sample(type=event_type)
    assert (await shared_sandbox.deliver(service, event)).result == PROCESSED
    row = await shared_sandbox.settled(event)
    assert (row.counts, row.action) == ((1, 0, 0), "effect_recorded")
    again = await shared_sandbox.deliver(service, event)
    assert (again.result, again.reason) == (IGNORED, parallel_reason(event.id))
    assert await shared_sandbox.settled(event) == await shared_sandbox.row(event)


async def test_a_type_that_nobody_handles_is_recorded_and_ignored(shared_sandbox: Sandbox, service: Service) -> None:
    """No handler for the type: processed, ignored, the reason names the type, and the row says so."""
    event = sample(type="customer.created")
    answer = await shared_sandbox.deliver(service, event)
    assert (answer.result, answer.reason) == (UNHANDLED, "Event type customer.created not handled")
    await shared_sandbox.settled(event, Status.IGNORED)


@pytest.mark.parametrize("event_type", ["invoice.payment_failed", "invoice.paid"])
async def test_a_handler_that_fails_and_then_works(event_type: str, shared_sandbox: Sandbox, service: Service) -> None:
    """Two failures, then one effect: recovery retries hours before Stripe would."""
    event = sample("fail", event_type, until=2)
    answer = await shared_sandbox.deliver(service, event)
    assert (answer.result, answer.reason) == (FAILED, "The handler failed; the event will be retried")
    row = await shared_sandbox.settled(event)
    assert row.counts == (3, 2, 0)
    assert row.last_error is None


async def test_stripes_retry_does_not_wait_for_our_backoff(shared_sandbox: Sandbox, service: Service) -> None:
    """Retry(after=60) leaves the row due in a minute, and a resent delivery takes it over at once."""
    event = sample("retry", until=1, after=60)
    assert (await shared_sandbox.deliver(service, event)).result == FAILED
    row = await shared_sandbox.settled(event, Status.FAILED)
    assert row.counts == (1, 1, 0)
    assert 0 < row.due_in_seconds <= 60
    await recovery_has_passed(shared_sandbox, service)
    assert (await shared_sandbox.row(event) or row).counts == (1, 1, 0), "recovery came before it was due"
    assert (await shared_sandbox.deliver(service, event)).result == PROCESSED
    assert (await shared_sandbox.settled(event)).counts == (2, 1, 0)


async def test_a_short_retry_is_recoverys(shared_sandbox: Sandbox, service: Service) -> None:
    """Retry(after=0.1) is completed without any further delivery."""
    event = sample("retry", until=1, after=0.1)
    assert (await shared_sandbox.deliver(service, event)).result == FAILED
    assert (await shared_sandbox.settled(event)).counts == (2, 1, 0)


@pytest.mark.parametrize(
    ("behaviour", "rule"),
    [
        ("commit", "a handler must not commit or roll back"),
        ("commit_and_go_on", ""),
        ("rollback", "a handler must not commit or roll back"),
        ("close", ""),
        ("exit", "a handler must not raise SystemExit"),
        ("cancel", "a handler must not end by cancelling itself"),
        ("bad_action", "a handler returns its action"),
    ],
)
async def test_a_broken_rule_fails_visibly(
    behaviour: str, rule: str, shared_sandbox: Sandbox, service: Service, tmp_path: Path
) -> None:
    """A rule broken: 500, the ledger names the rule, no effect; once the handler keeps it, one effect."""
    fixed = tmp_path / "fixed"
    event = sample(behaviour, fixed=str(fixed))
    assert (await shared_sandbox.deliver(service, event)).result == FAILED
    row = await shared_sandbox.row(event)
    assert row is not None
    assert row.failures >= 1
    assert row.last_error is not None
    assert rule in row.last_error
    assert await shared_sandbox.effects(event) == 0
    fixed.touch()
    row = await shared_sandbox.settled(event)
    assert row.attempt == row.failures + 1
    assert row.abandoned == 0


# -- over the deadline --------------------------------------------------------------------------------


async def test_handlers_over_their_deadline_fail_without_effect(sandbox: Sandbox, tmp_path: Path) -> None:
    """Over its deadline a handler has failed: hanging, deaf, in a statement without end, or late from a thread."""
    gate = tmp_path / "gate"
    service = sandbox.service({"lease_seconds": 1, "handler_deadline_seconds": 1.5, "idle_in_transaction_seconds": 3})
    await service.start()
    hanging = [sample("hang", until=1), sample("slow_sql", until=1)]
    late = [
        sample("stubborn", until=1, gate=str(gate)),
        sample("late", "invoice.paid", until=1, gate=str(gate)),
    ]
    events = [*hanging, *late]
    answers = await asyncio.gather(*(sandbox.deliver(service, event) for event in events))
    assert [answer.result for answer in answers] == [FAILED] * 4

    gate.touch()  # two went on after their deadline: now they write, on a transaction that is gone

    async def words() -> list[str]:
        return [path.read_text() for event in late if (path := tmp_path / event.id).exists()]

    assert "TimeoutError" in await eventually(words, lambda words: len(words) == len(late))
    for event in events:
        row = await sandbox.settled(event)
        # Mostly a failure; abandoned if recovery looked between the end of the transaction and the verdict.
        assert row.attempt == row.failures + row.abandoned + 1 == 2
