"""Two Postgres servers by one address, of which one streams from the other, and the load while they fail over.

Guarantees: the primary is always the one that was promoted last. While the load runs, no row is read: the verdict
reads them at the end, on the last primary.
"""

import math
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

from tests.acceptance.harness import PROCESSED, Overrides, Service
from tests.chaos.failovers import BACK_SECONDS, Failover, Failovers, longest_gap, now
from tests.chaos.load import Load
from tests.chaos.servers import PostgresServer

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

    failovers: Failovers
    services: Sequence[Service]
    load: Load = field(init=False)

    def __post_init__(self) -> None:
        history = self.failovers.history
        self.load = Load(history, self.services, senders=6, pause_seconds=0.01, looks=False)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Send deliveries while the block runs."""
        with self.failovers.history.unread():
            async with self.load.running():
                yield

    async def processed(self, events: int) -> None:
        """Wait until that many more deliveries were answered as processed."""
        await self.load.more_of(PROCESSED, events)

    async def back(
        self,
        kind: str,
        began: float,
        promoted: float,
        most_seconds: float = BACK_SECONDS,
        *,
        interrupted_most_seconds: float = math.inf,
        missing: Collection[str] = (),
        service: Service | None = None,
    ) -> None:
        """Wait for an event that is processed after the instant `promoted` (by `service`), and note the failover."""
        while not (found := [at for at in self._processed_at(service) if at > promoted]):
            await self.processed(1)
        self.failovers.done.append(
            Failover(
                kind,
                began,
                interrupted_seconds=longest_gap(self._processed_at(service), since=began),
                back_seconds=min(found) - promoted,
                back_most_seconds=most_seconds,
                interrupted_most_seconds=interrupted_most_seconds,
                missing=missing,
                service=service.name if service else None,
            )
        )

    @property
    def acknowledged(self) -> set[str]:
        """The ids of the events that were answered with a 2xx."""
        return {each.event_id for each in self.failovers.history.deliveries if each.promised}

    def _processed_at(self, service: Service | None) -> list[float]:
        return [
            each.answered_at / 1e9
            for each in self.failovers.history.deliveries
            if each.result == PROCESSED and (service is None or each.service == service.name)
        ]
