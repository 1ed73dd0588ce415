"""The seed decides: what a nemesis run breaks and what it sends, and how its command line is read."""

from collections.abc import Iterable
from dataclasses import replace
from itertools import islice

import orjson
import pytest

from tests.acceptance.harness import Sample
from tests.chaos.__main__ import arguments
from tests.chaos.faults import LANES
from tests.chaos.new_build import ADDED
from tests.chaos.old_build import DROPPED
from tests.chaos.plan import Fault, Order, faults, orders

NOBODY = Sample("", b"")


def drawn(seed: int) -> dict[str, list[Fault]]:
    return {lane: list(islice(faults(seed, lane, list(kinds)), 100)) for lane, kinds in LANES.items()}


def anonymous(some: Iterable[Order]) -> list[tuple[Order, object]]:
    """Orders and what their events ask for, without the ids and times that are fresh in every run."""
    return [
        (replace(order, event=NOBODY), orjson.loads(order.event.body)["data"]["object"]["metadata"]) for order in some
    ]


def test_the_same_seed_breaks_the_same_things() -> None:
    """Faults, targets and durations follow from the seed, lane by lane; another seed gives others."""
    assert drawn(7) == drawn(7)
    assert all(drawn(7)[lane] != drawn(8)[lane] for lane in LANES)


@pytest.mark.parametrize("lane", LANES)
def test_every_kind_comes_before_any_comes_twice(lane: str) -> None:
    """However short a run is, each lane's first round holds every kind of its faults."""
    kinds = list(LANES[lane])
    assert sorted(fault.kind for fault in islice(faults(1, lane, kinds), len(kinds))) == sorted(kinds)


def test_the_same_seed_sends_the_same_events() -> None:
    """Types, behaviours, copies, repeats and pauses follow from the seed; the ids are fresh in every run."""
    one, other = list(islice(orders(7), 300)), list(islice(orders(7), 300))
    assert anonymous(one) == anonymous(other)
    assert anonymous(one) != anonymous(islice(orders(8), 300))
    assert not {order.event.id for order in one} & {order.event.id for order in other}


def test_the_load_has_some_of_everything() -> None:
    """Copies at once, later repeats, clients that hang up, types of one build, and every end that an event may have."""
    some = list(islice(orders(1), 1000))
    assert {order.copies for order in some} == {1, 2, 3, 6}
    assert {len(order.repeats_after_seconds) for order in some} == {0, 1, 2}
    assert {order.hangs_up for order in some} == {True, False}
    assert {str(order.expected) for order in some} == {"completed", "ignored", "dead"}
    assert {order.type for order in some if order.one_build} == {ADDED, DROPPED}


def test_arguments() -> None:
    """Seed and minutes as given; without a seed, one is drawn."""
    chosen = arguments(["--seed", "5", "--minutes", "0.5"])
    assert (chosen.seed, chosen.minutes) == (5, 0.5)
    assert isinstance(arguments([]).seed, int)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--minutes", "0"], "more than 0"),
        (["--minutes", "nan"], "more than 0"),
        (["--minutes", "100000"], "at most 60"),
        (["--minutes", "soon"], "invalid float value: 'soon'"),
        (["--seed", "x"], "invalid int value: 'x'"),
        (["--hours", "1"], "unrecognized arguments: --hours"),
    ],
)
def test_bad_arguments(given: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What cannot be a run is refused with a sentence and exit code 2, before anything is started."""
    with pytest.raises(SystemExit) as left:
        arguments(given)
    assert left.value.code == 2
    assert said in capsys.readouterr().err
