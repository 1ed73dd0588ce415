"""Signed bodies that have an id, and are no valid event otherwise: by their id alone they may be duplicates."""

import asyncio

import orjson
import pytest

from firstclaim.errors import Rejected
from firstclaim.event import Delivery
from firstclaim.outcome import Kind, duplicate
from firstclaim.web.first_look import first_look
from tests.integration.conftest import MakeWorld
from tests.integration.world import World, delivery, effect

ODDITIES: dict[str, dict[str, object]] = {
    "no type": {"type": None},
    "another object": {"object": "charge"},
    "livemode in words": {"livemode": "yes"},
    "no data": {"data": None},
    "created in words": {"created": "yesterday"},
}


def odd(given: Delivery, changes: dict[str, object]) -> Delivery:
    """A delivery with the same id, whose body is no valid event."""
    return first_look(orjson.dumps(orjson.loads(given.body) | changes))


@pytest.fixture
async def world(make_world: MakeWorld) -> World:
    """One process."""
    return await make_world({"*": effect})


async def rejected(world: World, given: Delivery) -> str:
    """The reason why the delivery is refused. Fails unless it is."""
    with pytest.raises(Rejected) as refused:
        await world.pipeline.deliver(given)
    return refused.value.reason


async def rows(world: World) -> int:
    """How many events are in the ledger."""
    count: int = await world.database.fetchval("SELECT count(*) FROM firstclaim.stripe_events")
    return count


@pytest.mark.parametrize("changes", ODDITIES.values(), ids=ODDITIES)
async def test_a_recorded_id_is_a_duplicate(world: World, changes: dict[str, object]) -> None:
    """Once the id is recorded, its delivery is a duplicate, whatever else is odd in the body."""
    given = delivery()
    assert (await world.pipeline.deliver(given)).kind is Kind.PROCESSED
    assert await world.pipeline.deliver(odd(given, changes)) == duplicate(given.event_id)


@pytest.mark.parametrize("changes", ODDITIES.values(), ids=ODDITIES)
async def test_an_unrecorded_id_is_rejected(world: World, changes: dict[str, object]) -> None:
    """Before that it is refused, with the reason, and leaves no row and no lock: the valid event is processed."""
    given = delivery()
    with pytest.raises(Rejected) as expected:
        odd(given, changes).parse()
    assert await rejected(world, odd(given, changes)) == expected.value.reason
    assert await rows(world) == 0
    assert await world.value(given.event_id) is None
    assert (await world.pipeline.deliver(given)).kind is Kind.PROCESSED


async def test_while_another_is_at_it_it_is_rejected(world: World) -> None:
    """Another's lock promises nothing: the body is refused, and that lock is left alone."""
    given = delivery()
    await world.redis.set(world.lock._key(given.event_id), b"claimed:another", px=5000)
    await rejected(world, odd(given, ODDITIES["no type"]))
    assert await world.value(given.event_id) == b"claimed:another"
    assert await rows(world) == 0


async def test_copies_are_rejected_together(world: World) -> None:
    """Copies that arrive at once get the same answer as the first one, and the lock is free afterwards."""
    given = odd(delivery(), ODDITIES["no data"])
    copies = [world.pipeline.deliver(first_look(given.body)) for _ in range(20)]
    answers = await asyncio.gather(*copies, return_exceptions=True)
    assert {(type(each), str(each)) for each in answers} == {(Rejected, '"data.object" must be an object')}
    assert await world.value(given.event_id) is None


async def test_beside_the_valid_event_it_is_a_duplicate(world: World) -> None:
    """A copy that follows the valid event while it is being recorded is a duplicate of it."""
    given = delivery()
    first, second = await asyncio.gather(
        world.pipeline.deliver(given), world.pipeline.deliver(odd(given, ODDITIES["no data"]))
    )
    assert first.kind is Kind.PROCESSED
    assert second == duplicate(given.event_id)
