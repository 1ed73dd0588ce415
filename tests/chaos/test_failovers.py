"""The table of the failovers is checked: what is lost, doubled or late is seen, and of the right failover."""

from dataclasses import replace

import pytest

from tests.acceptance.harness import PROCESSED, UNAVAILABLE
from tests.chaos.checker import Effect
from tests.chaos.failovers import Cost, Failover, costs, longest_gap
from tests.chaos.history import Delivery, Unseen

FAILOVER = Failover("pair", 10.0, interrupted_seconds=2.0, back_seconds=0.5, back_most_seconds=1.0)


def delivery(event_id: str, at: float, result: tuple[int, bool, str] = PROCESSED, service: str = "one") -> Delivery:
    instant = round(at * 1e9)
    return Delivery(event_id, service, instant, instant, result, Unseen.NOT_READ, instant, wanted=True)


def test_each_event_counts_for_the_failover_before_it() -> None:
    """An event is counted when it was acknowledged; a 503 is no promise, and a second effect is seen."""
    done = [FAILOVER, replace(FAILOVER, kind="killed", began_at=20.0), replace(FAILOVER, began_at=30.0)]
    deliveries = [
        delivery("a", 5.0),
        delivery("lost", 12.0),
        delivery("never", 13.0, UNAVAILABLE),
        delivery("b", 21.0),
        delivery("twice", 31.0),
    ]
    effects = [Effect("a", 1), Effect("b", 1), Effect("twice", 1), Effect("twice", 2)]
    assert [(cost.number, cost.acknowledged, cost.lost, cost.doubled) for cost in costs(done, deliveries, effects)] == [
        (1, 2, 1, 0),
        (1, 1, 0, 0),
        (2, 1, 0, 1),
    ]


def test_a_service_has_its_own_answers() -> None:
    """With two addresses at once, each row counts what its own service has acknowledged."""
    done = [replace(FAILOVER, service="one"), replace(FAILOVER, kind="HAProxy", service="two")]
    deliveries = [delivery("a", 5.0), delivery("b", 6.0), delivery("c", 7.0, service="two")]
    assert [cost.acknowledged for cost in costs(done, deliveries, [])] == [2, 1]


@pytest.mark.parametrize(
    ("cost", "is_too_high"),
    [
        (Cost(FAILOVER, 1, 9, lost=0, doubled=0), False),
        (Cost(FAILOVER, 1, 9, lost=1, doubled=0), True),
        (Cost(FAILOVER, 1, 9, lost=0, doubled=1), True),
        (Cost(replace(FAILOVER, back_seconds=1.0), 1, 9, lost=0, doubled=0), True),
        (Cost(replace(FAILOVER, interrupted_most_seconds=2.0), 1, 9, lost=0, doubled=0), True),
    ],
    ids=["good", "lost", "doubled", "late", "interrupted"],
)
def test_what_costs_too_much(cost: Cost, is_too_high: bool) -> None:
    """One event lost or doubled is too many, and so is a second above the limit."""
    assert cost.is_too_high is is_too_high


def test_the_gap_of_a_failover() -> None:
    """It begins with the last answer before the failover; earlier gaps are not its own."""
    assert longest_gap([1.0, 9.0, 9.5, 13.0, 13.5], since=10.0) == 3.5
    assert longest_gap([1.0, 2.0], since=10.0) == 0.0
