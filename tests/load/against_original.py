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
other; printed is the median. Two are printed, and in both more is better: of requests per second, and of the processor
time that the receiver and its sessions of Postgres took for each request. At the end the databases of this service are
checked for effects that do not agree with the completion marks.
"""

import argparse
import contextlib
import io
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import psutil
from rich.console import Console
from rich.table import Table

from tests.acceptance.harness import PYTHON_PATH
from tests.acceptance.server_process import server_process
from tests.fixtures import SECRET
from tests.load.bench import on_stores, served
from tests.load.drain import processor_seconds
from tests.load.driver import Driver, Kind
from tests.stores import Stores, clone, drop

_ORIGINAL = Path(__file__).parent / "original"
_PAYMENT_FAILURES = "payment_failures"  # a row for each event: each is about an invoice of its own
_SHIPPED, _TWIN = "firstclaim.handlers", "tests.load.one_at_a_time"


_BACKENDS = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"


@dataclass(frozen=True, slots=True)
class Round:
    """What a receiver did in one round: requests per second, and processor microseconds for each request."""

    per_second: float
    receiver_us: float
    postgres_us: float


@dataclass(frozen=True, slots=True)
class Receiver:
    """A running receiver: its driver, the process that was started for it, and the address of its database."""

    name: str
    driver: Driver
    process: psutil.Process
    database_url: str | None = None

    async def run(self, kind: Kind) -> Round:
        """One round."""
        receiver, postgres = self._receiver_seconds(), await self._postgres_seconds()
        rate = self.driver.run(kind)
        receiver, postgres = self._receiver_seconds() - receiver, await self._postgres_seconds() - postgres
        return Round(rate.per_second, receiver / rate.deliveries * 1e6, postgres / rate.deliveries * 1e6)

    def _receiver_seconds(self) -> float:
        return sum(processor_seconds(each.pid) for each in (self.process, *self.process.children(recursive=True)))

    async def _postgres_seconds(self) -> float:
        if self.database_url is None:
            return 0.0
        connection = await asyncpg.connect(self.database_url)
        try:
            pids = [row["pid"] for row in await connection.fetch(_BACKENDS)]
        finally:
            await connection.close()
        return sum(processor_seconds(pid) for pid in pids if Path(f"/proc/{pid}").exists())


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
                serving = served(stores, folder, handlers, _PAYMENT_FAILURES)
                sandbox, service = await stack.enter_async_context(serving)
                driver = Driver(service.url, SECRET, asked.seconds)
                ours.append(Receiver(name, driver, psutil.Process(service.pid), sandbox.database_url))
            table = await _compare(original, ceilings, ours, asked.load or [*Kind], asked.rounds)
        Console().print(table)

    on_stores(run)


async def _compare(
    original: Receiver, ceilings: list[Receiver], ours: list[Receiver], kinds: list[Kind], rounds: int
) -> Table:
    table = Table("load", "receiver")
    for column in ("requests/s", "ratio", "processor us each", "of Postgres", "ratio of both"):
        table.add_column(column, justify="right")
    for kind in kinds:
        base, *others = ceilings if kind is Kind.COMPLETED else [original]
        receivers = [base, *others, *ours]
        for receiver in receivers:
            await receiver.run(kind)  # warm, and not counted
        seen = [
            {each.name: await each.run(kind) for each in (receivers if turn % 2 else receivers[::-1])}
            for turn in range(rounds)
        ]
        for receiver in receivers:
            mine, its = [row[receiver.name] for row in seen], [row[base.name] for row in seen]
            figures = (
                f"{statistics.median(each.per_second for each in mine):,.0f}",
                _median_ratio([each.per_second for each in mine], [each.per_second for each in its]),
                f"{statistics.median(each.receiver_us for each in mine):,.0f}",
                f"{statistics.median(each.postgres_us for each in mine):,.0f}",
                _median_ratio(
                    [each.receiver_us + each.postgres_us for each in its],
                    [each.receiver_us + each.postgres_us for each in mine],
                ),
            )
            table.add_row(kind, receiver.name, *figures)
        table.add_section()
    return table


def _median_ratio(one: Sequence[float], other: Sequence[float]) -> str:
    return f"{statistics.median(a / b for a, b in zip(one, other, strict=True)):.2f}"


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
            yield Receiver("original", driver, psutil.Process(server.process.pid), url)
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
