"""`python -m tests.load.keyed`: what 100 events of one key cost 10,000 others that are due beside them.

Two runs of each kind in turns, each of one process as shipped on a database of its own: the others alone, and with the
events of the key among them, of the same age. Prints the others completed in a second, and when the hundred were done.
"""

import argparse
import asyncio
import time
from contextlib import AsyncExitStack
from pathlib import Path

import asyncpg
from rich.console import Console
from rich.table import Table

from tests.acceptance.harness import Sandbox
from tests.chaos.keyed_handlers import KEYED, SECONDS
from tests.fixtures import event_body
from tests.load.bench import SHIPPED, on_stores
from tests.stores import Stores

OTHER = "invoice.payment_failed"
_EVENT_ID = "evt_of_the_template"
_FILL = """
WITH due AS (
    SELECT $1 || md5($2 || n) AS event_id, now() - random() * interval '100 seconds' AS at
      FROM generate_series(1, $3::int) AS n
), event AS (
    INSERT INTO firstclaim.stripe_events
           (event_id, type, livemode, created_at, status, attempt, received_at, due_at, give_up_at)
    SELECT event_id, $2, false, at, 'pending', 0, at, at, now() + interval '3 days' FROM due
)
INSERT INTO firstclaim.stripe_event_payloads (event_id, body)
SELECT event_id, convert_to(replace($4, $5, event_id), 'UTF8') FROM due
"""
_LEFT = "SELECT count(*) FROM firstclaim.stripe_events WHERE type = $1 AND status <> 'completed'"


async def fill(connection: asyncpg.Connection, event_type: str, rows: int) -> None:
    """Put so many due events of one customer into the ledger."""
    body = event_body(event_type, _EVENT_ID, data={"object": {"metadata": {"customer": "cus_1"}}}).decode()
    await connection.execute(_FILL, "evt_1", event_type, rows, body, _EVENT_ID)


async def drained(stores: Stores, folder: Path, others: int, keyed: int) -> tuple[float, float]:
    """The others completed in a second, and the seconds until the events of the key were completed."""
    async with AsyncExitStack() as stack:
        sandbox = await Sandbox.prepare(stores, folder)
        stack.push_async_callback(sandbox.close)
        connection = await asyncpg.connect(sandbox.database_url)
        stack.push_async_callback(connection.close)
        handlers = "tests.load.brief,tests.chaos.keyed_handlers"
        service = await sandbox.service({**SHIPPED, "handlers": handlers}).start()
        await fill(connection, KEYED, keyed)
        await fill(connection, OTHER, others)
        began, took = time.monotonic(), dict.fromkeys((KEYED, OTHER), 0.0)
        while not all(took.values()):
            await asyncio.sleep(0.1)
            for event_type, seconds in took.items():
                if not seconds and not await connection.fetchval(_LEFT, event_type):
                    took[event_type] = time.monotonic() - began
        await service.kill()
        return others / took[OTHER], took[KEYED]


def main() -> None:
    """Print the rates."""
    parser = argparse.ArgumentParser(prog="python -m tests.load.keyed", description=__doc__)
    parser.add_argument("--others", type=int, default=10_000)
    parser.add_argument("--keyed", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=2)
    asked = parser.parse_args()
    table = Table("events of one key", "others /s", "the key done after, s", f"ideal of the key, s ({SECONDS} s each)")

    async def run(stores: Stores, folder: Path) -> None:
        for _ in range(asked.rounds):
            for keyed in (0, asked.keyed):
                rate, seconds = await drained(stores, folder, asked.others, keyed)
                table.add_row(str(keyed), f"{rate:.0f}", f"{seconds:.1f}", f"{keyed * SECONDS:.1f}")

    on_stores(run)
    Console().print(table)


if __name__ == "__main__":
    main()
