"""Slots and places, and the choice of due events."""

import asyncio
import time
from typing import cast

import pytest

from firstclaim.inbox import backlog as backlog_module
from firstclaim.inbox.backlog import Backlog
from firstclaim.inbox.ledger import Ledger
from firstclaim.inbox.pauses import Pauses
from firstclaim.inbox.slots import Place, Slots
from firstclaim.postgres.epoch import Epoch

SIZE = 4


@pytest.fixture
def slots() -> Slots:
    return Slots(SIZE)


def reserved(slots: Slots) -> list[Place]:
    """As many places as deliveries can get."""
    places = []
    while (place := slots.reserve()) is not None:
        places.append(place)
    return places


async def test_deliveries_hold_twice_the_slots_at_most(slots: Slots) -> None:
    """The next one gets a place when one is released, and a place is released once."""
    places = reserved(slots)
    assert len(places) == 2 * SIZE
    for _ in range(2):
        places[0].release()
    assert len(reserved(slots)) == 1


async def test_in_a_backlog_recovery_has_half_of_the_slots(slots: Slots) -> None:
    """Deliveries get the other half, and no queue; together they never hold more than twice the slots."""
    slots.overflowed()
    assert len(reserved(slots)) == SIZE // 2
    assert slots.free == SIZE // 2
    for _ in range(SIZE // 2):
        Place(slots, for_delivery=False)
    assert slots.free == 0


async def test_a_backlog_that_begins_under_full_slots_gets_its_share(slots: Slots) -> None:
    """Deliveries hold every slot and wait for more: as these end, recovery gets its half before any delivery."""
    places = reserved(slots)
    slots.overflowed()
    assert slots.free == 0
    for place in places[SIZE // 2 :]:
        assert slots.reserve() is None
        place.release()
    assert slots.free == SIZE // 2
    assert slots.reserve() is None
    places[0].release()
    assert slots.reserve() is not None


async def test_without_a_backlog_recovery_takes_what_is_free(slots: Slots) -> None:
    """Places that deliveries wait in count."""
    assert slots.free == SIZE
    places = [slots.reserve() for _ in range(SIZE + 1)]
    assert slots.free == 0
    for place in places[:2]:
        assert place is not None
        place.release()
    assert slots.free == 1


async def ended(slots: Slots, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A handler had its slot for so long, and has ended."""
    place, now = Place(slots, for_delivery=False), time.monotonic()
    assert await place.enter(previously_abandoned=False, timeout_seconds=5)
    with monkeypatch.context() as patch:
        patch.setattr("firstclaim.inbox.slots.time.monotonic", lambda: now + seconds)
        place.release()


async def test_recovery_claims_ahead_in_a_backlog_of_brief_handlers(
    slots: Slots, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half as many as there are slots wait for one; not without a backlog, and not behind a slow handler."""
    await ended(slots, 0.1, monkeypatch)
    assert slots.claimable == SIZE
    slots.backlog = True
    assert slots.claimable == SIZE + SIZE // 2
    places = [Place(slots, for_delivery=False) for _ in range(slots.claimable)]
    assert slots.claimable == 0
    assert slots.reserve() is not None, "deliveries have the rest of the places"
    for place in places:
        place.release()
    await ended(slots, 5, monkeypatch)
    assert slots.claimable == SIZE - 1


async def test_capacity_ends_with_the_backlog(slots: Slots) -> None:
    """What could be claimed ahead cannot any more: recovery waits for a slot, and does not ask again and again."""
    slots.backlog = slots.brief = True
    places = [Place(slots, for_delivery=False) for _ in range(SIZE)]
    await slots.wait_for_capacity()
    slots.backlog = False
    waiting = asyncio.create_task(slots.wait_for_capacity())
    await asyncio.sleep(0)
    assert not waiting.done()
    places[0].release()
    await waiting


async def test_a_running_handler_keeps_its_slot_and_not_its_turn(slots: Slots) -> None:
    """After its deadline: the next previously abandoned event may start, but not in its slot."""
    place = Place(slots, for_delivery=False)
    assert await place.enter(previously_abandoned=True, timeout_seconds=5)
    assert slots.previously_abandoned.locked()
    running: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    place.release(running)
    assert slots.previously_abandoned_free
    assert slots.free == SIZE - 1
    running.set_result(None)
    await asyncio.sleep(0)
    assert slots.free == SIZE


async def test_a_claim_that_gets_no_slot_in_time_says_so() -> None:
    """And leaves nothing taken."""
    slots = Slots(1)
    first, second = Place(slots, for_delivery=True), Place(slots, for_delivery=True)
    assert await first.enter(previously_abandoned=False, timeout_seconds=5)
    assert not await second.enter(previously_abandoned=True, timeout_seconds=0.01)
    second.release()
    first.release()
    assert slots.free == 1
    assert slots.previously_abandoned_free


def test_the_oldest_are_tried_beside_a_sample_of_the_rest() -> None:
    """One in eight of what is chosen is the oldest; the others are drawn, so that processes rarely try the same."""
    due = [f"evt_{number}" for number in range(64)]
    chosen = [Backlog.choose(due, 1)[0] for _ in range(4000)]
    assert 400 < chosen.count(due[0]) < 700
    assert {*chosen} == {*due}
    assert len({*Backlog.choose(due, 20)}) == 20


@pytest.mark.parametrize("rows", range(7))
def test_a_short_queue_is_taken_whole(rows: int) -> None:
    """As many as asked for, or all there are."""
    due = [f"evt_{number}" for number in range(rows)]
    assert sorted(Backlog.choose(due, 5)) == due[:5] or len(due) > 5
    assert len(Backlog.choose(due, 5)) == min(rows, 5)
    assert Backlog.choose(due, 0) == []


def test_what_cannot_be_claimed_is_left_out_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """For as long as others may hold it, and of too many the oldest are tried again first."""
    now = 0.0
    monkeypatch.setattr("firstclaim.inbox.backlog.time.monotonic", lambda: now)
    monkeypatch.setattr(backlog_module, "_MAX_LEFT_OUT", 3)
    backlog = Backlog(cast(Ledger, None), lambda *_: True, Pauses(), interval_seconds=1)
    backlog.leave_out({"a": 20, "b": 20})
    now = 10.0
    backlog.leave_out({"b": 20, "c": 5})
    assert sorted(backlog._remembered()) == ["a", "b", "c"]
    backlog.leave_out({"d": 20})
    assert sorted(backlog._remembered()) == ["b", "c", "d"]
    now = 16.0
    assert "c" not in backlog._remembered()
    now = 31.0
    assert backlog._remembered() == []


def test_contact_is_unbroken_since_it_was_last_in_doubt(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lost connection, or a confirmation that came too late, breaks it."""
    now = 0.0
    monkeypatch.setattr("firstclaim.postgres.epoch.time.monotonic", lambda: now)
    epoch = Epoch(fresh_seconds=10)
    assert epoch.unbroken_seconds == 0
    for instant in (100.0, 109.0, 118.0):
        now = instant
        epoch.confirm("e")
    assert epoch.unbroken_seconds == 18
    epoch.doubt()
    assert epoch.unbroken_seconds == 0
    epoch.confirm("e")
    assert epoch.unbroken_seconds == 0
    now = 140.0
    assert epoch.unbroken_seconds == 0, "not confirmed for too long"
    epoch.confirm("e")
    now = 145.0
    assert epoch.unbroken_seconds == 5
