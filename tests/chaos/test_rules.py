"""Rows 27, 32 and 41: handlers that break the rules of the transaction they are given, and are found out."""

from pathlib import Path

import pytest

from firstclaim.status import Status
from tests.acceptance.harness import FAILED, IGNORED, PROCESSED, Overrides, eventually, recovery_has_passed, sample
from tests.chaos.actions import answered, dispatched
from tests.chaos.history import History
from tests.chaos.verdict import verdict

LEASE_SECONDS = 2.0


@pytest.mark.parametrize("behaviour", ["raw_commit", "raw_rollback_and_write"])
async def test_row_27_a_handler_that_ends_its_transaction(behaviour: str, history: History) -> None:
    """A raw COMMIT, or a raw ROLLBACK and then SQL: 500, dead with the rule's name, and not retried automatically."""
    service = await history.service().start()
    event = sample(behaviour)
    assert (await answered(history, service, event)).result == FAILED
    row = await history.sandbox.row(event)
    assert row is not None
    assert (row.status, row.counts) == (Status.DEAD, (1, 1, 0))
    assert "rule broken: a handler must not commit" in (row.last_error or "")

    await recovery_has_passed(history.sandbox, service)
    assert (await answered(history, service, event)).result == IGNORED
    assert await history.sandbox.row(event) == row
    assert await history.sandbox.effects(event) == 1, "what it committed is kept, and not doubled"
    assert dispatched(history, event) == [1]
    history.sandbox.waived.add(event.id)
    await verdict(history)


async def test_row_32_a_handler_that_swallows_an_sql_error(history: History, tmp_path: Path) -> None:
    """It returns normally on an aborted transaction: 500 and never processed, the rule is named, no effect."""
    # The next try is Stripe's here, so that each failure can be looked at.
    service = await history.service({"backoff_first_seconds": 60, "backoff_most_seconds": 60}).start()
    fixed = tmp_path / "fixed"
    event = sample("swallow", fixed=str(fixed))
    for failures in (1, 2):
        assert (await answered(history, service, event)).result == FAILED
        row = await history.sandbox.settled(event, Status.FAILED)
        assert row.counts == (failures, failures, 0)
        assert "rule broken: the handler swallowed an SQL error" in (row.last_error or "")

    fixed.touch()
    assert (await answered(history, service, event)).result == PROCESSED
    assert (await history.sandbox.settled(event)).counts == (3, 2, 0)
    await verdict(history)


@pytest.mark.parametrize("event_type", ["invoice.payment_failed", "invoice.paid"])
async def test_row_41_a_handler_that_commits_and_goes_on(event_type: str, history: History) -> None:
    """A raw COMMIT and then two leases of work, async or in a thread: dead meanwhile, one effect, and not run again."""
    limits: Overrides = {"lease_seconds": LEASE_SECONDS, "handler_deadline_seconds": 4 * LEASE_SECONDS}
    first, second = [await history.service(limits).start() for _ in range(2)]
    event = sample("raw_commit_and_go_on", event_type, seconds=2 * LEASE_SECONDS)
    answer = await answered(history, first, event)
    assert (answer.result, answer.seconds < LEASE_SECONDS) == (FAILED, True)

    async def two_leases_later() -> bool:
        row = await history.sandbox.row(event)
        return row is not None and row.due_in_seconds < -LEASE_SECONDS

    await eventually(two_leases_later)
    for service in (first, second):
        await recovery_has_passed(history.sandbox, service)
        assert (await answered(history, service, event)).result == IGNORED
    row = await history.sandbox.row(event)
    assert row is not None
    assert (row.status, row.counts) == (Status.DEAD, (1, 1, 0))
    assert "rule broken: a handler must not commit" in (row.last_error or "")
    assert await history.sandbox.effects(event) == 1, "what it committed is kept, and neither repeated nor added to"
    assert dispatched(history, event) == [1]
    history.sandbox.waived.add(event.id)
    await verdict(history)
