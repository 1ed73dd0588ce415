"""`python -m tests.load.small_profile`: fresh events of a process with 6 connections to Postgres, to one as shipped.

Two services of the same build on two databases of the same servers, in alternating rounds. One has the settings of
`docs/explanation/scaling.md` for a large fleet. The handler writes one row. Counted is what was completed: a process
with few slots answers much of a burst with 202, so the time until its last event is completed belongs to the round.
"""

import argparse
import asyncio
import statistics
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.acceptance.harness import Sandbox, eventually
from tests.acceptance.test_small_profile import small_profile
from tests.fixtures import SECRET
from tests.load.bench import on_stores, served
from tests.load.driver import Driver, Kind
from tests.stores import Stores

_DRAIN_SECONDS = 600.0
_UNFINISHED = """
SELECT EXISTS (SELECT FROM firstclaim.stripe_events WHERE status IN ('pending', 'processing', 'failed'))
"""


async def completed_per_second(sandbox: Sandbox, driver: Driver) -> float:
    """One round of fresh events, and the time until the last of them is completed."""
    rate = await asyncio.to_thread(driver.run, Kind.FRESH)
    ended_at = time.monotonic()
    await eventually(lambda: sandbox.fetch(_UNFINISHED), lambda rows: not rows[0][0], _DRAIN_SECONDS)
    return rate.deliveries / (rate.deliveries / rate.per_second + time.monotonic() - ended_at)


def main() -> None:
    """Print every round, and the median ratio."""
    parser = argparse.ArgumentParser(prog="python -m tests.load.small_profile", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5)
    asked = parser.parse_args()

    async def run(stores: Stores, folder: Path) -> None:
        async with (
            served(stores, folder, overrides=small_profile()) as small,
            served(stores, folder) as shipped,
        ):
            sides = [(sandbox, Driver(each.url, SECRET, asked.seconds)) for sandbox, each in (small, shipped)]
            Console().print(await _compare(sides, asked.rounds))

    on_stores(run)


async def _compare(sides: list[tuple[Sandbox, Driver]], rounds: int) -> Table:
    table = Table("round", title="Fresh events completed a second")
    for column in ("small", "as shipped", "ratio"):
        table.add_column(column, justify="right")
    ratios = []
    for turn in range(rounds + 1):
        order = (0, 1) if turn % 2 else (1, 0)
        seen = {number: await completed_per_second(*sides[number]) for number in order}
        if not turn:
            continue  # warm, and not counted
        ratios.append(seen[0] / seen[1])
        table.add_row(str(turn), f"{seen[0]:,.0f}", f"{seen[1]:,.0f}", f"{ratios[-1]:.2f}")
    table.add_row("median", "", "", f"{statistics.median(ratios):.2f}")
    return table


if __name__ == "__main__":
    main()
