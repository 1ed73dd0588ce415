"""Coalescing: what is in one batch, who hears what, and that nobody waits for ever."""

import asyncio
from collections.abc import Sequence

import pytest

from firstclaim.inbox.batcher import Batcher


class Line:
    """A far side that answers each item with its double, when it is let, and notes what came in one batch."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.open = asyncio.Event()
        self.open.set()

    async def run(self, items: Sequence[int]) -> list[int | Exception]:
        self.batches.append(list(items))
        await self.open.wait()
        if 13 in items:
            raise ConnectionError("all of it")
        return [ValueError(item) if item < 0 else 2 * item for item in items]


@pytest.fixture
def line() -> Line:
    return Line()


def made(line: Line, most: int = 100, parallel: int = 1, late_seconds: float = 0) -> Batcher[int, int]:
    return Batcher(line.run, max_items=most, parallel=parallel, late_seconds=late_seconds)


async def test_calls_of_one_moment_share_a_batch(line: Line) -> None:
    """Ten callers, one round trip, each with its own answer."""
    batcher = made(line)
    assert await asyncio.gather(*(batcher.call(number) for number in range(10))) == [2 * each for each in range(10)]
    assert line.batches == [list(range(10))]


async def test_what_comes_meanwhile_is_the_next_batch(line: Line) -> None:
    """While one is under way calls gather, at most so many; with two at once the second starts by itself."""
    batcher = made(line, most=3, parallel=2)
    line.open.clear()
    calls = [batcher.call(0)]
    await asyncio.sleep(0)
    calls.append(batcher.call(1))
    await asyncio.sleep(0)
    calls += [batcher.call(number) for number in range(2, 7)]
    await asyncio.sleep(0)
    assert line.batches == [[0], [1]]
    line.open.set()
    assert await asyncio.gather(*calls) == [0, 2, 4, 6, 8, 10, 12]
    assert line.batches == [[0], [1], [2, 3, 4], [5, 6]]


@pytest.mark.parametrize("late", [False, True])
async def test_only_a_late_batch_is_gone_past(line: Line, late: bool) -> None:
    """Beside one that is not late yet calls gather; beside a late one the next call is sent, with all that gathered."""
    batcher = made(line, parallel=2, late_seconds=0 if late else 3600)
    line.open.clear()
    calls = [batcher.call(0)]
    await asyncio.sleep(0)
    calls += [batcher.call(number) for number in (1, 2)]
    await asyncio.sleep(0)
    assert line.batches == ([[0], [1, 2]] if late else [[0]])
    line.open.set()
    assert await asyncio.gather(*calls) == [0, 2, 4]
    assert line.batches == [[0], [1, 2]]


async def test_who_waits_goes_past_a_batch_when_it_becomes_late(line: Line) -> None:
    """No further call has to come for that; nor does a batch that has just ended beside it put it off."""
    batcher = made(line, parallel=2, late_seconds=0.01)
    line.open.clear()
    stalled = batcher.call(0)
    await asyncio.sleep(0)
    gate, line.open = line.open, asyncio.Event()
    line.open.set()
    async with asyncio.timeout(10):
        assert await batcher.call(1) == 2
        assert await batcher.call(2) == 4
    assert line.batches == [[0], [1], [2]]
    gate.set()
    assert await stalled == 0


async def test_the_waiting_can_be_refused(line: Line) -> None:
    """Those whose batch has not begun hear of it at once; what is under way goes on, and so does the next call."""
    batcher = made(line)
    line.open.clear()
    first = batcher.call(0)
    await asyncio.sleep(0)
    waiting = [batcher.call(number) for number in (1, 2)]
    batcher.refuse_waiting(ConnectionError("away"))
    for each in waiting:
        with pytest.raises(ConnectionError, match="away"):
            await each
    line.open.set()
    assert await first == 0
    assert await batcher.call(3) == 6
    assert line.batches == [[0], [3]]


async def test_when_idle_a_call_is_sent_at_once(line: Line) -> None:
    """Whatever is still to be looked at later: what gathered meanwhile has been sent."""
    batcher = made(line, parallel=2, late_seconds=3600)
    assert [*await asyncio.gather(batcher.call(0), batcher.call(1))] == [0, 2]
    line.open.clear()
    calls = [batcher.call(2)]
    await asyncio.sleep(0)
    calls.append(batcher.call(3))
    line.open.set()
    async with asyncio.timeout(10):
        assert [await each for each in calls] == [4, 6]
        assert await batcher.call(4) == 8
    assert line.batches == [[0, 1], [2], [3], [4]]


async def test_one_call_after_another(line: Line) -> None:
    """Each of a hundred calls that are made the moment the last was answered is answered too."""
    batcher = made(line)
    async with asyncio.timeout(10):
        for number in range(100, 200):
            assert await batcher.call(number) == 2 * number
    assert len(line.batches) == 100


async def test_an_error_of_one_is_not_the_others(line: Line) -> None:
    """An exception among the answers goes to its own caller."""
    batcher = made(line)
    good, bad, fine = (batcher.call(number) for number in (1, -1, 2))
    assert await good == 2
    with pytest.raises(ValueError, match="-1"):
        await bad
    assert await fine == 4


async def test_an_error_of_the_batch_is_everybodys(line: Line) -> None:
    """And the next batch goes its way."""
    batcher = made(line)
    for call in [batcher.call(number) for number in (1, 13)]:
        with pytest.raises(ConnectionError):
            await call
    assert await batcher.call(1) == 2


async def test_a_cancelled_caller_disturbs_nobody(line: Line) -> None:
    """Neither its batch, which goes on, nor its mates."""
    batcher = made(line)
    line.open.clear()
    gone, stays = batcher.call(1), batcher.call(2)
    await asyncio.sleep(0)
    gone.cancel()
    line.open.set()
    assert await stays == 4
    assert line.batches == [[1, 2]]
    assert gone.cancelled()
