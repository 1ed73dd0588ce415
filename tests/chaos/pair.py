"""Two Postgres servers by one address, of which one streams from the other, and the load while they fail over.

Guarantees: the primary is always the one that was promoted last. While the load runs, no row is read: the verdict
reads them at the end, on the last primary.
"""

import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

from tests.acceptance.harness import PROCESSED, Overrides, Service
from tests.chaos.history import History
from tests.chaos.load import Load
from tests.chaos.servers import PostgresServer

# How often each test makes its servers fail over. Where it is set, nothing else runs beside the test, and the limits
# are those of the documentation. In the lanes of CI, four tests share two cores: then that much longer is allowed.
FAILOVERS: Final = int(os.environ.get("TEST_FAILOVERS", "1"))
_SLACK: Final = 1 if "TEST_FAILOVERS" in os.environ else 4
BACK_SECONDS: Final = 1.0 * _SLACK  # after a promotion
BACK_BESIDE_A_FROZEN_HOST_SECONDS: Final = 3.0 * _SLACK
SWITCHOVER_SECONDS: Final = 5.0 * _SLACK  # the gap in the answers

# The timeouts of Postgres are those of production. What a killed primary leaves claimed is soon taken up.
SHIPPED: Final[Overrides] = {"postgres_timeout_seconds": 1.5, "lease_seconds": 2, "answer_budget_seconds": 5}

_STANDBY: Final = "standby"  # its application_name, see `PostgresServer.follow`


@dataclass(slots=True)
class Pair:
    """`first` and `second` are in the order of the address."""

    first: PostgresServer
    second: PostgresServer
    primary: PostgresServer = field(init=False)

    def __post_init__(self) -> None:
        self.primary = self.first

    @property
    def standby(self) -> PostgresServer:
        """The other one."""
        return self.second if self.primary is self.first else self.first

    @property
    def url(self) -> str:
        """The address of both."""
        return f"postgresql://postgres@{self.first.host},{self.second.host}/ledger?target_session_attrs=read-write"

    async def replicate(self, *, synchronous: bool, port: int | None = None) -> None:
        """Make the standby a copy of the primary that streams from it, by a proxy's `port` if one is given."""
        await self.primary.configure(synchronous_standby_names="")  # nothing waits while there is no standby
        await self.standby.follow(self.primary, port=port or int(self.primary.settings["port"]))
        if synchronous:
            await self.primary.configure(synchronous_standby_names=_STANDBY)

    async def promote(self) -> float:
        """Promote the standby; returns the instant at which it is the primary."""
        await self.standby.promote()
        self.primary = self.standby
        return now()


@dataclass(slots=True)
class FailoverLoad:
    """Deliveries to the services through every failover, and when they were answered."""

    history: History
    services: Sequence[Service]
    load: Load = field(init=False)

    def __post_init__(self) -> None:
        self.load = Load(self.history, self.services, senders=6, pause_seconds=0.01, looks=False)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Send deliveries while the block runs; then print what was counted."""
        with self.history.unread():
            async with self.load.running():
                yield
        print(f"{len(self.acknowledged)} events acknowledged ({self.load.counts}), gap {self.longest_gap:.2f} s")

    async def processed(self, events: int) -> None:
        """Wait until that many more deliveries were answered as processed."""
        await self.load.more_of(PROCESSED, events)

    async def back_after(self, began: float, service: Service | None = None) -> float:
        """Seconds from the instant `began` to the first answer "processed" after it, of one service or of any."""
        while not (found := [at for at in self._processed_at(service) if at > began]):
            await self.processed(1)
        print(f"processed again {found[0] - began:.2f} s after the promotion")
        return found[0] - began

    def longest_gap_of(self, service: Service | None, since: float = 0) -> float:
        """The longest time in seconds without an answer "processed", from an instant on."""
        answered = [at for at in self._processed_at(service) if at > since]
        return max((later - earlier for earlier, later in pairwise(answered)), default=0)

    @property
    def longest_gap(self) -> float:
        """The same of all services."""
        return self.longest_gap_of(None)

    @property
    def acknowledged(self) -> set[str]:
        """The ids of the events that were answered with a 2xx."""
        return {each.event_id for each in self.history.deliveries if each.promised}

    def _processed_at(self, service: Service | None) -> list[float]:
        deliveries = (each for each in self.history.deliveries if each.result == PROCESSED)
        return sorted(each.answered_at / 1e9 for each in deliveries if service is None or each.service == service.name)


def now() -> float:
    """The instant on the clock of the record."""
    return time.monotonic_ns() / 1e9
