"""The backoff: its limits for every count, and its jitter."""

import random
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firstclaim.backoff import Backoff
from firstclaim.errors import Retry


@pytest.mark.parametrize(
    ("count", "whole"), [(1, 5), (2, 10), (3, 20), (10, 2560), (11, 3600), (12, 3600), (10_000, 3600)]
)
def test_it_doubles_up_to_the_maximum(monkeypatch: pytest.MonkeyPatch, count: int, whole: float) -> None:
    """The wait is 5 s, 10 s, 20 s and so on, and an hour from the eleventh failure; jitter takes half to all of it."""
    drawn: list[tuple[float, float]] = []

    def uniform(low: float, high: float) -> float:
        drawn.append((low, high))
        return high

    monkeypatch.setattr(random, "uniform", uniform)
    assert Backoff(5, 3600).after(count) == whole
    assert drawn == [(0.5, 1)]


@given(
    st.floats(0.001, 3600),
    st.floats(0.001, 86_400),
    st.integers(1, 10**12),
)
def test_it_stays_between_half_and_whole(first: float, longest: float, count: int) -> None:
    """For any settings and any count, the wait is between half and all of the doubled wait, up to the maximum."""
    whole = min(first * 2.0 ** min(count - 1, 60), longest)
    assert whole / 2 <= Backoff(first, longest).after(count) <= whole <= longest


def test_it_spreads() -> None:
    """A thousand events that failed together are not retried together."""
    waits = {Backoff(5, 3600).after(4) for _ in range(1000)}
    assert len(waits) > 900
    assert min(waits) < 24 < 36 < max(waits)


@pytest.mark.parametrize("after", ["soon", timedelta(minutes=1), float("nan"), -1, 3 * 86_400 + 1])
def test_a_time_that_a_handler_cannot_ask_for(after: float) -> None:
    """The error shows what the handler wrote, and names the unit and the limits."""
    with pytest.raises(ValueError, match=r"expected 0 to 259200 seconds") as refused:
        Retry(after=after)
    assert repr(after) in str(refused.value)
