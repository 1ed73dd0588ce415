"""One timer for the steps of an attempt."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

from firstclaim.inbox.step_timer import StepTimer


@dataclass
class Handle:
    """A timer that was set."""

    at: float
    callback: Callable[[], None]
    over: bool = False

    def when(self) -> float:
        return self.at

    def cancel(self) -> None:
        self.over = True


@dataclass
class Loop:
    """The loop's clock and timers, run by the test."""

    now: float = 0.0
    set: list[Handle] = field(default_factory=list)

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, callback: Callable[[], None]) -> Handle:
        self.set.append(Handle(when, callback))
        return self.set[-1]

    def advance(self, seconds: float) -> None:
        """Time passes, and what is due runs."""
        self.now += seconds
        for handle in [each for each in self.set if each.at <= self.now and not each.over]:
            handle.cancel()
            handle.callback()


@pytest.fixture
async def loop() -> Loop:
    return Loop()


@contextmanager
def timer_of(loop: Loop) -> Iterator[StepTimer]:
    timer = StepTimer()
    timer._loop = loop  # type: ignore[assignment]
    yield timer
    timer.close()
    assert all(handle.over for handle in loop.set)


async def test_a_step_that_takes_too_long_is_ended_once(loop: Loop) -> None:
    """At its limit, not before, and not again."""
    ended: list[float] = []
    with timer_of(loop) as timer:
        timer.start(5, lambda: ended.append(loop.now))
        for _ in range(12):
            loop.advance(1)
    assert ended == [5]


async def test_a_step_that_has_ended_is_left_alone(loop: Loop) -> None:
    """Its time limit no longer counts, and the next step has its own."""
    ended: list[str] = []
    with timer_of(loop) as timer:
        timer.start(5, lambda: ended.append("first"))
        loop.advance(1)
        timer.stop()
        loop.advance(3)
        timer.start(30, lambda: ended.append("second"))
        loop.advance(29)
        assert ended == []
        loop.advance(1)
    assert ended == ["second"]


async def test_a_later_step_may_have_to_end_sooner(loop: Loop) -> None:
    """Thirty seconds for the handler, a second and a half for the statement after it."""
    ended: list[float] = []
    with timer_of(loop) as timer:
        timer.start(30, lambda: ended.append(loop.now))
        loop.advance(10)
        timer.stop()
        timer.start(1.5, lambda: ended.append(loop.now))
        loop.advance(1.5)
        assert ended == [11.5]
        loop.advance(30)
    assert ended == [11.5]


async def test_quick_steps_set_one_timer(loop: Loop) -> None:
    """A statement, a handler, a statement: the timer of the first is never set again."""
    with timer_of(loop) as timer:
        for seconds in (1.5, 30, 1.5):
            timer.start(seconds, lambda: None)
            timer.stop()
    assert len(loop.set) == 1


async def test_a_block_that_took_too_long_raises(loop: Loop) -> None:
    """Whatever came of it; but a cancellation stays one."""
    with timer_of(loop) as timer:
        for error in (ConnectionResetError(), asyncio.CancelledError(), None):
            expected = asyncio.CancelledError if isinstance(error, asyncio.CancelledError) else TimeoutError
            with pytest.raises(expected):
                late(loop, timer, error)
        with timer.limit(1, lambda: None):
            pass


def late(loop: Loop, timer: StepTimer, error: BaseException | None) -> None:
    with timer.limit(1, lambda: None):
        loop.advance(1)
        if error is not None:
            raise error
