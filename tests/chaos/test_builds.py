"""Row 42: a rolling deploy. Two builds with different handlers on one ledger and one Redis.

Each build handles a type that the other does not know (`tests.chaos.old_build`, `tests.chaos.new_build`). The build
without a handler may acknowledge an event of the other, but never settles it.
"""

import asyncio
import operator
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from firstclaim.status import Status
from tests.acceptance.harness import (
    DEFERRED,
    FAILED,
    IGNORED,
    PROCESSED,
    UNHANDLED,
    Overrides,
    Sample,
    Service,
    eventually,
    recovery_has_passed,
    sample,
)
from tests.chaos.actions import deliver_at_once, dispatched, rounds
from tests.chaos.history import TRACED_HANDLERS, History
from tests.chaos.load import repeated
from tests.chaos.new_build import ADDED
from tests.chaos.old_build import DROPPED
from tests.chaos.verdict import verdict
from tests.clock import Clock

OLD: Overrides = {"handlers": f"{TRACED_HANDLERS},tests.chaos.old_build"}
NEW: Overrides = {"handlers": f"{TRACED_HANDLERS},tests.chaos.new_build"}
SLOTS = 5
# An answer comes while the handlers still run, and a vanished process is detected soon.
SLOW: Overrides = {"handler_slots": SLOTS, "answer_budget_seconds": 3, "lease_seconds": 2, "lock_ttl_seconds": 2}
ACKNOWLEDGED = 40
FAILING = 20
ROUNDS = 3


async def deployed(history: History, settings: Overrides | None = None) -> tuple[Service, Service]:
    """A service of the old build and one of the new build; both have opened their connections."""
    old, new = (history.service((settings or {}) | build) for build in (OLD, NEW))
    await asyncio.gather(old.start(), new.start())
    assert await said(history, old, [sample(type=DROPPED)]) == {PROCESSED: 1}
    assert await said(history, new, [sample(type=ADDED)]) == {PROCESSED: 1}
    return old, new


async def said(history: History, service: Service, events: Sequence[Sample]) -> Counter[tuple[int, bool, str]]:
    """The results of one delivery of each event, all at the same moment."""
    answers = await deliver_at_once(history, [(service, event) for event in events])
    return Counter(answer.result for answer in answers)


async def recovered_on(*services: Service) -> None:
    """Wait for some more rounds of recovery in each service."""
    for service in services:
        goal = await rounds(service) + ROUNDS
        await eventually(partial(rounds, service), partial(operator.le, goal))


async def statuses(history: History, events: Sequence[Sample]) -> set[Status | None]:
    """What the ledger says of these events now."""
    rows = [await history.sandbox.row(event) for event in events]
    return {None if row is None else row.status for row in rows}


async def test_row_42_acknowledged_by_the_new_build(history: History, tmp_path: Path) -> None:
    """40 slow events are acknowledged; duplicates reach the old build while both recover: each completes once."""
    old, new = await deployed(history, SLOW)
    gate = tmp_path / "gate"
    slow = [sample("hold", ADDED, gate=str(gate)) for _ in range(ACKNOWLEDGED)]
    assert await said(history, new, slow) == {DEFERRED: ACKNOWLEDGED}
    await recovered_on(old, new)

    # By the marker, where there is one; else by the row.
    assert (await said(history, old, slow)).keys() <= {IGNORED, DEFERRED}
    history.sandbox.empty_redis()
    assert await said(history, old, slow) == {DEFERRED: ACKNOWLEDGED}
    await recovered_on(old, new)
    assert Status.IGNORED not in await statuses(history, slow)

    seen: Counter[tuple[int, bool, str]] = Counter()

    async def duplicates() -> None:
        seen.update(await said(history, old, slow))

    async with repeated(duplicates, 0.2):
        gate.touch()
        await history.sandbox.all_settled(slow)
    assert seen.keys() <= {IGNORED, DEFERRED}
    rows = (await verdict(history)).rows
    assert {rows[event.id].status for event in slow} == {Status.COMPLETED}
    assert all(rows[event.id].failures == 0 for event in slow)


async def test_row_42_a_retry_reaches_the_old_build(history: History, clock: Clock) -> None:
    """20 events fail on the new build; the old one answers their retry with 202, or the new one handles it."""
    backoff_seconds = 60.0
    waiting: Overrides = {"backoff_first_seconds": backoff_seconds, "backoff_most_seconds": backoff_seconds}
    old, new = await deployed(history, waiting)
    failing = [sample("fail", ADDED, until=1) for _ in range(FAILING)]
    assert await said(history, new, failing) == {FAILED: FAILING}

    to_old, to_new = failing[: FAILING // 2], failing[FAILING // 2 :]
    assert await said(history, old, to_old) == {DEFERRED: len(to_old)}
    assert await said(history, new, to_new) == {PROCESSED: len(to_new)}
    await recovered_on(old, new)
    assert await statuses(history, to_old) == {Status.FAILED}, "nothing is due yet"

    await clock.advance(backoff_seconds)
    for row in await history.sandbox.all_settled(failing):
        assert row.counts == (2, 1, 0)
    assert await said(history, old, failing) == {IGNORED: FAILING}
    await verdict(history)


async def test_row_42_only_the_old_build_saw_it(history: History) -> None:
    """It is ignored, and stays so in every recovery; a resend to the new build completes it once."""
    old, new = await deployed(history)
    resent, forgotten = ([sample(type=ADDED) for _ in range(10)] for _ in range(2))
    assert await said(history, old, resent + forgotten) == {UNHANDLED: 20}
    await recovered_on(old, new)
    assert await statuses(history, resent + forgotten) == {Status.IGNORED}

    assert await said(history, new, resent) == {PROCESSED: len(resent)}
    for service in (old, new):
        assert await said(history, service, resent) == {IGNORED: len(resent)}
    assert [row.counts for row in await history.sandbox.all_settled(resent)] == [(2, 0, 0)] * len(resent)
    await verdict(history)
    assert await statuses(history, forgotten) == {Status.IGNORED}
    assert all(not dispatched(history, event) for event in forgotten)


async def test_row_42_rolled_back(history: History, tmp_path: Path) -> None:
    """The new build is killed: the old one alone leaves its events pending, and the new one finishes them later."""
    old, new = await deployed(history, SLOW)
    gate = tmp_path / "gate"
    held = [sample("hold", ADDED, gate=str(gate)) for _ in range(4 * SLOTS)]
    assert await said(history, new, held) == {DEFERRED: len(held)}
    await new.kill()
    gate.touch()

    # What the killed process had claimed is abandoned: the old build makes it due again, and takes none of it.
    await eventually(lambda: statuses(history, held), lambda seen: seen == {Status.PENDING})
    history.sandbox.empty_redis()
    assert await said(history, old, held) == {DEFERRED: len(held)}
    await recovery_has_passed(history.sandbox, old)
    assert await statuses(history, held) == {Status.PENDING}
    before = [dispatched(history, event) for event in held]

    await new.start()
    rows = await history.sandbox.all_settled(held)
    abandoned = [row.abandoned for row in rows]
    assert max(abandoned) == 1
    assert SLOTS <= sum(abandoned) <= 2 * SLOTS, "those in the slots, and at most as many that waited for one"
    assert [dispatched(history, event)[:-1] for event in held] == before, "once more each, in the new build"
    await verdict(history)
