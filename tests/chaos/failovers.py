"""What each failover of a test has cost. `pytest -m failover` shows all of them in a table when it ends.

Guarantees: every failover of a run is in the table, also one that cost too much; then its test fails. Lost and doubled
are counted in the ledger of the last primary, once every event has settled, and reconcile has run if the test runs it.
"""

import math
import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

from tests.acceptance.harness import SETTLE_SECONDS
from tests.chaos.checker import Effect, Evidence
from tests.chaos.history import Delivery, History
from tests.chaos.verdict import collect, settle, verdict

# How often each test makes its servers fail over. Where it is set, nothing else runs beside the test, and the limits
# are those of the documentation. In the lanes of CI, four tests share two cores: then that much longer is allowed.
FAILOVERS: Final = int(os.environ.get("TEST_FAILOVERS", "1"))
_SLACK: Final = 1 if "TEST_FAILOVERS" in os.environ else 4
# From a promotion to the next event that is processed; of Redis, to the last one that is deferred.
BACK_SECONDS: Final = 1.0 * _SLACK
BACK_BESIDE_A_FROZEN_HOST_SECONDS: Final = 3.0 * _SLACK
NORMAL_SECONDS: Final = 5.0 * _SLACK
SWITCHOVER_SECONDS: Final = 5.0 * _SLACK  # without an event that is processed


@dataclass(frozen=True, slots=True)
class Failover:
    """One failover, of `service` alone if it is given. `began_at` is in seconds, on the clock of the record.

    `missing`: acknowledged events that the promoted server does not have.
    """

    kind: str
    began_at: float
    interrupted_seconds: float
    back_seconds: float
    back_most_seconds: float
    interrupted_most_seconds: float = math.inf
    missing: Collection[str] = ()
    service: str | None = None


@dataclass(frozen=True, slots=True)
class Cost:
    """A row of the table: what became of the events that were acknowledged from this failover to the next one."""

    failover: Failover
    number: int
    acknowledged: int
    lost: int
    doubled: int

    @property
    def is_too_high(self) -> bool:
        """Whether an acknowledged event was lost or doubled, or the service was missed for too long."""
        failover = self.failover
        return bool(
            self.lost
            or self.doubled
            or failover.back_seconds >= failover.back_most_seconds
            or failover.interrupted_seconds >= failover.interrupted_most_seconds
        )

    @property
    def cells(self) -> dict[str, str]:
        """The row, by the heads of its columns."""
        return {
            "kind": self.failover.kind,
            "number": str(self.number),
            "acknowledged": str(self.acknowledged),
            "missing": str(len(self.failover.missing)),
            "lost": str(self.lost),
            "doubled": str(self.doubled),
            "interrupted": f"{self.failover.interrupted_seconds:.2f} s",
            "back": f"{self.failover.back_seconds:.2f} s",
            "at most": f"{self.failover.back_most_seconds:g} s",
        }


def costs(done: Sequence[Failover], deliveries: Sequence[Delivery], effects: Iterable[Effect]) -> Iterator[Cost]:
    """What each has cost. All events of `deliveries` have a handler, which has one effect."""
    times = Counter(effect.event_id for effect in effects)
    numbers: Counter[str] = Counter()
    for service in dict.fromkeys(each.service for each in done):
        those = [each for each in done if each.service == service]
        bounds = pairwise([0.0, *(each.began_at for each in those[1:]), math.inf])
        for failover, (begin, end) in zip(those, bounds, strict=True):
            ids = {
                each.event_id
                for each in deliveries
                if each.promised and service in (None, each.service) and begin <= each.answered_at / 1e9 < end
            }
            numbers[failover.kind] += 1
            lost, doubled = sum(not times[one] for one in ids), sum(times[one] > 1 for one in ids)
            yield Cost(failover, numbers[failover.kind], len(ids), lost, doubled)


@dataclass(slots=True)
class Failovers:
    """Those of one test, in their order. `record` hands a row to pytest."""

    history: History
    record: Callable[[str, object], None]
    done: list[Failover] = field(default_factory=list, init=False)

    async def verdict(self) -> Evidence:
        """Record what each has cost. Assert that each is low enough and has events, and every invariant."""
        await settle(self.history, SETTLE_SECONDS)
        found = list(costs(self.done, self.history.deliveries, (await collect(self.history)).effects))
        for cost in found:
            self.record("failover", cost.cells)
        assert found
        assert all(cost.acknowledged for cost in found)
        assert not [cost for cost in found if cost.is_too_high]
        return await verdict(self.history)


def longest_gap(instants: Sequence[float], since: float) -> float:
    """The longest time in seconds between two of these instants, the second of which is after `since`."""
    ordered = sorted(instants)
    return max((later - earlier for earlier, later in pairwise(ordered) if later > since), default=0.0)


def now() -> float:
    """The instant on the clock of the record."""
    return time.monotonic_ns() / 1e9
