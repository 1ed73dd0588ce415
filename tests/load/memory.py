"""`python -m tests.load.memory`: what a worker holds after 20,000 deliveries, and after 200,000.

A process that keeps something of each delivery shows it here: the second figure is then far above the first.
The first is not taken at the start, because pools, caches and the allocator have to fill once.
"""

import argparse
import re
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.acceptance.harness import Sandbox, Service
from tests.fixtures import SECRET
from tests.load.bench import on_servers
from tests.load.driver import Driver, Kind


def resident_megabytes(pid: int) -> float:
    """What the kernel holds in memory of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found, status
    return int(found[1]) / 1024


def main() -> None:
    """Print the deliveries, the memory, and how much it grew between the two."""
    parser = argparse.ArgumentParser(prog="python -m tests.load.memory", description=__doc__)
    parser.add_argument("--first", type=int, default=20_000)
    parser.add_argument("--last", type=int, default=200_000)
    parser.add_argument("--seconds", type=float, default=5, help="of one round; half of them are fresh events")
    asked = parser.parse_args()

    async def measure(services: list[tuple[Sandbox, Service]]) -> None:
        [(_, service)] = services
        driver = Driver(service.url, SECRET, asked.seconds)
        table = Table("deliveries")
        table.add_column("resident MB", justify="right")
        deliveries, sizes = 0, []
        table.add_row("0", f"{resident_megabytes(service.pid):.1f}")
        for mark in (asked.first, asked.last):
            while deliveries < mark:
                deliveries += sum(driver.run(kind).deliveries for kind in (Kind.FRESH, Kind.DUPLICATES))
            sizes.append(resident_megabytes(service.pid))
            table.add_row(f"{deliveries:,}", f"{sizes[-1]:.1f}")
        table.add_row("ratio", f"{sizes[1] / sizes[0]:.2f}")
        Console().print(table)

    on_servers(1, measure)


if __name__ == "__main__":
    main()
