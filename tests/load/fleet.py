"""`python -m tests.load.fleet`: what a fleet of 10, 100 and 1,000 processes asks of Postgres and Redis.

Two parts. The first measures what one event and one idle process cost, on a service as shipped, and multiplies:
connections, memory, bytes and commits add up. The second simulates recovery, where processes get in each other's way:
each looks at the oldest due events and tries to claim some, which another may have claimed since.

The simulation uses the service's own constants and its own choice (`Backlog.choose`). Its Postgres has no limit and
answers every statement in the same time, so what it shows is the cost of the competition alone.
"""

import argparse
import asyncio
import bisect
import heapq
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import asyncpg
from rich.console import Console
from rich.table import Table

from firstclaim.inbox import backlog
from firstclaim.inbox.backlog import Backlog
from firstclaim.settings import Settings
from tests.fixtures import SECRET
from tests.load.bench import on_stores, served
from tests.load.drain import processor_seconds
from tests.load.driver import Driver, Kind
from tests.load.markers import bytes_of_a_marker
from tests.stores import Stores

PROCESSES = (10, 100, 1000)
RATES = (10, 1_000, 10_000)  # events a second of the whole fleet
_DAY = 86_400

_COUNTERS = """
SELECT (SELECT count(*) FROM firstclaim.stripe_events) AS events,
       pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0') AS log_bytes,
       (SELECT sum(pg_total_relation_size(format('firstclaim.%I', name)))
          FROM unnest(ARRAY['stripe_events', 'stripe_event_payloads']) AS name) AS ledger_bytes,
       (SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()) AS commits
"""
_FLUSHED_SECONDS = 11  # a backend that works reports its statistics every second, an idle one after ten


@dataclass(frozen=True, slots=True)
class Costs:
    """Of one event that succeeds at its first attempt, and of one process that has nothing to do."""

    ledger_bytes: float
    log_bytes: float
    commits: float
    postgres_seconds: float
    marker_bytes: float
    idle_commits: float  # a second


async def measure(stores: Stores, folder: Path, seconds: float) -> Costs:
    """Send fresh events to one service as shipped, whose handler writes one row, and then nothing."""
    marker_bytes = await bytes_of_a_marker(stores.redis_url)
    async with served(stores, folder) as (sandbox, service):
        connection = await asyncpg.connect(sandbox.database_url)
        try:
            driver = Driver(service.url, SECRET, seconds)
            await asyncio.to_thread(driver.run, Kind.FRESH)  # connections, plans and the first pages are made
            before, spent = await _counters(connection), await _backends_seconds(connection)
            await asyncio.to_thread(driver.run, Kind.FRESH)
            spent = await _backends_seconds(connection) - spent
            after = await _counters(connection)
            await asyncio.sleep(seconds)
            idle = await _counters(connection)
        finally:
            await connection.close()
    events = after["events"] - before["events"]
    idle_commits = (idle["commits"] - after["commits"]) / (seconds + _FLUSHED_SECONDS)
    return Costs(
        ledger_bytes=float(after["ledger_bytes"] - before["ledger_bytes"]) / events,
        log_bytes=float(after["log_bytes"] - before["log_bytes"]) / events,
        commits=(after["commits"] - before["commits"] - _FLUSHED_SECONDS * idle_commits) / events,
        postgres_seconds=spent / events,
        marker_bytes=marker_bytes,
        idle_commits=idle_commits,
    )


async def _counters(connection: asyncpg.Connection) -> asyncpg.Record:
    await asyncio.sleep(_FLUSHED_SECONDS)
    [counters] = await connection.fetch(_COUNTERS)
    return counters


async def _backends_seconds(connection: asyncpg.Connection) -> float:
    rows = await connection.fetch(
        "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    return sum(processor_seconds(row["pid"]) for row in rows)


# -- recovery -----------------------------------------------------------------------------------------

LOOK_SECONDS = 0.004  # from the moment whose rows a look sees until its claims arrive at the server
CLAIM_SECONDS = 0.004


@dataclass(slots=True)
class Process:
    """One process that recovers: how many claims it holds, and when each of its slots is free."""

    slots: list[float]
    held: int = 0
    looks: bool = False


@dataclass(slots=True)
class Drain:
    """A backlog without end, and processes that work it off. Time in seconds, from 0 on."""

    processes: int
    slots: int
    handler_seconds: float
    tried: int = 0
    vain: int = 0
    completed: int = 0
    _due: list[int] = field(default_factory=list)  # the oldest of them, in order
    _rows: Iterator[int] = field(default_factory=itertools.count)
    _agenda: list[tuple[float, int, str, int, list[int]]] = field(default_factory=list)
    _number: Iterator[int] = field(default_factory=itertools.count)

    def run(self, seconds: float) -> float:
        """Completed events per second, once the fleet is in its stride."""
        fleet = [Process([0.0] * self.slots) for _ in range(self.processes)]
        for number in range(self.processes):
            self._plan(random.uniform(0, self.handler_seconds), "look", number)
        counted_from, began = 3 * self.handler_seconds, False
        while self._agenda:
            now, _, what, number, rows = heapq.heappop(self._agenda)
            if now >= counted_from + seconds:
                break
            if not began and now >= counted_from:
                began, self.tried, self.vain, self.completed = True, 0, 0, 0
            process = fleet[number]
            if what == "look":
                self._look(now, number, process)
            elif what == "claim":
                self._claim(now, number, process, rows)
            else:
                self.completed += 1
                process.held -= 1
                if not process.looks:
                    process.looks = True
                    self._plan(now, "look", number)
        return self.completed / seconds

    def _plan(self, at: float, what: str, number: int, rows: list[int] | None = None) -> None:
        heapq.heappush(self._agenda, (at, next(self._number), what, number, rows or []))

    def _look(self, now: float, number: int, process: Process) -> None:
        most = self.slots * 3 // 2 if self.handler_seconds < 1 else self.slots  # claims ahead: see `slots.py`
        claimable = most - process.held
        process.looks = claimable > 0
        if process.looks:
            limit = max(backlog._CANDIDATES_PER_SLOT * claimable, backlog._MIN_CANDIDATES)
            while len(self._due) < limit:
                self._due.extend(itertools.islice(self._rows, limit))
            seen = [str(row) for row in self._due[:limit]]
            chosen = [int(row) for row in Backlog.choose(seen, claimable)]
            self._plan(now + LOOK_SECONDS * random.uniform(0.5, 1.5), "claim", number, chosen)

    def _claim(self, now: float, number: int, process: Process, rows: list[int]) -> None:
        for row in rows:
            self.tried += 1
            at = bisect.bisect_left(self._due, row)
            if at == len(self._due) or self._due[at] != row:
                self.vain += 1
                continue
            del self._due[at]
            process.held += 1
            starts = max(now + CLAIM_SECONDS, heapq.heappop(process.slots))
            ends = starts + self.handler_seconds * random.uniform(0.8, 1.2)
            heapq.heappush(process.slots, ends)
            self._plan(ends, "end", number)
        self._plan(now + CLAIM_SECONDS, "look", number)


def main() -> None:
    """Print the four tables."""
    parser = argparse.ArgumentParser(prog="python -m tests.load.fleet", description=__doc__)
    parser.add_argument("--seconds", type=float, default=10, help="of load, and of idling, that are measured")
    parser.add_argument("--simulated-seconds", type=float, default=1)
    asked = parser.parse_args()
    settings = Settings()
    console = Console()

    async def run(stores: Stores, folder: Path) -> None:
        costs = await measure(stores, folder, asked.seconds)
        table = Table("one event", "", title="Measured")
        for name, value in (
            ("bytes in the ledger, with indexes", f"{costs.ledger_bytes:,.0f}"),
            ("bytes of write-ahead log", f"{costs.log_bytes:,.0f}"),
            ("commits", f"{costs.commits:.2f}"),
            ("Postgres, processor ms", f"{costs.postgres_seconds * 1000:.2f}"),
            ("bytes of its marker in Redis", f"{costs.marker_bytes:.0f}"),
            ("commits a second of an idle process", f"{costs.idle_commits:.2f}"),
        ):
            table.add_row(name, value)
        console.print(table, _process_table(settings, costs), _rate_table(settings, costs))

    on_stores(run)
    console.print(_drain_table(settings.handler_slots, asked.simulated_seconds))


def _process_table(settings: Settings, costs: Costs) -> Table:
    table = Table("processes", title="Multiplied: what processes cost, busy or not")
    for name in ("Postgres connections", "commits /s without events"):
        table.add_column(name, justify="right")
    for processes in PROCESSES:
        connections, commits = processes * settings.postgres_connections, processes * costs.idle_commits
        table.add_row(f"{processes:,}", f"{connections:,}", f"{commits:,.0f}")
    return table


def _rate_table(settings: Settings, costs: Costs) -> Table:
    table = Table("events /s", title="Multiplied: what events cost, over however many processes")
    for name in ("commits /s", "cores of Postgres", "log MB /s", "ledger GB a day", "Redis GB"):
        table.add_column(name, justify="right")
    for rate in RATES:
        table.add_row(
            f"{rate:,}",
            f"{rate * costs.commits:,.0f}",
            f"{rate * costs.postgres_seconds:,.1f}",
            f"{rate * costs.log_bytes / 1e6:,.1f}",
            f"{rate * _DAY * costs.ledger_bytes / 1e9:,.1f}",
            f"{rate * settings.marker_ttl_seconds * costs.marker_bytes / 1e9:,.1f}",
        )
    return table


def _drain_table(slots: int, seconds: float) -> Table:
    table = Table("processes", title=f"Simulated: a backlog, {slots} slots a process")
    for name in ("handler s", "ideal /s", "drained /s", "share", "tries in vain"):
        table.add_column(name, justify="right")
    for processes, handler_seconds in itertools.product(PROCESSES, (0.1, 1.0)):
        drain = Drain(processes, slots, handler_seconds)
        rate, ideal = drain.run(max(seconds, 3 * handler_seconds)), processes * slots / handler_seconds
        table.add_row(
            f"{processes:,}",
            f"{handler_seconds:g}",
            f"{ideal:,.0f}",
            f"{rate:,.0f}",
            f"{rate / ideal:.0%}",
            f"{drain.vain / max(1, drain.tried):.0%}",
        )
    return table


if __name__ == "__main__":
    main()
