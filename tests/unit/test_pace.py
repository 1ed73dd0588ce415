"""A long job rests after each statement, for as long as its share of the time asks."""

import asyncio
from types import SimpleNamespace

import pytest

from firstclaim.operations import pace as pace_module
from firstclaim.operations.pace import Pace


class FakeTime:
    """A clock that only a sleep, or `pass_`, moves; `slept` are the sleeps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.slept: list[float] = []
        monkeypatch.setattr(pace_module, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(pace_module, "asyncio", SimpleNamespace(sleep=self._sleep))

    async def _sleep(self, seconds: float) -> None:
        self.slept.append(round(max(0.0, seconds), 6))
        self.now += max(0.0, seconds)

    def pass_(self, seconds: float) -> None:
        self.now += seconds


def _sleeps(monkeypatch: pytest.MonkeyPatch, busy_percent: float, steps: list[tuple[float, float]]) -> list[float]:
    """The sleeps before statements that take the first number of seconds, with the second between them."""
    clock, pace = FakeTime(monkeypatch), Pace(busy_percent)

    async def run() -> None:
        for taken, between in steps:
            async with pace.statement():
                clock.pass_(taken)
            clock.pass_(between)

    asyncio.run(run())
    return clock.slept


def test_a_rest_follows_the_time_of_its_statement(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 20%, a rest is four times as long as the statement before it, and the first statement waits for nothing."""
    assert _sleeps(monkeypatch, 20, [(0.01, 0), (0.5, 0), (0.01, 0)]) == [0, 0.04, 2]


def test_what_the_job_does_between_its_statements_is_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """The upload of a file counts as rest, and one that took longer leaves no rest and no debt."""
    assert _sleeps(monkeypatch, 50, [(1, 0.4), (1, 3), (1, 0), (1, 0)]) == [0, 0.6, 0, 1]


def test_a_job_may_be_busy_all_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 100% there are no rests."""
    assert _sleeps(monkeypatch, 100, [(1, 0)] * 3) == [0, 0, 0]
