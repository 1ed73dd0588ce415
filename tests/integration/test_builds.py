"""Two builds with different handlers on one ledger: a rolling deploy, a rollback, blue and green."""

import asyncio

import pytest

from firstclaim import Context, Event
from firstclaim.inbox.claim import Claim
from firstclaim.inbox.ledger import Ledger
from firstclaim.inbox.lock import Lock, LockReply
from firstclaim.outcome import Kind, Outcome
from firstclaim.status import UNFINISHED, Status
from tests import operator
from tests.integration.conftest import MakeWorld
from tests.integration.world import World, delivery, effect, until

TYPE = "customer.created"
NOT_HANDLED = f"Event type {TYPE} not handled"


async def handles(event: Event, context: Context) -> str:
    await effect(event, context)
    return "greeted"


async def fails(_event: Event, _context: Context) -> None:
    raise RuntimeError("boom")


@pytest.fixture
async def old(make_world: MakeWorld) -> World:
    """A build without a handler for the type; it knows the ledger's epoch, so a marker would count."""
    world = await make_world({"invoice.paid": handles})
    await world.pipeline.deliver(delivery(type="invoice.paid"))
    return world


@pytest.fixture
async def new(make_world: MakeWorld) -> World:
    """A build that handles it."""
    return await make_world({TYPE: handles})


async def recovered(world: World) -> None:
    """One round of recovery, and the work that it began."""
    await world.pipeline.recover()
    if world.pipeline._work.tasks:
        await asyncio.wait(world.pipeline._work.tasks)


# -- the build that does not want it ------------------------------------------------------------------


@pytest.mark.parametrize("status", UNFINISHED)
async def test_an_unfinished_event_is_left_to_the_build_that_wants_it(old: World, new: World, status: Status) -> None:
    """The old build answers 202, changes nothing, and leaves nothing in Redis that would stop the next delivery."""
    given = await new.state_of(delivery(type=TYPE), status)
    before = await new.row(given.event.id)
    result = await old.pipeline.deliver(given)
    assert result == Outcome(Kind.DEFERRED, "deferred", "Recorded; dispatched by a process that has a handler for it")
    after = await new.row(given.event.id)
    assert {**before, "due_in": 0, "give_up_in": 0} == {**after, "due_in": 0, "give_up_in": 0}
    assert await old.value(given.event.id) is None


@pytest.mark.parametrize(
    ("status", "state"), [(Status.COMPLETED, "already completed"), (Status.DEAD, "is dead: replay it")]
)
async def test_a_settled_event_answers_for_itself(old: World, status: Status, state: str) -> None:
    """Whoever settled it: 200, by the row."""
    given = await old.state_of(delivery(type=TYPE), status)
    result = await old.pipeline.deliver(given)
    assert result == Outcome(Kind.DUPLICATE, "ignored", f"Event {given.event.id} {state}")


async def test_recovery_looks_only_for_what_it_wants(old: World, new: World) -> None:
    """A due event stays pending until a build with a handler comes, and does not use up the look's limit."""
    waiting = [await new.state_of(delivery(type=TYPE), Status.PENDING) for _ in range(old.settings.handler_slots)]
    wanted = await old.state_of(delivery(type="invoice.paid"), Status.PENDING)
    await recovered(old)
    assert {await old.status(each.event.id) for each in waiting} == {Status.PENDING}
    assert await old.status(wanted.event.id) is Status.COMPLETED
    await recovered(new)
    assert {await old.status(each.event.id) for each in waiting} == {Status.COMPLETED}


@pytest.mark.parametrize("row", [None, *Status])
async def test_beside_anothers_lock_nothing_is_inserted(old: World, row: Status | None) -> None:
    """The holder may want the event: an `ignored` row would settle it. Without a row nothing is promised."""
    given = delivery(type=TYPE)
    if row is not None:
        await old.state_of(given, row)
    await old.redis.set(old.lock._key(given.event.id), b"claimed:another", px=5000)
    result = await old.pipeline.deliver(given)
    if row is None:
        assert result.kind is Kind.UNAVAILABLE
        assert await old.database.fetchval("SELECT count(*) FROM firstclaim.stripe_events WHERE type = $1", TYPE) == 0
    else:
        assert result.kind is (Kind.DEFERRED if row in UNFINISHED else Kind.DUPLICATE)
        assert await old.status(given.event.id) is row
    assert await old.value(given.event.id) == b"claimed:another"


async def test_what_nobody_takes_is_dead_a_day_after_its_time(old: World, new: World) -> None:
    """Any process ends it, with the reason; what the process wants itself it does not end, but dispatches."""
    given, wanted = [await new.state_of(delivery(type=each), Status.PENDING) for each in (TYPE, "invoice.paid")]
    for each in (given, wanted):
        await new.change(each.event.id, give_up_at=-86_000.0)
    await old.pipeline.give_up_unwanted(await old.ledger.survey(), 10)
    assert await new.status(given.event.id) is Status.PENDING, "not a day yet"
    for each in (given, wanted):
        await new.change(each.event.id, give_up_at=-86_500.0)
    await old.pipeline.give_up_unwanted(await old.ledger.survey(), 10)
    row = await new.row(given.event.id)
    assert (row["status"], row["last_error"]) == (
        "dead",
        "no running build has a handler for customer.created: replay it once one has",
    )
    assert await new.status(wanted.event.id) is Status.PENDING


# -- the build that wants it --------------------------------------------------------------------------


async def test_a_resend_after_the_deploy_is_handled(old: World, new: World) -> None:
    """What only the old build has seen is `ignored`; Stripe's resend takes it over, with its full time to succeed."""
    given = delivery(type=TYPE)
    assert await old.pipeline.deliver(given) == Outcome(Kind.UNHANDLED, "ignored", NOT_HANDLED, 1)
    await new.change(given.event.id, give_up_at=-1.0)
    assert await new.pipeline.deliver(given) == Outcome(Kind.PROCESSED, "greeted", None, 2)
    row = await new.row(given.event.id)
    assert (row["status"], row["action"]) == ("completed", "greeted")
    assert row["give_up_in"] > new.settings.give_up_seconds - 60
    assert await new.effects(given.event.id) == 1


async def test_recovery_never_takes_an_ignored_event(old: World, new: World) -> None:
    """Only a delivery or an operator brings it back: nobody has promised that it would be handled."""
    given = delivery(type=TYPE)
    await old.pipeline.deliver(given)
    await new.change(given.event.id, due_at=-1.0)
    await recovered(new)
    assert await new.claims.recover([given.event.id]) == ([], {given.event.id: new.settings.lock_ttl_seconds})
    assert await new.status(given.event.id) is Status.IGNORED


async def test_an_ignored_row_that_cannot_be_taken_over_promises_nothing(old: World, new: World) -> None:
    """Another transaction has it: 503, and the lock is released, so that the retry reaches the ledger."""
    given = delivery(type=TYPE)
    await old.pipeline.deliver(given)
    async with new.locked(given.event.id):
        assert (await new.pipeline.deliver(given)).kind is Kind.UNAVAILABLE
    assert await new.value(given.event.id) is None
    assert (await new.pipeline.deliver(given)).kind is Kind.PROCESSED


async def test_an_ignored_row_that_was_taken_meanwhile_is_a_duplicate(
    old: World, new: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The take-over was skipped because another delivery had just made it: the second look says so."""
    given = delivery(type=TYPE)
    await old.pipeline.deliver(given)
    take_over = Ledger.take_over

    async def after_another(ledger: Ledger, event_ids: list[str], *, ignored: bool = False) -> list[Claim]:
        await new.settle(given.event.id, Status.PROCESSING)
        return await take_over(ledger, event_ids, ignored=ignored)

    monkeypatch.setattr(Ledger, "take_over", after_another)
    assert (await new.pipeline.deliver(given)).kind is Kind.DUPLICATE
    assert await new.value(given.event.id) is not None


@pytest.mark.parametrize("held", [True, False])
async def test_an_ignored_row_met_without_the_lock_promises_nothing(
    make_world: MakeWorld, old: World, new: World, held: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another delivery has the lock, or Redis is unreachable: without the lock nothing is taken over, so 503."""
    given = delivery(type=TYPE)
    await old.pipeline.deliver(given)
    if held:
        await new.redis.set(new.lock._key(given.event.id), b"claimed:another", px=5000)
    else:

        async def unreachable(*_: object, **__: object) -> LockReply:
            return LockReply.UNREACHABLE

        monkeypatch.setattr(Lock, "acquire", unreachable)
    assert (await new.pipeline.deliver(given)).kind is Kind.UNAVAILABLE
    assert await new.status(given.event.id) is Status.IGNORED


# -- both ---------------------------------------------------------------------------------------------


async def test_a_failure_of_the_new_build_is_not_settled_by_the_old(make_world: MakeWorld, old: World) -> None:
    """500 on the new build, the retry on the old: the event stays failed, and the new build finishes it."""
    broken = await make_world({TYPE: fails})
    fixed = await make_world({TYPE: handles})
    given = delivery(type=TYPE)
    assert (await broken.pipeline.deliver(given)).kind is Kind.FAILED
    assert (await old.pipeline.deliver(given)).kind is Kind.DEFERRED
    await old.change(given.event.id, due_at=-1.0)
    await recovered(old)
    assert await old.status(given.event.id) is Status.FAILED
    await recovered(fixed)
    assert await old.status(given.event.id) is Status.COMPLETED


async def test_copies_to_both_builds_at_once_lose_nothing(old: World, new: World) -> None:
    """What the new build acknowledges is handled once, whichever build its other copies reach, and in which order."""
    for world in (old, new):
        await world.pipeline.deliver(delivery(type="charge.refunded"))  # opens its connections
    given = [delivery(type=TYPE) for _ in range(40)]

    async def acknowledged(world: World, number: int) -> bool:
        result = await world.pipeline.deliver(given[number])
        return result.kind not in (Kind.UNAVAILABLE, Kind.FAILED)

    shots = [(world, number) for number in range(len(given)) for world in (new, old, old, new)]
    answers = await asyncio.gather(*(acknowledged(*shot) for shot in shots))
    promised = {number for (world, number), said in zip(shots, answers, strict=True) if said and world is new}
    assert promised

    async def all_settled() -> bool:
        # A copy that met the other's lock left its row for recovery, for when that lock has expired.
        await new.database.execute("UPDATE firstclaim.stripe_events SET due_at = now() WHERE status = 'pending'")
        await recovered(new)
        statuses = [await new.status(given[number].event.id) for number in promised]
        return set(statuses) == {Status.COMPLETED}

    await until(all_settled)
    assert [await new.effects(given[number].event.id) for number in promised] == [1] * len(promised)


async def test_a_replay_waits_for_a_build_that_wants_it(old: World, new: World) -> None:
    """An operator makes it pending, whichever build runs: the old one leaves it, the new one handles it."""
    given = delivery(type=TYPE)
    await old.pipeline.deliver(given)
    assert await operator.replay(old.url, [given.event.id]) == [given.event.id]
    await recovered(old)
    assert await old.status(given.event.id) is Status.PENDING
    await recovered(new)
    assert await old.status(given.event.id) is Status.COMPLETED
