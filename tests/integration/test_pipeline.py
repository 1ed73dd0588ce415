"""The one path, on real stores: deliveries, duplicates, outages, recovery and the graceful stop."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

import pytest
from sqlalchemy import Engine
from sqlalchemy import event as sqlalchemy_event

from firstclaim import Context, Event
from firstclaim.errors import LedgerUnavailable
from firstclaim.event import Delivery, parse_event
from firstclaim.inbox import backlog
from firstclaim.inbox.claim import Claim
from firstclaim.inbox.due import Survey
from firstclaim.inbox.existing_row import ExistingRow
from firstclaim.inbox.ledger import Ledger, Recorded
from firstclaim.inbox.lock import Lock, LockReply
from firstclaim.inbox.pipeline import Pipeline
from firstclaim.inbox.recovery import Recovery
from firstclaim.inbox.redis_server import RedisServer
from firstclaim.inbox.slots import Place
from firstclaim.outcome import Kind, Outcome
from firstclaim.postgres.connection import PinnedConnection
from firstclaim.postgres.handler_connections import HandlerConnection
from firstclaim.postgres.statement import Statement
from firstclaim.status import Status
from tests import operator
from tests.fixtures import event_body
from tests.integration.conftest import MakeWorld
from tests.integration.world import World, build, delivery, effect, until
from tests.proxy import Mode, Proxy, before_postgres, before_redis
from tests.stores import Stores

TYPE = "invoice.payment_failed"


async def handles(event: Event, context: Context) -> str:
    await effect(event, context)
    return "payment_failure_recorded"


async def raises(event: Event, context: Context) -> None:
    await effect(event, context)
    raise RuntimeError("boom")


@pytest.fixture
async def world(make_world: MakeWorld) -> World:
    """One process with a handler that works."""
    return await make_world({TYPE: handles})


class Gate:
    """A handler that says when it runs, and goes on when told."""

    def __init__(self) -> None:
        self.running = asyncio.Event()
        self.finish = asyncio.Event()

    async def handle(self, event: Event, context: Context) -> str:
        await effect(event, context)
        self.running.set()
        await self.finish.wait()
        return "finished"


@pytest.fixture
def gate() -> Gate:
    return Gate()


def duplicate(event_id: str, words: str = "handled by parallel worker (idempotency lock)") -> Outcome:
    return Outcome(Kind.DUPLICATE, "ignored", f"Event {event_id} {words}")


async def settled(world: World, event_id: str, attempt: int = 1) -> None:
    """Completed by that attempt, one effect."""
    row = await world.row(event_id)
    assert (row["status"], row["attempt"]) == ("completed", attempt)
    assert await world.effects(event_id) == 1


async def recovered(world: World) -> None:
    """One round of recovery, and the work that it began."""
    await world.pipeline.recover()
    if world.pipeline._work.tasks:
        await asyncio.wait(world.pipeline._work.tasks)


def recovery_of(world: World, lease_seconds: float = 0) -> Recovery:
    """The loop of a process, whose rounds follow each other quickly."""
    epoch = world.claims._epoch
    return Recovery(
        world.pipeline, world.ledger, world.slots, epoch, interval_seconds=0.01, lease_seconds=lease_seconds, batch=10
    )


# -- deliveries ---------------------------------------------------------------------------------------


async def test_a_delivery_is_processed(world: World) -> None:
    """Both claims won, one effect, and a marker of the ledger's epoch."""
    given = delivery()
    result = await world.pipeline.deliver(given)
    assert result == Outcome(Kind.PROCESSED, "payment_failure_recorded", None, 1)
    await settled(world, given.event.id)
    assert await world.value(given.event.id) == f"recorded:{await world.ledger.read_epoch()}".encode()


async def test_a_duplicate_is_ignored_without_postgres(world: World) -> None:
    """After completion: one Redis command, no statement and no connection of either pool."""
    given = delivery()
    await world.pipeline.deliver(given)
    with counting(world) as counted:
        assert await world.pipeline.deliver(given) == duplicate(given.event.id)
    assert counted == ["SET"]
    await settled(world, given.event.id)


async def test_a_fresh_delivery_costs_what_it_must(world: World) -> None:
    """Lock and marker; insert, BEGIN and hold, the handler's own statement, mark and COMMIT: six round trips."""
    await world.pipeline.deliver(delivery())  # opens the connections
    with counting(world) as counted:
        await world.pipeline.deliver(delivery())
    assert counted == ["SET", "WITH", "EVAL", "begin SELECT", "INSERT", "commit WITH"]


@contextmanager
def counting(world: World) -> Iterator[list[str]]:
    """The first word of every command to Redis and every statement to Postgres, in order."""
    seen: list[str] = []

    def noting(owner: Any, method: str, patch: pytest.MonkeyPatch, prefix: str = "") -> None:
        whole = getattr(owner, method)

        def noted(self: Any, *arguments: Any, **options: Any) -> Any:
            seen.append(prefix + str(arguments[0]).split()[0].strip(";"))
            return whole(self, *arguments, **options)

        patch.setattr(owner, method, noted)

    def by_handler(*arguments: Any) -> None:
        seen.append(arguments[2].split()[0])

    sqlalchemy_event.listen(Engine, "before_cursor_execute", by_handler)
    with pytest.MonkeyPatch.context() as patch:
        noting(RedisServer, "call", patch)
        noting(PinnedConnection, "fetch", patch)
        noting(PinnedConnection, "execute", patch)
        noting(PinnedConnection, "begin", patch, "begin ")
        noting(PinnedConnection, "commit", patch, "commit ")
        yield seen
    sqlalchemy_event.remove(Engine, "before_cursor_execute", by_handler)


async def test_two_hundred_copies_at_once_are_one(make_world: MakeWorld) -> None:
    """Over two processes: one is processed, 199 are ignored, one effect."""
    worlds = [await make_world({TYPE: handles}) for _ in range(2)]
    given = delivery()
    results = await asyncio.gather(*(worlds[number % 2].pipeline.deliver(given) for number in range(200)))
    kinds = [result.kind for result in results]
    assert (kinds.count(Kind.PROCESSED), kinds.count(Kind.DUPLICATE)) == (1, 199)
    await settled(worlds[0], given.event.id)


async def test_two_hundred_copies_without_redis_values_are_one(make_world: MakeWorld) -> None:
    """The same with Redis emptied again and again under way: the ledger alone carries safety."""
    worlds = [await make_world({TYPE: handles}) for _ in range(2)]
    given = delivery()

    async def deliver(number: int) -> Outcome:
        world = worlds[number % 2]
        await world.redis.delete(world.lock._key(given.event.id))
        return await world.pipeline.deliver(given)

    kinds = [result.kind for result in await asyncio.gather(*map(deliver, range(200)))]
    assert kinds.count(Kind.PROCESSED) == 1
    assert set(kinds) == {Kind.PROCESSED, Kind.DUPLICATE}
    await settled(worlds[0], given.event.id)


async def test_with_redis_emptied_the_ledger_decides(world: World) -> None:
    """The row answers, in its own words, and the marker is written again."""
    given = delivery()
    await world.pipeline.deliver(given)
    await world.redis.delete(world.lock._key(given.event.id))
    assert await world.pipeline.deliver(given) == duplicate(given.event.id, "already completed")
    assert await world.value(given.event.id) == f"recorded:{await world.ledger.read_epoch()}".encode()
    await settled(world, given.event.id)


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (Status.COMPLETED, "already completed"),
        (Status.DEAD, "is dead: replay it"),
        (Status.PROCESSING, "handled by parallel worker (idempotency lock)"),
    ],
)
async def test_a_settled_or_owned_row_answers_for_itself(world: World, status: Status, words: str) -> None:
    """200 without a dispatch, and a marker, so that the next one does not ask the ledger."""
    given = await world.state_of(delivery(), status)
    assert await world.pipeline.deliver(given) == duplicate(given.event.id, words)
    assert await world.status(given.event.id) is status
    assert await world.value(given.event.id) is not None
    assert await world.effects(given.event.id) == 0


@pytest.mark.parametrize("status", [Status.PENDING, Status.FAILED])
async def test_a_delivery_takes_over_what_waits(world: World, status: Status) -> None:
    """Recorded by a delivery without the lock, or failed before: handled now, though it is due in an hour only."""
    given = await world.state_of(delivery(), status)
    await world.change(given.event.id, due_at=3600.0)
    assert (await world.pipeline.deliver(given)).kind is Kind.PROCESSED
    await settled(world, given.event.id)


async def test_a_failed_event_is_handled_by_its_next_delivery(make_world: MakeWorld) -> None:
    """A failure leaves no marker: Stripe's retry reaches the ledger, and is the second attempt."""
    broken, mended = await make_world({TYPE: raises}), await make_world({TYPE: handles})
    await mended.pipeline.deliver(delivery())  # from now on it knows the epoch: a marker would count
    given = delivery()
    assert (await broken.pipeline.deliver(given)).kind is Kind.FAILED
    assert await mended.pipeline.deliver(given) == Outcome(Kind.PROCESSED, "payment_failure_recorded", None, 2)
    await settled(mended, given.event.id, attempt=2)


@pytest.mark.parametrize("life", [5000, 20_000])
async def test_while_another_is_at_it_the_event_is_recorded(world: World, life: int) -> None:
    """Its lock is no promise: the row is, which it takes over, or which is due when its lock has run out."""
    given = delivery()
    await world.redis.set(world.lock._key(given.event.id), b"claimed:another", px=life)
    assert await world.pipeline.deliver(given) == duplicate(given.event.id)
    row = await world.row(given.event.id)
    assert (row["status"], row["attempt"]) == ("pending", 0)
    assert 0 < row["due_in"] <= 20
    assert await world.value(given.event.id) == b"claimed:another"
    # A third delivery, and recovery, do no more than the second.
    assert await world.pipeline.deliver(given) == duplicate(given.event.id)
    await world.change(given.event.id, due_at=-1.0)
    await recovered(world)
    assert await world.status(given.event.id) is Status.PENDING


async def test_while_another_is_at_it_a_settled_row_answers(world: World) -> None:
    """The lock of a late duplicate hides nothing."""
    given = await world.state_of(delivery(), Status.COMPLETED)
    await world.redis.set(world.lock._key(given.event.id), b"claimed:another", px=5000)
    assert await world.pipeline.deliver(given) == duplicate(given.event.id, "already completed")


async def test_the_lock_holder_meets_a_row_that_is_skipped(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded, and in recovery's hands at this very moment: a duplicate; somebody has it, so nobody is skipped."""
    given = await world.state_of(delivery(), Status.PENDING)
    async with world.locked(given.event.id):
        assert await world.pipeline.deliver(given) == duplicate(given.event.id)
    assert await world.status(given.event.id) is Status.PENDING
    await world.redis.delete(world.lock._key(given.event.id))
    await recovered(world)
    await settled(world, given.event.id)


# -- nobody wants it ----------------------------------------------------------------------------------


async def test_a_type_without_a_handler_is_ignored(world: World) -> None:
    """Settled in one statement, so that a later deploy can replay it; nothing in Redis answers its next delivery."""
    given = delivery(type="balance.available")
    result = await world.pipeline.deliver(given)
    assert result == Outcome(Kind.UNHANDLED, "ignored", "Event type balance.available not handled", 1)
    row = await world.row(given.event.id)
    assert (row["status"], row["action"]) == ("ignored", "ignored")
    assert await world.value(given.event.id) is None
    assert await world.pipeline.deliver(given) == duplicate(given.event.id, "already recorded as ignored")


async def test_a_copy_of_an_event_without_a_handler_is_told_so(world: World) -> None:
    """The first copy's result is known, so the answer of the second names it instead of a parallel worker."""
    given = delivery(type="balance.available")
    first, second = await asyncio.gather(*(world.pipeline.deliver(given) for _ in range(2)))
    assert first.kind is Kind.UNHANDLED
    assert second == duplicate(given.event.id, "already recorded as ignored")


@pytest.mark.parametrize(
    ("takes", "livemode", "kind"),
    [
        ("any", True, Kind.PROCESSED),
        ("any", False, Kind.PROCESSED),
        ("live", True, Kind.PROCESSED),
        ("live", False, Kind.UNHANDLED),
        ("test", True, Kind.UNHANDLED),
        ("test", False, Kind.PROCESSED),
    ],
)
async def test_only_the_wanted_mode_is_handled(make_world: MakeWorld, takes: str, livemode: bool, kind: Kind) -> None:
    """Live Connect endpoints get test events too: recorded as `ignored`; what another process recorded is left."""
    world = await make_world({TYPE: handles}, livemode=takes)
    given = delivery(livemode=livemode)
    result = await world.pipeline.deliver(given)
    assert result.kind is kind
    waiting = await world.state_of(delivery(livemode=livemode), Status.PENDING)
    await recovered(world)
    wanted = kind is Kind.PROCESSED
    for event_id in (given.event.id, waiting.event.id):
        assert await world.effects(event_id) == wanted
    assert await world.status(given.event.id) is (Status.COMPLETED if wanted else Status.IGNORED)
    assert await world.status(waiting.event.id) is (Status.COMPLETED if wanted else Status.PENDING)
    if not wanted:
        mode = "live" if livemode else "test"
        assert result.reason == f"Event {given.event.id} is a {mode} mode event; this service takes {takes} mode only"


# -- the budget ---------------------------------------------------------------------------------------


async def test_past_its_budget_a_recorded_event_is_deferred(make_world: MakeWorld, gate: Gate) -> None:
    """The row's COMMIT is known, so it is promised; the work goes on and completes."""
    world = await make_world({TYPE: gate.handle}, answer_budget_seconds=1)
    given = delivery()
    result = await world.pipeline.deliver(given)
    assert result == Outcome(Kind.DEFERRED, "deferred", "Recorded; still being processed")
    assert await world.status(given.event.id) is Status.PROCESSING
    assert await world.pipeline.deliver(given) == duplicate(given.event.id)
    await gate.running.wait()
    gate.finish.set()
    await until(lambda: ended(world, given.event.id))
    await settled(world, given.event.id)


async def test_past_its_budget_nothing_unrecorded_is_promised(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the insert's COMMIT is not known, the answer is a 503, though it may well be committed."""
    committed, go_on = asyncio.Event(), asyncio.Event()
    claim = Ledger.claim

    async def slow(ledger: Ledger, given: Delivery) -> Claim | ExistingRow:
        won = await claim(ledger, given)
        committed.set()
        await go_on.wait()
        return won

    monkeypatch.setattr(Ledger, "claim", slow)
    world = await make_world({TYPE: handles}, answer_budget_seconds=0.1)
    given = delivery()
    async with asyncio.timeout(10):
        assert await world.pipeline.deliver(given) == Outcome(Kind.UNAVAILABLE, "unavailable", "Not recorded in time")
    await committed.wait()
    go_on.set()
    await until(lambda: has_status(world, given.event.id, Status.COMPLETED))


async def test_a_duplicate_does_not_wait_for_a_running_handler(make_world: MakeWorld, gate: Gate) -> None:
    """The ledger is asked, and answers at once: the handler's transaction has locked the row, and changes it last."""
    world = await make_world({TYPE: gate.handle})
    given = delivery()
    first = asyncio.create_task(world.pipeline.deliver(given))
    await gate.running.wait()
    await world.redis.delete(world.lock._key(given.event.id))
    try:
        async with asyncio.timeout(10):
            assert await world.pipeline.deliver(given) == duplicate(given.event.id)
    finally:
        gate.finish.set()
    assert (await first).kind is Kind.PROCESSED


async def test_a_client_that_hangs_up_cancels_nothing(make_world: MakeWorld, gate: Gate) -> None:
    """The work is not the request's: cancelled in the middle, the delivery is completed all the same."""
    world = await make_world({TYPE: gate.handle})
    given = delivery()
    request = asyncio.create_task(world.pipeline.deliver(given))
    await gate.running.wait()
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    gate.finish.set()
    await until(lambda: ended(world, given.event.id))
    await settled(world, given.event.id)


async def test_slow_handlers_do_not_starve_recording(make_world: MakeWorld, gate: Gate) -> None:
    """Every handler slot is taken, for long: claiming and recording have connections of their own."""
    world = await make_world({TYPE: gate.handle}, handler_slots=2, ingest_connections=2)
    slow = [asyncio.create_task(world.pipeline.deliver(delivery())) for _ in range(2)]
    held = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state = 'idle in transaction'"

    async def all_held() -> bool:
        return bool(await world.database.fetchval(held) == len(slow))

    await until(all_held)
    try:
        async with asyncio.timeout(10):
            assert isinstance(await world.ledger.record(delivery(), due_in_seconds=0), Recorded)
    finally:
        gate.finish.set()
        await asyncio.wait(slow)


async def has_status(world: World, event_id: str, status: Status) -> bool:
    return await world.status(event_id) is status


async def ended(world: World, event_id: str) -> bool:
    return await world.status(event_id) is not Status.PROCESSING


# -- a store is away ----------------------------------------------------------------------------------


@asynccontextmanager
async def between(
    stores: Stores, database_url: str, prefix: str, **settings: Any
) -> AsyncIterator[tuple[World, Proxy, Proxy]]:
    """A process with a proxy before each store, Postgres' first."""
    async with before_postgres(database_url) as (postgres, url), before_redis(stores.redis_url) as (redis, redis_url):
        world = await build(url, redis_url, prefix, {TYPE: handles}, **settings)
        try:
            yield world, postgres, redis
        finally:
            for proxy in (postgres, redis):
                proxy.switch(Mode.OPEN)
            await world.close()


@pytest.mark.parametrize("mode", [Mode.REFUSE, Mode.FROZEN, Mode.MUTE])
async def test_while_redis_is_away_events_are_recorded(
    stores: Stores, make_world: MakeWorld, redis_prefix: str, mode: Mode
) -> None:
    """Acceptance does not wait, dispatch does: deferred; nothing is handled, by recovery neither, until it is back."""
    observer = await make_world()
    async with between(stores, observer.url, redis_prefix, redis_timeout_seconds=0.1, redis_breaker_seconds=0.05) as (
        world,
        _,
        redis,
    ):
        redis.switch(mode)
        given = [delivery() for _ in range(5)]
        for each in given:
            async with asyncio.timeout(5):
                result = await world.pipeline.deliver(each)
            assert result == Outcome(Kind.DEFERRED, "deferred", "Recorded; dispatched when Redis is reachable again")
            row = await observer.row(each.event.id)
            assert (row["status"], row["attempt"], row["abandoned"]) == ("pending", 0, 0)
            assert row["due_in"] <= 0
        await world.pipeline.recover()
        for each in given:
            row = await observer.row(each.event.id)
            assert (row["status"], row["attempt"], row["abandoned"]) == ("pending", 0, 0)
            assert await observer.effects(each.event.id) == 0
        redis.switch(Mode.OPEN)

        async def all_settled() -> bool:
            await world.pipeline.recover()
            return all([await has_status(observer, each.event.id, Status.COMPLETED) for each in given])

        await until(all_settled)
        for each in given:
            await settled(observer, each.event.id)


async def test_recovery_rests_while_redis_is_known_to_be_away(
    stores: Stores, make_world: MakeWorld, redis_prefix: str
) -> None:
    """More due events than slots, and still no next round at once: nothing could be claimed in it."""
    observer = await make_world()
    async with between(stores, observer.url, redis_prefix, redis_breaker_seconds=60) as (world, _, redis):
        redis.switch(Mode.REFUSE)
        for _ in range(world.settings.handler_slots + 1):
            assert (await world.pipeline.deliver(delivery())).kind is Kind.DEFERRED
        assert await world.pipeline.recover() is False


async def test_while_redis_is_away_a_settled_row_answers(
    stores: Stores, make_world: MakeWorld, redis_prefix: str
) -> None:
    """A duplicate is a duplicate, by the row; one that waits is deferred and changed in nothing."""
    observer = await make_world()
    done = await observer.state_of(delivery(), Status.COMPLETED)
    owned = await observer.state_of(delivery(), Status.PROCESSING)
    failed = await observer.state_of(delivery(), Status.FAILED)
    await observer.change(failed.event.id, due_at=3600.0)
    async with between(stores, observer.url, redis_prefix) as (world, _, redis):
        redis.switch(Mode.REFUSE)
        assert await world.pipeline.deliver(done) == duplicate(done.event.id, "already completed")
        assert await world.pipeline.deliver(owned) == duplicate(owned.event.id)
        assert (await world.pipeline.deliver(failed)).kind is Kind.DEFERRED
    row = await observer.row(failed.event.id)
    assert (row["status"], row["due_in"] > 3000) == ("failed", True)


@pytest.mark.parametrize("mode", [Mode.REFUSE, Mode.FROZEN, Mode.MUTE])
async def test_while_postgres_is_away_nothing_is_promised(
    stores: Stores, make_world: MakeWorld, redis_prefix: str, mode: Mode
) -> None:
    """503 in time and no lock is left behind: the next delivery, once it is back, is handled at once."""
    observer = await make_world()
    async with between(stores, observer.url, redis_prefix, postgres_timeout_seconds=0.5) as (world, postgres, _):
        assert (await world.pipeline.deliver(delivery())).kind is Kind.PROCESSED  # the pools have connections
        postgres.switch(mode)
        given = delivery()
        async with asyncio.timeout(5):
            result = await world.pipeline.deliver(given)
        assert result == Outcome(Kind.UNAVAILABLE, "unavailable", "The ledger cannot be reached")
        assert await world.value(given.event.id) is None
        with pytest.raises(LedgerUnavailable):
            await world.pipeline.recover()
        postgres.switch(Mode.OPEN)

        async def handled() -> bool:
            # What was held back reaches the server now: a row may be there, claimed by nobody who knows.
            await world.pipeline.deliver(given)
            await observer.database.execute(
                "UPDATE firstclaim.stripe_events SET due_at = now() WHERE status IN ('processing', 'pending')"
            )
            with suppress(LedgerUnavailable):  # the probe has not been answered yet
                await world.pipeline.return_abandoned(10)
                await recovered(world)
            status = "SELECT status FROM firstclaim.stripe_events WHERE event_id = $1"  # no row: nothing took it yet
            return bool(await observer.database.fetchval(status, given.event.id) == Status.COMPLETED)

        await until(handled)
        assert await observer.effects(given.event.id) == 1


async def test_a_lost_answer_to_the_insert_is_not_a_promise(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Committed, and nobody told us: 503 and no marker; the row waits out its lease, and one effect comes of it."""
    claim = Ledger.claim

    async def lost(ledger: Ledger, given: Delivery) -> Claim | ExistingRow:
        await claim(ledger, given)
        raise LedgerUnavailable("lost")

    await world.pipeline.deliver(delivery())  # from now on the epoch is known: a marker could be written
    given = delivery()
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "claim", lost)
        assert (await world.pipeline.deliver(given)).kind is Kind.UNAVAILABLE
    assert await world.value(given.event.id) is None
    assert await world.pipeline.deliver(given) == duplicate(given.event.id)
    await world.change(given.event.id, due_at=-1.0)
    await world.pipeline.return_abandoned(10)
    await world.change(given.event.id, due_at=-1.0)
    await recovered(world)
    await settled(world, given.event.id, attempt=2)


async def test_a_marker_that_cannot_be_written_changes_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Redis goes away between lock and marker: the row is committed, so the event is handled."""
    acquire = world.lock.acquire

    async def then_away(*arguments: Any, **more: Any) -> LockReply:
        reply = await acquire(*arguments, **more)
        monkeypatch.setattr(type(world.lock._servers), "unreachable", True)
        return reply

    monkeypatch.setattr(world.lock, "acquire", then_away)
    given = delivery()
    assert (await world.pipeline.deliver(given)).kind is Kind.PROCESSED
    await settled(world, given.event.id)


async def test_a_fault_of_ours_is_a_503(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever breaks on the way, nothing is promised that is not so, and the lock is gone again."""

    async def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("bug")

    given = delivery()
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "claim", broken)
        assert await world.pipeline.deliver(given) == Outcome(Kind.UNAVAILABLE, "unavailable", "Internal error")
    assert await world.value(given.event.id) is None
    assert (await world.pipeline.deliver(given)).kind is Kind.PROCESSED


# -- the ledger is another ----------------------------------------------------------------------------


async def test_after_a_restore_markers_of_the_old_ledger_do_not_count(world: World) -> None:
    """Redis says `recorded`, the restored ledger knows nothing: with the epoch rotated, it is recorded again."""
    given = delivery()
    await world.pipeline.deliver(given)
    await world.database.execute(
        "DELETE FROM firstclaim.stripe_events; DELETE FROM firstclaim.stripe_event_payloads; DELETE FROM effects"
    )
    assert await world.pipeline.deliver(given) == duplicate(given.event.id)  # nobody has told us
    await operator.rotate(world.url)
    world.claims._epoch.confirm(await world.ledger.read_epoch())  # what a round of recovery does
    assert (await world.pipeline.deliver(given)).kind is Kind.PROCESSED
    await settled(world, given.event.id)


async def test_after_a_rotation_markers_count_again(world: World) -> None:
    """The connections of both pools are renewed: what they commit is marked with the new epoch, and sheds load."""
    await world.pipeline.deliver(delivery())
    await operator.rotate(world.url)
    world.claims._epoch.confirm(await world.ledger.read_epoch())
    given = delivery()
    assert (await world.pipeline.deliver(given)).kind is Kind.PROCESSED
    with counting(world) as counted:
        assert await world.pipeline.deliver(given) == duplicate(given.event.id)
    assert counted == ["SET"]


async def test_no_marker_counts_without_a_confirmed_epoch(world: World) -> None:
    """Postgres has not been heard of for a while (it may be being restored): the ledger is asked, not Redis."""
    given = delivery()
    await world.pipeline.deliver(given)
    world.claims._epoch._confirmed = float("-inf")
    assert await world.pipeline.deliver(given) == duplicate(given.event.id, "already completed")


async def test_the_marker_is_of_the_ledger_that_committed_the_row(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another epoch is confirmed while the row is inserted: it may not be in that ledger, so no marker says it is."""
    claim = Ledger.claim

    async def then_restored(ledger: Ledger, given: Delivery) -> Claim | ExistingRow:
        won = await claim(ledger, given)
        world.claims._epoch.confirm("0123456789abcdef")
        return won

    given = delivery()
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "claim", then_restored)
        await world.pipeline.deliver(given)
    assert await world.value(given.event.id) == f"recorded:{await world.ledger.read_epoch()}".encode()


# -- recovery -----------------------------------------------------------------------------------------


async def test_recovery_completes_what_is_due(world: World) -> None:
    """Pending and failed, over any marker; what is not due waits."""
    due = [await world.state_of(delivery(), status) for status in (Status.PENDING, Status.FAILED)]
    later = await world.state_of(delivery(), Status.FAILED)
    await world.change(later.event.id, due_at=3600.0)
    epoch = await world.ledger.read_epoch()
    await world.redis.set(world.lock._key(due[0].event.id), f"recorded:{epoch}", px=5000)
    await recovered(world)
    for each in due:
        await settled(world, each.event.id)
        assert await world.value(each.event.id) == f"recorded:{epoch}".encode()
    assert await world.status(later.event.id) is Status.FAILED


async def test_recovery_leaves_anothers_live_lock_alone(world: World) -> None:
    """Somebody is between lock and row: that delivery will take the row over."""
    given = await world.state_of(delivery(), Status.PENDING)
    await world.redis.set(world.lock._key(given.event.id), b"claimed:another", px=5000)
    await recovered(world)
    assert await world.status(given.event.id) is Status.PENDING
    assert await world.value(given.event.id) == b"claimed:another"


async def test_a_stale_lock_delays_recovery_until_it_ends(make_world: MakeWorld) -> None:
    """Found just before its end, it costs what was left of it, and not its whole TTL once more."""
    world = await make_world({TYPE: handles}, lock_ttl_seconds=600.0)
    given = await world.state_of(delivery(), Status.PENDING)
    await world.redis.set(world.lock._key(given.event.id), b"claimed:another", px=400)
    await recovered(world)
    assert await world.status(given.event.id) is Status.PENDING

    async def completed() -> bool:
        await recovered(world)
        return await world.status(given.event.id) is Status.COMPLETED

    await until(completed)


async def test_recovery_that_finds_redis_away_claims_nothing(
    stores: Stores, make_world: MakeWorld, redis_prefix: str
) -> None:
    """Nobody knew yet, so it is recovery that finds out: what is due stays as it is, for when the lock is back."""
    observer = await make_world()
    given = await observer.state_of(delivery(), Status.PENDING)
    async with between(stores, observer.url, redis_prefix) as (world, _, redis):
        redis.switch(Mode.REFUSE)
        await recovered(world)
        assert world.lock.unreachable
    row = await observer.row(given.event.id)
    assert (row["status"], row["attempt"]) == ("pending", 0)


async def test_a_row_that_recovery_does_not_get_is_unlocked_again(world: World) -> None:
    """Locked in Redis and not taken in the ledger: the lock is given back at once."""
    given = await world.state_of(delivery(), Status.PENDING)
    async with world.locked(given.event.id):
        await recovered(world)
    assert await world.value(given.event.id) is None


async def test_recovery_fetches_no_more_than_it_has_slots(make_world: MakeWorld, gate: Gate) -> None:
    """Of ten due events as many as can start; the others stay pending, for whoever has room, uncharged."""
    world = await make_world({TYPE: gate.handle}, handler_slots=3)
    for _ in range(10):
        await world.state_of(delivery(), Status.PENDING)
    assert await world.pipeline.recover() is True
    await gate.running.wait()
    claimed = "SELECT count(*) FROM firstclaim.stripe_events WHERE status = 'processing'"
    assert await world.database.fetchval(claimed) == 3
    assert await world.pipeline.recover() is True
    assert await world.database.fetchval(claimed) == 3
    gate.finish.set()

    async def none_left() -> bool:
        await world.pipeline.recover()
        return not await world.database.fetchval(
            "SELECT count(*) FROM firstclaim.stripe_events WHERE status <> 'completed'"
        )

    await until(none_left)
    assert await world.pipeline.recover() is False
    assert await world.database.fetchval("SELECT max(failures + abandoned) FROM firstclaim.stripe_events") == 0


async def test_recovery_fetches_no_more_than_deliveries_have_left(
    make_world: MakeWorld, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deliveries that come while recovery looks take all places: it claims nothing, and the process has no more."""
    world = await make_world({TYPE: gate.handle}, handler_slots=3)
    for _ in range(10):
        await world.state_of(delivery(), Status.PENDING)
    look = world.pipeline._backlog.look
    taken: list[Place] = []

    async def look_slowly(count: int, survey: Survey | None, **options: Any) -> list[str]:
        seen = await look(count, survey, **options)
        while (place := world.slots.reserve()) is not None:
            taken.append(place)
        return seen

    monkeypatch.setattr(world.pipeline._backlog, "look", look_slowly)
    assert await world.pipeline.recover() is True
    assert len(taken) == 2 * world.slots.size
    claimed = "SELECT count(*) FROM firstclaim.stripe_events WHERE status = 'processing'"
    assert await world.database.fetchval(claimed) == 0
    monkeypatch.undo()
    for place in taken:
        place.release()
    gate.finish.set()
    assert await world.pipeline.recover() is True


async def test_two_recoveries_do_not_double(make_world: MakeWorld) -> None:
    """Every process runs it, and all of them look at the same rows."""
    worlds = [await make_world({TYPE: handles}) for _ in range(3)]
    given = [await worlds[0].state_of(delivery(), Status.PENDING) for _ in range(30)]

    async def none_left() -> bool:
        await asyncio.gather(*map(recovered, worlds))
        return not await worlds[0].database.fetchval(
            "SELECT count(*) FROM firstclaim.stripe_events WHERE status <> 'completed'"
        )

    await until(none_left)
    for each in given:
        await settled(worlds[0], each.event.id)


async def test_recovery_takes_those_abandoned_before_one_by_one(make_world: MakeWorld, gate: Gate) -> None:
    """Beside the others, and the next only when that one has ended."""
    world = await make_world({TYPE: gate.handle})
    abandoned_before = [await world.state_of(delivery(), Status.PENDING) for _ in range(3)]
    for each in abandoned_before:
        await world.change(each.event.id, abandoned=1)
    for _ in range(3):
        await world.pipeline.recover()
    claimed = "SELECT count(*) FROM firstclaim.stripe_events WHERE status = 'processing'"
    assert await world.database.fetchval(claimed) == 1
    gate.finish.set()
    for _ in abandoned_before:
        await recovered(world)
    for each in abandoned_before:
        await settled(world, each.event.id)


async def test_an_abandoned_event_does_not_wait_for_the_backlog(make_world: MakeWorld, gate: Gate) -> None:
    """Under a backlog that fills every slot, one that was abandoned is taken up too, for its one place."""
    world = await make_world({TYPE: gate.handle}, handler_slots=2)
    for _ in range(6):
        await world.state_of(delivery(), Status.PENDING)
    suspect = await world.state_of(delivery(), Status.PENDING)
    await world.change(suspect.event.id, abandoned=1)
    assert await world.pipeline.recover() is True
    assert await world.status(suspect.event.id) is Status.PROCESSING
    assert (
        await world.database.fetchval("SELECT count(*) FROM firstclaim.stripe_events WHERE status = 'processing'") == 2
    )
    gate.finish.set()


async def test_an_abandoned_event_comes_back(world: World) -> None:
    """Its holder vanished: returned, and after its backoff handled by the next attempt."""
    claim = await world.claim()
    await world.change(claim.event_id, due_at=-1.0)
    await world.pipeline.return_abandoned(10)
    await recovered(world)
    assert await world.status(claim.event_id) is Status.PENDING  # its backoff is not over
    await world.change(claim.event_id, due_at=-1.0)
    await recovered(world)
    await settled(world, claim.event_id, attempt=2)
    assert (await world.row(claim.event_id))["abandoned"] == 1


async def test_an_expired_payload_is_dead(world: World) -> None:
    """It cannot be dispatched any more, and says so; a delivery, which brings the payload, still could."""
    given = await world.state_of(delivery(), Status.PENDING)
    await world.database.execute("DELETE FROM firstclaim.stripe_event_payloads")
    await recovered(world)
    row = await world.row(given.event.id)
    assert (row["status"], row["last_error"]) == ("dead", "its payload has expired: it cannot be dispatched")


async def test_an_unreadable_payload_is_dead(world: World) -> None:
    """Accepted by an earlier build, refused by this one: an operator has to look; other events are not held up."""
    bad, good = [await world.state_of(delivery(), Status.PENDING) for _ in range(2)]
    await world.database.execute(
        "UPDATE firstclaim.stripe_event_payloads SET body = '{' WHERE event_id = $1", bad.event.id
    )
    await recovered(world)
    row = await world.row(bad.event.id)
    assert (row["status"], row["last_error"]) == ("dead", "its payload cannot be read: body is not valid JSON")
    await settled(world, good.event.id)


async def test_a_replay_is_done_by_recovery(make_world: MakeWorld) -> None:
    """Dead, or ignored by an earlier deploy: made due, and handled by the next attempt."""
    old, new = await make_world(), await make_world({TYPE: handles})
    given = delivery()
    assert (await old.pipeline.deliver(given)).kind is Kind.UNHANDLED
    await recovered(new)
    assert await new.status(given.event.id) is Status.IGNORED
    assert await operator.replay(new.url, [given.event.id]) == [given.event.id]

    async def handled() -> bool:
        await recovered(new)
        return await new.status(given.event.id) is Status.COMPLETED

    await until(handled)  # on a busy machine the first look was slow: the next ones do not look for new types at once
    await settled(new, given.event.id, attempt=2)


async def test_a_bad_round_does_not_end_recovery(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a restarted server nor a bug on the way ends the loop; when it can, it goes on."""
    given = await world.state_of(delivery(), Status.PENDING)
    errors: list[Exception] = [LedgerUnavailable("away"), RuntimeError("bug"), LedgerUnavailable("away")]
    recover = Pipeline.recover

    async def failing(pipeline: Pipeline, survey: Survey | None) -> bool:
        if errors:
            raise errors.pop()
        return await recover(pipeline, survey)

    monkeypatch.setattr(Pipeline, "recover", failing)
    recovery = Recovery(
        world.pipeline, world.ledger, world.slots, world.claims._epoch, interval_seconds=0.01, lease_seconds=0, batch=10
    )
    running = asyncio.create_task(recovery.run())

    async def completed_or_over(event_id: str) -> bool:
        return running.done() or await has_status(world, event_id, Status.COMPLETED)

    try:
        await until(lambda: completed_or_over(given.event.id))
        assert not running.done()
        assert recovery.healthy
    finally:
        running.cancel()
        await asyncio.wait({running})
    await settled(world, given.event.id)


async def test_recovery_looks_for_vanished_holders(world: World) -> None:
    """Nobody else does: a claim past its lease, with no handler's lock on its row, is due again after a round."""
    claim = await world.claim()
    await world.change(claim.event_id, due_at=-1.0)
    recovery = Recovery(
        world.pipeline, world.ledger, world.slots, world.claims._epoch, interval_seconds=0.01, lease_seconds=0, batch=10
    )
    await recovery._round()
    row = await world.row(claim.event_id)
    assert (row["status"], row["abandoned"]) == ("pending", 1)


async def test_a_round_that_finds_nothing_is_one_statement(world: World) -> None:
    """A large fleet asks each server for little while nothing happens; settled and future events change nothing."""
    await world.pipeline.deliver(delivery())
    await world.claim()
    loop = recovery_of(world)
    await loop._round()
    loop._upkeep_at = 0
    with counting(world) as counted:
        await loop._round()
    assert counted == ["SELECT"]
    assert loop.healthy


async def test_recovery_confirms_the_epoch(world: World) -> None:
    """Each round reads it anew: without that no marker would count for long, and a rotation would go unnoticed."""
    recovery = Recovery(
        world.pipeline, world.ledger, world.slots, world.claims._epoch, interval_seconds=0.01, lease_seconds=0, batch=10
    )
    await world.ledger.read_epoch()
    world.claims._epoch._confirmed = float("-inf")  # not for a long time, and no connection is opened anew
    await recovery._round()
    before = world.claims._epoch.current
    assert before == await world.ledger.read_epoch()
    _, after = await operator.rotate(world.url)

    async def noticed() -> bool:
        await recovery._round()
        return world.claims._epoch.current == after

    await until(noticed)
    assert None is not after != before


# -- places and the backlog ---------------------------------------------------------------------------


async def test_a_delivery_without_a_place_is_recorded(make_world: MakeWorld, gate: Gate) -> None:
    """Twice as many claims as slots, and no more: the next one is pending, due now, uncharged, and has its marker."""
    world = await make_world({TYPE: gate.handle}, handler_slots=1)
    claimed = [asyncio.create_task(world.pipeline.deliver(delivery())) for _ in range(2)]
    processing = "SELECT count(*) = 2 FROM firstclaim.stripe_events WHERE status = 'processing'"
    await until(lambda: world.database.fetchval(processing))
    given = delivery()
    result = await world.pipeline.deliver(given)
    assert result == Outcome(Kind.DEFERRED, "deferred", "Recorded; dispatched when a handler slot is free")
    row = await world.row(given.event.id)
    assert (row["status"], row["attempt"], row["due_in"] <= 0) == ("pending", 0, True)
    assert await world.pipeline.deliver(given) == duplicate(given.event.id)
    gate.finish.set()
    await asyncio.gather(*claimed)
    await recovered(world)
    await settled(world, given.event.id)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (Status.PENDING, Kind.DEFERRED),
        (Status.FAILED, Kind.DEFERRED),
        (Status.IGNORED, Kind.UNAVAILABLE),
        (Status.COMPLETED, Kind.DUPLICATE),
    ],
)
async def test_without_a_place_a_known_event_is_answered_by_its_row(
    world: World, monkeypatch: pytest.MonkeyPatch, status: Status, kind: Kind
) -> None:
    """Nothing is changed; only a row that is owned or settled gets a marker."""
    monkeypatch.setattr(type(world.slots), "reserve", lambda _: None)
    given = await world.state_of(delivery(), status)
    assert (await world.pipeline.deliver(given)).kind is kind
    assert await world.status(given.event.id) is status
    assert (await world.value(given.event.id) is None) == (status is not Status.COMPLETED)


async def test_the_marker_of_a_queued_event_is_of_the_ledger_that_committed_its_row(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another epoch is confirmed while the row is inserted, as after a failover: that ledger may not have the row."""
    record = Ledger.record

    async def then_failed_over(ledger: Ledger, given: Delivery, *, due_in_seconds: float) -> Recorded | ExistingRow:
        row = await record(ledger, given, due_in_seconds=due_in_seconds)
        world.claims._epoch.confirm("0123456789abcdef")
        return row

    given = delivery()
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "record", then_failed_over)
        patch.setattr(type(world.slots), "reserve", lambda _: None)
        assert (await world.pipeline.deliver(given)).kind is Kind.DEFERRED
    assert await world.value(given.event.id) == f"recorded:{await world.ledger.read_epoch()}".encode()


async def test_recovery_is_woken_when_there_is_a_slot_for_what_was_queued(make_world: MakeWorld, gate: Gate) -> None:
    """It does not wait for its interval."""
    world = await make_world({TYPE: gate.handle}, handler_slots=1)
    loop = Recovery(
        world.pipeline, world.ledger, world.slots, world.claims._epoch, interval_seconds=600, lease_seconds=0, batch=10
    )
    began = loop._last_round
    running = asyncio.create_task(loop.run())

    async def sleeps() -> bool:
        return loop._last_round > began

    try:
        await until(sleeps)  # a round that found every slot taken would wait for a slot, not for its interval
        for _ in range(2):
            claimed = asyncio.create_task(world.pipeline.deliver(delivery()))
        await gate.running.wait()
        given = delivery()
        await until(lambda: queued(world, given))
        gate.finish.set()
        await claimed
        await until(lambda: has_status(world, given.event.id, Status.COMPLETED))
    finally:
        running.cancel()
        await asyncio.wait({running})


async def queued(world: World, given: Delivery) -> bool:
    """Delivered when both places were taken."""
    taken = await world.database.fetchval("SELECT count(*) FROM firstclaim.stripe_events WHERE status = 'processing'")
    return taken == 2 and (await world.pipeline.deliver(given)).kind is Kind.DEFERRED


async def test_rows_that_another_transaction_has_locked_hold_up_nobody(make_world: MakeWorld) -> None:
    """The oldest ten are under somebody's open UPDATE: the twenty behind them are handled, round after round."""
    world = await make_world({TYPE: handles}, handler_slots=2)
    stuck = [await world.state_of(delivery(), Status.FAILED) for _ in range(10)]
    for each in stuck:
        await world.change(each.event.id, due_at=-1000.0)
    others = [await world.state_of(delivery(), Status.PENDING) for _ in range(20)]
    async with world.locked(*(each.event.id for each in stuck)):

        async def handled() -> bool:
            await recovered(world)
            return all([await has_status(world, each.event.id, Status.COMPLETED) for each in others])

        await until(handled)
    assert {await world.status(each.event.id) for each in stuck} == {Status.FAILED}
    world.pipeline._backlog._left_out.clear()  # a lock's life later

    async def none_left() -> bool:
        await recovered(world)
        return all([await has_status(world, each.event.id, Status.COMPLETED) for each in stuck])

    await until(none_left)


async def rounds(world: World) -> int:
    """How often recovery looks again at once."""
    count = 1
    while await world.pipeline.recover():
        count += 1
        assert count < 100, "it looks again and again"
    return count


async def test_more_locked_rows_than_can_be_left_out(make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole table that somebody has locked is looked at again after a pause, and not at once without end."""
    monkeypatch.setattr(backlog, "_MAX_LEFT_OUT", 8)
    world = await make_world({TYPE: handles}, handler_slots=4)
    given = [(await world.state_of(delivery(), Status.PENDING)).event.id for _ in range(24)]
    async with world.locked(*given):
        assert await rounds(world) <= 4


@pytest.mark.parametrize(("whole", "looks"), [(True, 1), (False, 3)])
async def test_events_that_redis_neither_locks_nor_refuses(
    world: World, monkeypatch: pytest.MonkeyPatch, whole: bool, looks: int
) -> None:
    """Redis goes away during a round: recovery pauses, although more is due. A part of it: it tries each event once."""
    for _ in range(3 * world.slots.size):
        await world.state_of(delivery(), Status.PENDING)

    async def away(*_: object, **__: object) -> LockReply:
        monkeypatch.setattr(Lock, "unreachable", whole)
        return LockReply.UNREACHABLE

    monkeypatch.setattr(Lock, "acquire", away)
    assert await rounds(world) == looks


async def test_processes_that_look_at_once_rarely_try_the_same(make_world: MakeWorld) -> None:
    """Eight that see the same due events at the same moment, each with one slot, win most of their tries."""
    worlds = [await make_world({TYPE: handles}, handler_slots=1) for _ in range(8)]
    for _ in range(64):
        await worlds[0].state_of(delivery(), Status.PENDING)
    rounds = 4
    for _ in range(rounds):
        await asyncio.gather(*(world.pipeline.recover() for world in worlds))
        await until(lambda: are_idle(worlds))
    taken = await worlds[0].database.fetchval("SELECT count(*) FROM firstclaim.stripe_events WHERE attempt > 0")
    assert taken > rounds * len(worlds) / 2


async def are_idle(worlds: Sequence[World]) -> bool:
    """No event is in progress in any of these."""
    return all(world.slots.free for world in worlds)


async def test_looks_between_full_ones_begin_where_the_last_found_something(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So finished rows that an old snapshot keeps in the index are walked over rarely; a full look finds all again."""
    backlog = world.pipeline._backlog
    early, late = [await world.state_of(delivery(), Status.PENDING) for _ in range(2)]
    await world.change(late.event.id, due_at=-10.0)
    await world.change(early.event.id, due_at=3600.0)
    assert await backlog.look(1) == [late.event.id]
    await world.change(early.event.id, due_at=-20.0)
    backlog._next_full_look_at[False] = float("inf")
    assert await backlog.look(1) == [late.event.id]
    backlog._next_full_look_at[False] = 0.0
    assert await backlog.look(1) == [early.event.id, late.event.id]


async def test_a_look_that_finds_too_few_is_a_full_one(make_world: MakeWorld) -> None:
    """An event of a type that nothing waited of is found at once, although the types are read only now and then."""
    world = await make_world({"*": handles})
    backlog = world.pipeline._backlog
    known = await world.state_of(delivery(), Status.PENDING)
    assert await backlog.look(1) == [known.event.id]
    backlog._next_full_look_at[False] = float("inf")
    backlog._put_off_until[False] = 0.0  # however slow the machine was at the first look
    other = await world.state_of(delivery(type="customer.created"), Status.PENDING)
    assert await backlog.look(1) == [known.event.id]
    assert set(await backlog.look(2)) == {known.event.id, other.event.id}


async def test_a_slow_full_look_is_made_rarely(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once in twenty times as long as it takes: the next one waits for that long."""
    now = 1000.0
    monkeypatch.setattr("firstclaim.inbox.backlog.time.monotonic", lambda: now)
    queues = Ledger.queues

    async def slow(ledger: Ledger, *, abandoned: bool) -> list[tuple[str, bool]]:
        nonlocal now
        now += 0.5
        return await queues(ledger, abandoned=abandoned)

    monkeypatch.setattr(Ledger, "queues", slow)
    backlog = world.pipeline._backlog
    await backlog.look(1)
    assert backlog._next_full_look_at[False] == 1010
    assert await backlog.look(1) == []
    assert now == 1000.5
    await world.pipeline._backlog.look(1, abandoned=True)
    now += 20
    monkeypatch.setattr(Ledger, "queues", queues)
    await backlog.look(1)
    assert backlog._put_off_until[False] == now, "a look that is cheap again is not put off"


async def test_an_event_whose_thread_hangs_is_not_tried_again_here(make_world: MakeWorld) -> None:
    """Neither by a delivery nor by recovery, while the thread lives: another process may."""
    world, other = await make_world({TYPE: handles}), await make_world({TYPE: handles})
    given = await world.state_of(delivery(), Status.PENDING)
    thread: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    world.slots.hang(given.event.id, thread)
    assert (await world.pipeline.deliver(given)).kind is Kind.DEFERRED
    await recovered(world)
    assert await world.status(given.event.id) is Status.PENDING
    await recovered(other)
    await settled(world, given.event.id)
    thread.set_result(None)
    await asyncio.sleep(0)
    assert not world.slots.hung


async def test_abandoned_events_are_returned_only_after_a_lease_of_contact(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an outage every lease is over, and those that live are about to release their events."""
    claim = await world.claim()
    await world.change(claim.event_id, due_at=-1.0)
    recovery = recovery_of(world, lease_seconds=5)
    await recovery._round()
    assert await world.status(claim.event_id) is Status.PROCESSING
    monkeypatch.setattr(type(world.claims._epoch), "unbroken_seconds", 5)
    recovery._upkeep_at = 0
    await recovery._round()
    assert await world.status(claim.event_id) is Status.PENDING


# -- the graceful stop --------------------------------------------------------------------------------


async def test_draining_waits_for_what_runs(make_world: MakeWorld, gate: Gate) -> None:
    """Nothing new is taken, by recovery neither; work in flight ends, and its delivery is answered."""
    world = await make_world({TYPE: gate.handle})
    waiting = delivery()
    running = asyncio.create_task(world.pipeline.deliver(delivery()))
    await gate.running.wait()
    draining = asyncio.create_task(world.pipeline.drain(30))
    await asyncio.sleep(0)
    async with asyncio.timeout(10):
        assert await world.pipeline.deliver(waiting) == Outcome(Kind.UNAVAILABLE, "unavailable", "Shutting down")
    due = await world.state_of(delivery(), Status.PENDING)
    assert await world.pipeline.recover() is False
    assert not draining.done()
    gate.finish.set()
    await draining
    assert (await running).kind is Kind.PROCESSED
    assert (await world.row(due.event.id))["attempt"] == 0
    assert (
        await world.database.fetchval(
            "SELECT count(*) FROM firstclaim.stripe_events WHERE event_id = $1", waiting.event.id
        )
        == 0
    )


async def test_draining_releases_what_does_not_end(make_world: MakeWorld, gate: Gate) -> None:
    """Running, or waiting for a slot: pending, due now, nothing charged; its delivery was recorded, so 202."""
    world = await make_world({TYPE: gate.handle}, handler_slots=1)
    given = [delivery() for _ in range(2)]
    deliveries = [asyncio.create_task(world.pipeline.deliver(each)) for each in given]
    await gate.running.wait()
    claimed = "SELECT count(*) = 2 FROM firstclaim.stripe_events WHERE status = 'processing'"
    await until(lambda: world.database.fetchval(claimed))
    await world.pipeline.drain(0)
    assert {result.kind for result in await asyncio.gather(*deliveries)} == {Kind.DEFERRED}
    for each in given:
        row = await world.row(each.event.id)
        assert (row["status"], row["attempt"], row["failures"], row["abandoned"]) == ("pending", 1, 0, 0)
        assert row["due_in"] <= 0
        assert await world.value(each.event.id) is None
    other = await make_world({TYPE: handles})
    for _ in given:
        await recovered(other)
    for each in given:
        await settled(other, each.event.id, attempt=2)


async def test_a_stop_while_recovery_claims_leaves_nothing_claimed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped between the claim of what is due and its dispatch: the claim is dispatched or released, not abandoned."""
    taken, answered = asyncio.Event(), asyncio.Event()
    take_over = Ledger.take_over

    async def slow(ledger: Ledger, event_ids: Sequence[str]) -> list[Claim]:
        claims = await take_over(ledger, event_ids)
        taken.set()
        await answered.wait()
        return claims

    monkeypatch.setattr(Ledger, "take_over", slow)
    due = await world.state_of(delivery(), Status.PENDING)
    recovering = asyncio.create_task(world.components.recovery.run())
    await taken.wait()
    recovering.cancel()
    await asyncio.wait({recovering})
    draining = asyncio.create_task(world.pipeline.drain(30))
    answered.set()
    await draining
    await settled(world, due.event.id)


async def test_a_stop_during_the_commit_settles_it(make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cancelled while COMMIT is under way: either it is completed, or it is released, never both and never lost."""
    committing = asyncio.Event()
    commit = HandlerConnection.commit

    async def slow(seat: HandlerConnection, last: Statement, **values: object) -> None:
        await commit(seat, last, **values)
        committing.set()
        await asyncio.Event().wait()

    world = await make_world({TYPE: handles})
    given = delivery()
    with monkeypatch.context() as patch:
        patch.setattr(HandlerConnection, "commit", slow)
        delivering = asyncio.create_task(world.pipeline.deliver(given))
        await committing.wait()
        await world.pipeline.drain(0)
        await delivering
    await settled(world, given.event.id)
    assert (await world.row(given.event.id))["failures"] == 0


async def test_a_crash_releases_only_what_had_not_begun(make_world: MakeWorld, gate: Gate) -> None:
    """Of two claims, the one that waits for a slot is released without a charge; the one that runs is left alone."""
    world = await make_world({TYPE: gate.handle}, handler_slots=1)
    running, waiting = delivery(), delivery()
    deliveries = [asyncio.create_task(world.pipeline.deliver(running))]
    await gate.running.wait()
    deliveries.append(asyncio.create_task(world.pipeline.deliver(waiting)))
    await until(
        lambda: world.database.fetchval("SELECT count(*) = 2 FROM firstclaim.stripe_events WHERE status = 'processing'")
    )
    await until(_has_unstarted(world))
    claims = world.pipeline.unstarted
    assert [claim.event_id for claim in claims] == [waiting.event.id]
    await world.pipeline.release_unstarted(claims)
    row = await world.row(waiting.event.id)
    assert (row["status"], row["failures"], row["abandoned"]) == (Status.PENDING, 0, 0)
    assert (await world.row(running.event.id))["status"] == Status.PROCESSING
    gate.finish.set()
    await asyncio.gather(*deliveries)


def _has_unstarted(world: World) -> Callable[[], Awaitable[bool]]:
    async def look() -> bool:
        return bool(world.pipeline.unstarted)

    return look


async def test_draining_nothing_ends_at_once(world: World) -> None:
    """An idle process does not wait for its deadline."""
    async with asyncio.timeout(5):
        await world.pipeline.drain(600)


async def test_a_thin_and_a_snapshot_event_share_the_path(make_world: MakeWorld) -> None:
    """Both shapes are recorded, dispatched by type, and deduplicated by id."""
    world = await make_world({"*": handles})
    body = event_body("v1.billing.meter.error_report_triggered")
    thin = delivery(type="v1.billing.meter.error_report_triggered")
    assert body != thin.body
    for given in (thin, delivery()):
        assert (await world.pipeline.deliver(given)).kind is Kind.PROCESSED
        assert await world.pipeline.deliver(given) == duplicate(given.event.id)
        await settled(world, given.event.id)


async def test_events_that_share_a_placeholder_id_are_events_of_their_own(make_world: MakeWorld) -> None:
    """Each test event with a placeholder id has a row and an effect; its retry is a duplicate by either claim."""
    world = await make_world({"*": handles})
    first, second = (delivery("evt_00000000000000", type=each) for each in ("invoice.paid", TYPE))
    for given in (first, second):
        assert (await world.pipeline.deliver(given)).kind is Kind.PROCESSED
    for given in (first, second):
        retry = Delivery(parse_event(given.body), given.body)
        assert await world.pipeline.deliver(retry) == duplicate(given.event.id)
        await world.lock.forget(given.event.id, "", await world.ledger.read_epoch())
        assert await world.pipeline.deliver(retry) == duplicate(given.event.id, "already completed")
        await settled(world, given.event.id)


async def test_recovery_knows_a_placeholder_by_its_row(make_world: MakeWorld) -> None:
    """Recovery dispatches a recorded test delivery under the id that its delivery had."""
    world = await make_world({"*": handles})
    given = delivery("evt_00000000000000")
    await world.ledger.record(given, due_in_seconds=0)
    await recovered(world)
    await settled(world, given.event.id)
