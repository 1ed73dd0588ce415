"""The plan of a nemesis run, derived from its seed alone: the faults of each lane, and the events that are sent.

Guarantees: the same seed gives the same faults and events in the same order, whatever the machine is doing. The
lanes run side by side, so faults of several kinds coincide, and each target is broken in one way at a time. Every
kind of a lane's faults comes once before any comes twice. This module uses no socket and no clock.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from firstclaim.status import Status
from tests.acceptance.harness import Sample, sample
from tests.chaos.follow_up_build import SEVERAL
from tests.chaos.keyed_handlers import KEYED
from tests.chaos.new_build import ADDED
from tests.chaos.old_build import DROPPED

# A lane's pause between two faults. Most of the time something must work: otherwise nothing could go wrong.
_QUIET_SECONDS: Final = (2.0, 6.0)
_SERVICE_QUIET_SECONDS: Final = (3.0, 10.0)  # a service takes seconds to start
_LASTS_SECONDS: Final = (0.3, 2.5)
_EVENTS_PER_SECOND: Final = (
    8.0  # with copies and repeats about 20 deliveries per second: two busy cores keep up with them
)


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault of a lane. `pick` chooses the target, `portion` is a number from 0 to 1."""

    lane: str
    kind: str
    quiet_seconds: float  # before it
    lasts_seconds: float
    pick: int
    portion: float


def faults(seed: int, lane: str, kinds: Sequence[str]) -> Iterator[Fault]:
    """An endless sequence of the lane's faults, one round of all kinds after another."""
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
    """One event to send: the pause before it, the number of simultaneous copies, and its expected status.

    If only `one_build` handles it, it may also be ignored: unless that build has acknowledged it (the checker's I8).
    """

    event: Sample = field(repr=False)
    behaviour: str
    type: str
    pause_seconds: float
    copies: int
    repeats_after_seconds: tuple[float, ...]
    hangs_up: bool  # first, one client closes its connection without waiting for the answer
    expected: Status
    one_build: bool  # only one of the two builds has a handler for it
    seed: str  # of the choices that are made while it is sent


@dataclass(frozen=True, slots=True)
class _Sort:
    weight: int
    behaviour: str
    type: str = "invoice.payment_failed"
    expected: Status = Status.COMPLETED
    parameters: tuple[tuple[str, str | float], ...] = ()


_SYNC: Final = "invoice.paid"
_BATCHED: Final = "checkout.session.completed"
_OF_ONE_BUILD: Final = (ADDED, DROPPED)
_SORTS: Final = (
    _Sort(70, "plain"),
    _Sort(30, "plain", _SYNC),
    _Sort(15, "plain", "customer.subscription.updated"),
    _Sort(15, "plain", "charge.refunded", Status.IGNORED),  # it has no handler
    *(_Sort(10, "plain", one) for one in _OF_ONE_BUILD),
    *(_Sort(6, "slow", one, parameters=(("seconds", 1.2),)) for one in _OF_ONE_BUILD),
    *(_Sort(6, "fail", one, parameters=(("until", 1),)) for one in _OF_ONE_BUILD),
    _Sort(12, "fail", parameters=(("until", 1),)),
    _Sort(6, "fail", parameters=(("until", 3),)),
    _Sort(8, "fail", _SYNC, parameters=(("until", 2),)),
    _Sort(6, "retry", parameters=(("until", 2), ("after", 0.2))),
    # Longer than the lease: there is always a handler to freeze, cut off and take over.
    _Sort(20, "slow", parameters=(("seconds", 1.2),)),
    _Sort(14, "slow", _SYNC, parameters=(("seconds", 1.6),)),
    _Sort(40, "plain", _BATCHED),
    _Sort(8, "fail", _BATCHED, parameters=(("until", 1),)),
    _Sort(8, "slow", _BATCHED, parameters=(("seconds", 1.2),)),
    _Sort(1, "die", _BATCHED, parameters=(("until", 1),)),
    *(_Sort(10, customer, KEYED, parameters=(("customer", customer),)) for customer in ("cus_1", "cus_2")),
    _Sort(10, "plain", SEVERAL),
    _Sort(4, "permanent", expected=Status.DEAD),
    _Sort(4, "swallow", parameters=(("until", 1),)),
    _Sort(2, "hang", parameters=(("until", 1),)),
    _Sort(2, "slow_sql", parameters=(("until", 1),)),
    _Sort(1, "die", parameters=(("until", 1),)),  # kills its process
    _Sort(1, "abort", parameters=(("until", 1),)),
)


def orders(seed: int) -> Iterator[Order]:
    """An endless sequence of events to send. Their ids are new in every run; the seed decides everything else."""
    chance = random.Random(f"{seed}/orders")
    weights = [sort.weight for sort in _SORTS]
    number = 0
    while True:
        number += 1
        (sort,) = chance.choices(_SORTS, weights)
        yield Order(
            event=sample(sort.behaviour, sort.type, livemode=False, **dict(sort.parameters)),
            behaviour=sort.behaviour,
            type=sort.type,
            pause_seconds=chance.expovariate(_EVENTS_PER_SECOND),
            copies=chance.choices((1, 2, 3, 6), (50, 30, 15, 5))[0],
            repeats_after_seconds=tuple(
                chance.uniform(0, 12) for _ in range(chance.choices((0, 1, 2), (60, 30, 10))[0])
            ),
            hangs_up=chance.random() < 0.05,
            expected=sort.expected,
            one_build=sort.type in _OF_ONE_BUILD,
            seed=f"{seed}/order {number}",
        )
