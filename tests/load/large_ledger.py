"""`python -m tests.load.large_ledger`: what 50 million rows cost a fresh event, and what a prune costs a live one.

Two services of the same build on two databases of the same server: one ledger is filled, the other is empty.

- Rate: both get fresh events in a closed loop, in alternating rounds.
- Cost: both get the same rate of fresh events in an open loop, half of what the empty one takes in a closed loop, in
  alternating rounds. Counted is the processor time that an event took the worker, and that it took Postgres (its
  backends and its writers).
- Prune: a million payloads of the large ledger are to be pruned, beside the same rate of fresh events. From round to
  round the prune waits between two of its batches, so that rounds with and without it alternate.

The rows came evenly within 395 days. Those of the last 89 days and those that are old enough to be pruned have a body,
that of a template; the others had theirs pruned. Their ids rise with time, and so do those that are sent, as Stripe's
do; `--ids random` is the worst case: `tests/load/README.md`. Fifty million rows take 25 GB and half an hour; the
database is dropped at the end.
"""

import argparse
import asyncio
import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import asyncpg
import psutil
from rich.console import Console
from rich.table import Table

from firstclaim.operations.commands import Commands
from firstclaim.operations.limits import PRUNE_BUSY_PERCENT
from firstclaim.operations.prune import Retention, prune
from firstclaim.sending.events import marked_event
from tests.acceptance.harness import Sandbox, Service
from tests.fixtures import SECRET
from tests.load.bench import execute, on_stores, served
from tests.load.drain import processor_seconds
from tests.load.driver import Driver, Ids, Kind, side_by_side
from tests.load.open_loop import latencies
from tests.stores import Stores

_BATCH = 1_000_000
_KEPT_DAYS, _PRUNED_DAYS, _OLDEST_DAYS = 89, 91, 395
_PAYLOAD_DAYS = 90
_TIMEOUT_SECONDS = 10.0
_SHARE = 0.5  # of what the empty ledger takes in a closed loop
_MARK = b"\xff" * 24

_TYPES = "ARRAY['invoice.paid', 'invoice.payment_failed', 'customer.subscription.updated', 'charge.succeeded']"

# The newest rows have a body, then come those that can be pruned, then those without one. $3: rows that are kept, $4:
# that can be pruned, $5: of all; $6, $7, $8: the days at the end of the first, at the beginning of the second, of all.
_AGE = """
(CASE WHEN n <= $3::int THEN n * $6::float8 / $3
      WHEN n <= $3 + $4::int THEN $7::float8 + (n - $3) * 4.0 / $4
      ELSE $7 + 4 + (n - $3 - $4) * ($8::float8 - $7 - 4) / greatest(1, $5::int - $3 - $4) END) * interval '1 day'"""
# $9: the time of the fill. Rising ids are those of `Driver`: the time in units of 100 us.
_AT = f"$9::timestamptz - {_AGE}"
_ID = {
    Ids.RANDOM: "left(md5(n::text), 24)",
    Ids.RISING: "lpad(to_hex((extract(epoch FROM at) * 10000)::bigint), 24, '0')",
}
_FILL_ROWS = """
INSERT INTO firstclaim.stripe_events
       (event_id, type, livemode, api_version, object_id, created_at, status, attempt, action, received_at, due_at,
        give_up_at, settled_at, claimed_at, claimed_by)
SELECT 'evt_1' || {id}, ({types})[1 + n % 4], true, '2026-10-28.acacia', 'in_1' || left(md5('in' || n), 24), at,
       'completed', 1, 'load_effect_recorded', at, at, at + interval '3 days', at + interval '20 milliseconds', at,
       'web-7d9f-2xkqp:42'
  FROM generate_series($1::int, $2::int) AS n, LATERAL (SELECT {at} AS at) AS received
 ORDER BY n DESC
"""
_FILL_PAYLOADS = """
INSERT INTO firstclaim.stripe_event_payloads (event_id, body, received_at)
SELECT 'evt_1' || id, convert_to(replace($10, $11, id), 'UTF8'), at
  FROM generate_series($1::int, $2::int) AS n, LATERAL (SELECT {at} AS at) AS received,
       LATERAL (SELECT {id} AS id) AS named
 ORDER BY n DESC
"""
_TABLES = ("firstclaim.stripe_events", "firstclaim.stripe_event_payloads")
_INDEXES = """
SELECT indrelid::regclass::text AS table, indexrelid::regclass::text AS name, pg_get_indexdef(indexrelid) AS definition,
       (SELECT conname FROM pg_constraint WHERE conindid = indexrelid AND contype = 'p') AS primary_key
  FROM pg_index WHERE indrelid = ANY($1::text[]::regclass[])
"""
_BACKENDS = """
SELECT pid FROM pg_stat_activity
 WHERE pid <> pg_backend_pid()
   AND (datname = current_database() OR backend_type IN ('checkpointer', 'background writer', 'walwriter', 'io worker'))
"""
_WITHOUT_EFFECT = """
SELECT count(*) FROM load_effects FULL JOIN
       (SELECT event_id FROM firstclaim.stripe_events WHERE received_at > $1 AND status = 'completed') AS e
       USING (event_id)
 WHERE e.event_id IS NULL OR load_effects.event_id IS NULL
"""


async def fill(database_url: str, rows: int, kept: int, prunable: int, ids: Ids) -> None:
    """Put so many settled events into an empty ledger; `kept` and `prunable` of them have a payload.

    The indexes are made at the end: into an index of random ids, rows go a hundred times slower.
    """
    connection = await asyncpg.connect(database_url)
    try:
        indexes = await connection.fetch(_INDEXES, _TABLES)
        for index in indexes:
            key = index["primary_key"]
            drop = f"DROP INDEX {index['name']}"
            await connection.execute(f"ALTER TABLE {index['table']} DROP CONSTRAINT {key}" if key else drop)
        began_at = await connection.fetchval("SELECT now()")
        ages = (kept, prunable, rows, float(_KEPT_DAYS), float(_PRUNED_DAYS), float(_OLDEST_DAYS), began_at)
        names = {"types": _TYPES, "at": _AT, "id": _ID[ids]}
        for last in range(rows, 0, -_BATCH):  # the oldest first, as they would have come
            await connection.execute(_FILL_ROWS.format(**names), max(1, last - _BATCH + 1), last, *ages)
        body = marked_event("invoice.payment_failed", "evt_1", b"m" * 24).decode()
        for last in range(kept + prunable, 0, -_BATCH):
            await connection.execute(
                _FILL_PAYLOADS.format(**names), max(1, last - _BATCH + 1), last, *ages, body, "m" * 24
            )
        await connection.execute("SET maintenance_work_mem = '1GB'")
        for index in indexes:
            key = index["primary_key"]
            make = f"ALTER TABLE {index['table']} ADD CONSTRAINT {key} PRIMARY KEY (event_id)"
            await connection.execute(make if key else index["definition"])
        for table in _TABLES:
            await connection.execute(f"VACUUM (ANALYZE) {table}")
        await connection.execute("CHECKPOINT")
    finally:
        await connection.close()


class Side:
    """One of the two ledgers, its service, and the processes whose time is counted."""

    def __init__(self, name: str, sandbox: Sandbox, service: Service, seconds: float, ids: Ids) -> None:
        self.name = name
        self._sandbox, self._service = sandbox, service
        self.driver = Driver(service.url, SECRET, seconds, ids=ids)

    async def live(self, per_second: float) -> tuple[list[float], float, float]:
        """One round of fresh events: latencies in ms; processor microseconds an event, of worker and Postgres."""
        worker, postgres = self._worker_seconds(), await self._postgres_seconds()
        seen = await latencies(self.driver, per_second)
        worker = self._worker_seconds() - worker
        postgres = await self._postgres_seconds() - postgres
        return seen, worker / len(seen) * 1e6, postgres / len(seen) * 1e6

    def _worker_seconds(self) -> float:
        root = psutil.Process(self._service.pid)
        return sum(processor_seconds(each.pid) for each in (root, *root.children(recursive=True)))

    async def _postgres_seconds(self) -> float:
        total = 0.0
        for row in await self._sandbox.fetch(_BACKENDS):
            with suppress(FileNotFoundError):  # it ended
                total += processor_seconds(row["pid"])
        return total


def _quantile(values: Sequence[float], quantile: float) -> float:
    return values[int(len(values) * quantile)]


async def compare_costs(full: Side, empty: Side, rounds: int, per_second: float) -> Table:
    """Fresh events into both ledgers, in alternating rounds."""
    table = Table("round", title=f"A fresh event, {per_second:,.0f} a second: processor us of worker and Postgres")
    for side in (full, empty):
        for column in ("worker", "Postgres", "p99 ms"):
            table.add_column(f"{side.name} {column}", justify="right")
    for column in ("worker", "Postgres", "both"):
        table.add_column(f"ratio {column}", justify="right")
    ratios: list[tuple[float, float, float]] = []
    for turn in range(rounds + 1):  # the first is not counted
        seen = {side.name: await side.live(per_second) for side in ((full, empty) if turn % 2 else (empty, full))}
        if not turn:
            continue
        (_, *of_full), (_, *of_empty) = seen[full.name], seen[empty.name]
        ratio = of_full[0] / of_empty[0], of_full[1] / of_empty[1], sum(of_full) / sum(of_empty)
        ratios.append(ratio)
        cells = [
            (f"{worker:.0f}", f"{postgres:.0f}", f"{_quantile(waits, 0.99):.1f}")
            for waits, worker, postgres in (seen[full.name], seen[empty.name])
        ]
        table.add_row(str(turn), *cells[0], *cells[1], *(f"{each:.2f}" for each in ratio))
    medians = (f"{statistics.median(column):.2f}" for column in zip(*ratios, strict=True))
    table.add_row("median", *[""] * 6, *medians)
    return table


@dataclass(slots=True)
class _Pruning:
    """A prune that goes on only while `allowed`."""

    sandbox: Sandbox
    busy_percent: int
    payloads: int = 0
    allowed: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        async with Commands.connect(self.sandbox.database_url, _TIMEOUT_SECONDS) as commands:
            await self.allowed.wait()
            async for batch in prune(commands, "bench", Retention(_PAYLOAD_DAYS, 400), busy_percent=self.busy_percent):
                self.payloads += batch.payloads
                await self.allowed.wait()


async def compare_prune(side: Side, sandbox: Sandbox, rounds: int, per_second: float, busy_percent: int) -> Table:
    """Fresh events into the large ledger, in rounds with a prune beside them and without, by turns."""
    table = Table("round", title=f"Beside a prune ({busy_percent}%), {per_second:,.0f} fresh events a second")
    for column in ("p50 ms", "p99 ms", "without: p50", "p99", "ratio of p99", "payloads pruned", "a second"):
        table.add_column(column, justify="right")
    ratios: list[float] = []
    pruning = _Pruning(sandbox, busy_percent)
    task = asyncio.create_task(pruning.run())
    for turn in range(rounds):
        waits: dict[bool, list[float]] = {}
        for beside in (True, False) if turn % 2 else (False, True):
            before, began = pruning.payloads, time.monotonic()
            if beside:
                pruning.allowed.set()
            waits[beside], _, _ = await side.live(per_second)
            pruning.allowed.clear()
            if beside:
                seconds, pruned = time.monotonic() - began, pruning.payloads - before
        if task.done():  # there was no more to prune
            break
        ratios.append(_quantile(waits[True], 0.99) / _quantile(waits[False], 0.99))
        shown = [f"{_quantile(waits[beside], at):.1f}" for beside in (True, False) for at in (0.5, 0.99)]
        table.add_row(str(turn + 1), *shown, f"{ratios[-1]:.2f}", f"{pruned:,}", f"{pruned / seconds:,.0f}")
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    table.add_row("median", "", "", "", "", f"{statistics.median(ratios):.2f}", "", "")
    return table


async def _check_and_empty(sandbox: Sandbox, began_at: object) -> None:
    """Every event that was sent has its effect; then nothing is left to compare, which would take minutes."""
    [row] = await sandbox.fetch(_WITHOUT_EFFECT, began_at)
    if row[0]:
        raise SystemExit(f"{row[0]} events or effects are without the other")
    await execute(sandbox, "TRUNCATE firstclaim.stripe_events, firstclaim.stripe_event_payloads, load_effects")


def main() -> None:
    """Print every round, and the median ratios."""
    parser = argparse.ArgumentParser(prog="python -m tests.load.large_ledger", description=__doc__)
    parser.add_argument("--rows", type=int, default=50_000_000)
    parser.add_argument("--kept", type=int, default=2_000_000, help="rows whose payload is not to be pruned yet")
    parser.add_argument("--prunable", type=int, default=1_000_000, help="rows whose payload is to be pruned")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=10, help="of one round")
    parser.add_argument("--rate", type=float, help="fresh events a second, instead of half of what is possible")
    parser.add_argument("--busy-percent", type=int, default=PRUNE_BUSY_PERCENT, help="of the prune")
    parser.add_argument("--ids", type=Ids, choices=[*Ids], default=Ids.RISING, help="of the events")
    asked = parser.parse_args()

    async def fill_ledger(sandbox: Sandbox) -> None:
        await fill(sandbox.database_url, asked.rows, asked.kept, asked.prunable, asked.ids)

    async def run(stores: Stores, folder: Path) -> None:
        async with served(stores, folder, prepare=fill_ledger) as full, served(stores, folder) as empty:
            await measure(full, empty, asked)

    on_stores(run)


async def measure(full: tuple[Sandbox, Service], empty: tuple[Sandbox, Service], asked: argparse.Namespace) -> None:
    """All comparisons, on ledgers that are ready."""
    large = Side(f"{asked.rows:,} rows", *full, asked.seconds, asked.ids)
    small = Side("empty", *empty, asked.seconds, asked.ids)
    [row] = await full[0].fetch("SELECT clock_timestamp() AS now")
    drivers = {side.name: side.driver for side in (large, small)}
    Console().print(side_by_side(drivers, [Kind.FRESH], asked.rounds))
    rate = asked.rate or _SHARE * small.driver.run(Kind.FRESH).per_second
    Console().print(await compare_costs(large, small, asked.rounds, rate))
    Console().print(await compare_prune(large, full[0], asked.rounds, rate, asked.busy_percent))
    for sandbox, _ in (full, empty):
        await _check_and_empty(sandbox, row["now"])


if __name__ == "__main__":
    main()
