"""What a nemesis run does, drawn from its seed alone: the faults of each lane, and the events that are sent.

Guarantees: the same seed gives the same faults and events in the same order, whatever the machine is doing; the
lanes run side by side, so faults of several kinds fall together, and one thing is broken in one way at a time;
every kind of a lane's faults comes once before any comes twice. No socket and no clock in here.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from firstclaim.status import Status
from tests.acceptance.harness import Sample, sample

# A lane's rest between two faults: long enough that most of the time something works, or nothing could go wrong.
_QUIET_SECONDS: Final = (2.0, 6.0)
_SERVICE_QUIET_SECONDS: Final = (3.0, 10.0)  # it takes seconds to start
_LASTS_SECONDS: Final = (0.3, 2.5)
_EVENTS_PER_SECOND: Final = 8.0  # with copies and repeats about 20 deliveries: two busy cores keep up with it


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault of a lane. `pick` chooses among what there is to break, `portion` is a number from 0 to 1."""

    lane: str
    kind: str
    quiet_seconds: float  # before it
    lasts_seconds: float
    pick: int
    portion: float


def faults(seed: int, lane: str, kinds: Sequence[str]) -> Iterator[Fault]:
    """The lane's faults without end, one round of all kinds after another."""
    chance = random.Random(f"{seed}/{lane}")
    quiet_seconds = _SERVICE_QUIET_SECONDS if lane.startswith("service") else _QUIET_SECONDS
    while True:
        for kind in chance.sample(kinds, len(kinds)):
            yield Fault(
                lane,
                kind,
                round(chance.uniform(*quiet_seconds), 2),
                round(chance.uniform(*_LASTS_SECONDS), 2),
                chance.randrange(1000),
                chance.random(),
            )


@dataclass(frozen=True, slots=True)
class Order:
    """One event to send: after how long a pause, how many copies at once, and what should become of it."""

    event: Sample = field(repr=False)
    behaviour: str
    type: str
    pause_seconds: float
    copies: int
    repeats_after_seconds: tuple[float, ...]
    hangs_up: bool  # before all that, one client leaves without waiting for its answer
    becomes: Status
    seed: str  # of the choices made while it is sent


@dataclass(frozen=True, slots=True)
class _Sort:
    weight: int
    behaviour: str
    type: str = "invoice.payment_failed"
    becomes: Status = Status.COMPLETED
    wish: tuple[tuple[str, float], ...] = ()


_SYNC: Final = "invoice.paid"
_SORTS: Final = (
    _Sort(70, "plain"),
    _Sort(30, "plain", _SYNC),
    _Sort(15, "plain", "customer.subscription.updated"),
    _Sort(15, "plain", "charge.refunded", Status.IGNORED),  # nobody handles it
    _Sort(12, "fail", wish=(("until", 1),)),
    _Sort(6, "fail", wish=(("until", 3),)),
    _Sort(8, "fail", _SYNC, wish=(("until", 2),)),
    _Sort(6, "retry", wish=(("until", 2), ("after", 0.2))),
    # Longer than the lease: there is always some work to freeze, cut off and take over.
    _Sort(20, "slow", wish=(("seconds", 1.2),)),
    _Sort(14, "slow", _SYNC, wish=(("seconds", 1.6),)),
    _Sort(4, "permanent", becomes=Status.DEAD),
    _Sort(4, "swallow", wish=(("until", 1),)),
    _Sort(2, "hang", wish=(("until", 1),)),
    _Sort(2, "slow_sql", wish=(("until", 1),)),
    _Sort(1, "die", wish=(("until", 1),)),  # takes its process along
    _Sort(1, "abort", wish=(("until", 1),)),
)


def orders(seed: int) -> Iterator[Order]:
    """The events to send, without end. Their ids are fresh in every run; all else is the seed's."""
    chance = random.Random(f"{seed}/orders")
    weights = [sort.weight for sort in _SORTS]
    number = 0
    while True:
        number += 1
        (sort,) = chance.choices(_SORTS, weights)
        yield Order(
            event=sample(sort.behaviour, sort.type, livemode=False, **dict(sort.wish)),
            behaviour=sort.behaviour,
            type=sort.type,
            pause_seconds=chance.expovariate(_EVENTS_PER_SECOND),
            copies=chance.choices((1, 2, 3, 6), (50, 30, 15, 5))[0],
            repeats_after_seconds=tuple(
                chance.uniform(0, 12) for _ in range(chance.choices((0, 1, 2), (60, 30, 10))[0])
            ),
            hangs_up=chance.random() < 0.05,
            becomes=sort.becomes,
            seed=f"{seed}/order {number}",
        )
