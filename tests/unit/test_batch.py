"""Coalesced calls: each gets its own answer, whenever it comes."""

import asyncio
from collections.abc import Sequence

import pytest

from service.inbox.batch import Batcher


async def double(items: Sequence[int]) -> Sequence[int]:
    """Answers after a turn of the loop."""
    await asyncio.sleep(0)
    return [2 * item for item in items]


@pytest.mark.timeout(10)
@pytest.mark.parametrize("parallel", [1, 3])
async def test_a_call_right_after_an_answer_is_answered(parallel: int) -> None:
    """Who calls again in the very turn in which it was answered does not wait for a worker that is done."""
    batcher = Batcher(double, most=10, parallel=parallel)
    for number in range(5):
        assert await batcher.call(number) == 2 * number
    assert await asyncio.gather(*(batcher.call(number) for number in range(5))) == [0, 2, 4, 6, 8]
    assert await batcher.call(7) == 14


async def test_calls_gather_while_a_batch_is_under_way() -> None:
    """The first goes alone and at once, those that come meanwhile go together, no more than may be in a batch."""
    seen: list[list[int]] = []

    async def note(items: Sequence[int]) -> Sequence[int]:
        seen.append(list(items))
        return await double(items)

    batcher = Batcher(note, most=3, parallel=1)
    first = batcher.call(0)
    await asyncio.sleep(0)
    rest = [batcher.call(number) for number in range(1, 6)]
    assert await asyncio.gather(first, *rest) == [0, 2, 4, 6, 8, 10]
    assert seen == [[0], [1, 2, 3], [4, 5]]


async def test_an_error_is_the_callers_own_or_the_batchs() -> None:
    """An exception in place of an answer reaches that caller alone; one that was raised reaches all of its batch."""

    async def answer(items: Sequence[int]) -> Sequence[int | Exception]:
        if 9 in items:
            raise ConnectionError
        return [ValueError(str(item)) if item == 1 else item for item in items]

    batcher = Batcher(answer, most=10, parallel=1)
    found = await asyncio.gather(*(batcher.call(number) for number in range(3)), return_exceptions=True)
    assert [found[0], type(found[1]), found[2]] == [0, ValueError, 2]
    both = await asyncio.gather(batcher.call(8), batcher.call(9), return_exceptions=True)
    assert [type(each) for each in both] == [ConnectionError, ConnectionError]
    assert await batcher.call(3) == 3


async def test_a_cancelled_caller_disturbs_nobody() -> None:
    """Its mates are answered, and so is whoever comes after."""
    batcher = Batcher(double, most=10, parallel=1)
    gone, mate = batcher.call(1), batcher.call(2)
    gone.cancel()
    assert await mate == 4
    assert await batcher.call(3) == 6
