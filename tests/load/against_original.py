"""`python -m tests.load.against_original`: its figures, against the function that this service grew out of.

Five receivers take turns, and only the one that is measured has any load:

- `original`: that function on Node, from `tests/load/original`. npm installs its packages into a folder that is
  deleted at the end.
- `one at a time`: this service, with an ordinary handler that does what the shipped one does.
- `batch`: this service as it is shipped, whose handler takes a batch.
- `verify only`: an endpoint that verifies and parses, and stores nothing, as an application would write it: Starlette
  on uvicorn, with the check of stripe-python; for `completed`, where nothing is to be done.
- `verify only, our check`: the same with the signature check, the parser and the HTTP of this service.

Each has one process, and a database of its own on the same servers. A ratio is that of two rounds which followed each
other; printed is the median. At the end the databases of this service are checked for effects that do not agree with
the completion marks.
"""

import argparse
import contextlib
import io
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from tests.acceptance.harness import PYTHON_PATH
from tests.acceptance.server_process import server_process
from tests.fixtures import SECRET
from tests.load.bench import on_stores, served
from tests.load.driver import Driver, Kind
from tests.stores import Stores, clone, drop

_ORIGINAL = Path(__file__).parent / "original"
_PAYMENT_FAILURES = "payment_failures"  # a row for each event: each is about an invoice of its own
_SHIPPED, _TWIN = "firstclaim.handlers", "tests.load.one_at_a_time"


@dataclass(frozen=True, slots=True)
class Receiver:
    """A running receiver: its driver, and the process that was started for it."""

    name: str
    driver: Driver
    process: psutil.Process

    def run(self, kind: Kind) -> tuple[float, float]:
        """One round: requests per second, and the microseconds of processor time that its processes took for each."""
        before = self._processor_seconds()
        rate = self.driver.run(kind)
        return rate.per_second, (self._processor_seconds() - before) / rate.deliveries * 1e6

    def _processor_seconds(self) -> float:
        processes = [self.process, *self.process.children(recursive=True)]
        return sum(times.user + times.system for times in (each.cpu_times() for each in processes))


def main() -> None:
    """Print the medians of each load and receiver."""
    parser = argparse.ArgumentParser(prog="python -m tests.load.against_original", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4, help="of one round")
    parser.add_argument("--load", type=Kind, choices=[*Kind], action="append")
    asked = parser.parse_args()
    if missing := [command for command in ("wrk", "node", "npm") if shutil.which(command) is None]:
        raise SystemExit(f"not installed: {', '.join(missing)} (a sender other than wrk takes most of the machine)")

    async def run(stores: Stores, folder: Path) -> None:
        async with AsyncExitStack() as stack:
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))  # the output of servers that end
            original = await stack.enter_async_context(_original(stores, folder, asked.seconds))
            checks = {"verify only": ["--stripe"], "verify only, our check": []}
            ceilings = [
                await stack.enter_async_context(_verify_only(folder, asked.seconds, name, *options))
                for name, options in checks.items()
            ]
            ours = []
            for name, handlers in (("one at a time", _TWIN), ("batch", _SHIPPED)):
                _, service = await stack.enter_async_context(served(stores, folder, handlers, _PAYMENT_FAILURES))
                driver = Driver(service.url, SECRET, asked.seconds)
                ours.append(Receiver(name, driver, psutil.Process(service.pid)))
            table = _compare(original, ceilings, ours, asked.load or [*Kind], asked.rounds)
        Console().print(table)

    on_stores(run)


def _compare(
    original: Receiver, ceilings: list[Receiver], ours: list[Receiver], kinds: list[Kind], rounds: int
) -> Table:
    table = Table("load", "receiver")
    for column in ("requests/s", "processor us each", "ratio to the first"):
        table.add_column(column, justify="right")
    for kind in kinds:
        base, *others = ceilings if kind is Kind.COMPLETED else [original]
        receivers = [base, *others, *ours]
        for receiver in receivers:
            receiver.driver.run(kind)  # warm, and not counted
        seen = [
            {each.name: each.run(kind) for each in (receivers if turn % 2 else receivers[::-1])}
            for turn in range(rounds)
        ]
        for receiver in receivers:
            rate, cost = (statistics.median(row[receiver.name][column] for row in seen) for column in (0, 1))
            ratio = statistics.median(row[receiver.name][0] / row[base.name][0] for row in seen)
            table.add_row(kind, receiver.name, f"{rate:,.0f}", f"{cost:,.0f}", f"{ratio:.2f}")
        table.add_section()
    return table


def _installed(folder: Path) -> Path:
    """A copy of the original with its packages. Not in the tree, where every tool would look through them."""
    copy = shutil.copytree(_ORIGINAL, folder / "original")
    quiet = ("--silent", "--no-package-lock", "--no-fund", "--no-audit")
    if subprocess.run(["npm", "install", *quiet], cwd=copy, check=False).returncode:
        raise SystemExit("npm could not install the packages of tests/load/original/package.json")
    return copy


@asynccontextmanager
async def _original(stores: Stores, folder: Path, seconds: float) -> AsyncIterator[Receiver]:
    url = await clone(stores)
    try:
        environment = {
            "PATH": os.environ["PATH"],
            "DATABASE_URL": url,
            "SIGNING_SECRET": SECRET,
            "NODE_ENV": "production",
        }
        async with server_process(folder, environment, "node", str(_installed(folder) / "server.mjs")) as server:
            driver = Driver(f"{await server.origin()}/webhooks/stripe", SECRET, seconds)
            yield Receiver("original", driver, psutil.Process(server.process.pid))
    finally:
        await drop(url)


@asynccontextmanager
async def _verify_only(folder: Path, seconds: float, name: str, *options: str) -> AsyncIterator[Receiver]:
    command = (sys.executable, "-m", "tests.load.ceiling", "--port", "0", "--secret", SECRET, *options)
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": PYTHON_PATH}
    async with server_process(folder, environment, *command) as server:
        driver = Driver(f"{await server.origin()}/webhooks/stripe", SECRET, seconds)
        yield Receiver(name, driver, psutil.Process(server.process.pid))


if __name__ == "__main__":
    main()
