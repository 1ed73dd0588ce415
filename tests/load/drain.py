"""`python -m tests.load.drain`: how fast one process, and several, work off a large backlog of handlers of 100 ms.

The ideal is processes x slots / 0.1 s. What an event costs the processor is a second limit, so it is measured too, and
stated as the rate that all cores together could reach: choose the slots so that the ideal stays below it. All services
are as shipped, except for their slots and the size of their pools.
"""

import argparse
import asyncio
import os
import time
from contextlib import AsyncExitStack
from pathlib import Path

import asyncpg
from rich.console import Console
from rich.table import Table

from tests.acceptance.harness import Sandbox
from tests.fixtures import event_body
from tests.load.bench import SHIPPED, on_stores
from tests.load.sleeper import SECONDS
from tests.stores import Stores

_BATCH = 50_000
_EVENT_ID = "evt_of_the_template"

_FILL = """
WITH due AS (
    SELECT 'evt_1' || left(md5(n::text), 24) AS event_id, now() - n * interval '10 milliseconds' AS at
      FROM generate_series($1::int, $2::int) AS n
), event AS (
    INSERT INTO firstclaim.stripe_events
           (event_id, type, livemode, created_at, status, attempt, received_at, due_at, give_up_at)
    SELECT event_id, 'invoice.payment_failed', false, at, 'pending', 0, at, at, now() + interval '3 days' FROM due
)
INSERT INTO firstclaim.stripe_event_payloads (event_id, body)
SELECT event_id, convert_to(replace($3, $4, event_id), 'UTF8') FROM due
"""


async def fill(connection: asyncpg.Connection, rows: int) -> None:
    """Put so many due events into the ledger, which no process has seen."""
    body = event_body(id=_EVENT_ID).decode()
    for first in range(1, rows + 1, _BATCH):
        await connection.execute(_FILL, first, min(first + _BATCH - 1, rows), body, _EVENT_ID)
    await connection.execute("VACUUM (ANALYZE) firstclaim.stripe_events")


class Drain:
    """Some processes on one backlog."""

    def __init__(self, sandbox: Sandbox, connection: asyncpg.Connection, slots: int) -> None:
        self._sandbox = sandbox
        self._connection = connection
        self._settings = {**SHIPPED, "handlers": "tests.load.sleeper", "handler_slots": slots, "ingest_connections": 2}

    async def measure(self, processes: int, seconds: float) -> tuple[float, float]:
        """Completed events per second, and the seconds of processor time that each cost."""
        services = [self._sandbox.service(self._settings) for _ in range(processes)]
        await asyncio.gather(*(service.start() for service in services))
        pids = [service.pid for service in services]
        await asyncio.sleep(seconds / 5)  # until their connections are open, and caches and plans are warm
        began, before, spent = time.monotonic(), await self._completed(), await self._processor_seconds(pids)
        await asyncio.sleep(seconds)
        events, spent = await self._completed() - before, await self._processor_seconds(pids) - spent
        took = time.monotonic() - began
        await asyncio.gather(*(service.kill() for service in services))
        return events / took, spent / max(1, events)

    async def _completed(self) -> int:
        count: int = await self._connection.fetchval("SELECT count(*) FROM effects")
        return count

    async def _processor_seconds(self, pids: list[int]) -> float:
        """Of these processes, and of all backends of Postgres that work for them."""
        backends = await self._connection.fetch(
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        return sum(processor_seconds(pid) for pid in (*pids, *(row["pid"] for row in backends)))


def processor_seconds(pid: int) -> float:
    """What a process has spent so far (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Print the rates, each with its share of the ideal."""
    parser = argparse.ArgumentParser(prog="python -m tests.load.drain", description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=20)
    asked = parser.parse_args()
    table = Table("processes")
    for column in ("ideal /s", "drained /s", "share", "processor ms an event", f"{os.cpu_count()} cores could do /s"):
        table.add_column(column, justify="right")

    async def run(stores: Stores, folder: Path) -> None:
        async with AsyncExitStack() as stack:
            sandbox = await Sandbox.prepare(stores, folder)
            stack.push_async_callback(sandbox.close)
            connection = await asyncpg.connect(sandbox.database_url)
            stack.push_async_callback(connection.close)
            await fill(connection, asked.rows)
            drain = Drain(sandbox, connection, asked.slots)
            for processes in (1, asked.processes):
                ideal = processes * asked.slots / SECONDS
                rate, cost = await drain.measure(processes, asked.seconds)
                could = (os.cpu_count() or 1) / cost
                table.add_row(
                    str(processes),
                    f"{ideal:.0f}",
                    f"{rate:.0f}",
                    f"{rate / ideal:.0%}",
                    f"{cost * 1000:.1f}",
                    f"{could:.0f}",
                )

    on_stores(run)
    Console().print(table)


if __name__ == "__main__":
    main()
