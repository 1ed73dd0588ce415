"""The engine of `firstclaim load`: runs a plan, shows how it goes, says what came of it.

Guarantees: the figures are the generator's own, measured in its process; the exit code is 1 if an event was
lost or doubled, or if nobody can say that it was not although there is a database to ask; where there is none,
"lost" and "doubled" are unknown, never 0. An interrupted run still has its figures and its verdict.
"""

import asyncio
import importlib.util
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.table import Table
from rich.text import Text

from firstclaim.errors import ConfigurationError, OperatorError
from firstclaim.loadtest import verdict
from firstclaim.loadtest.plan import AnswerKind, Latencies, Observed, Plan, Progress, Result, entries
from firstclaim.loadtest.verdict import BROKEN, Fate, judge
from firstclaim.progress import progress_bar

_NAMED_MOST = 20  # event ids of one fate; more help nobody
_CPU_OF_ITS_OWN = 0.9  # of a core: a generator that needs this much is what was measured


def run(plan: Plan, dsn: str | None, settle_seconds: float, console: Console) -> int:
    """Load, report, judge; returns the exit code. `dsn` None: no verdict.

    Raises `ConfigurationError`, `OperatorError`, `LedgerUnavailable`.
    """
    if importlib.util.find_spec("locust") is None:
        raise ConfigurationError(["a load test needs locust: pip install 'firstclaim[load]'"])
    if faults := [*plan.faults(), *_html_faults(plan.html)]:
        raise ConfigurationError(faults)
    if dsn is not None:
        asyncio.run(verdict.check(dsn))
    console.print(f"run {plan.run}, seed {plan.seed}: events {plan.id_head}...", soft_wrap=True)
    result = generate(plan, console)
    report(plan, result, console)
    fates = None
    if dsn is not None:
        with _waiting(settle_seconds, console) as waiting:
            found = asyncio.run(verdict.read(dsn, plan, settle_seconds, waiting))
        fates = judge(plan, result.journal, found)
    return report_verdict(plan, result, fates, console)


def _html_faults(html: str | None) -> Iterator[str]:
    """Said before the load, not after it."""
    if html is None:
        return
    path = Path(html)
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        yield f"--html {html}: cannot be written"


# -- the generator's process --------------------------------------------------------------------------


def generate(plan: Plan, console: Console) -> Result:
    """Run the plan in a process of its own, with a live line meanwhile; SIGINT and SIGTERM end it early."""
    context = multiprocessing.get_context("spawn")
    ours, its = context.Pipe(duplex=False)
    process = context.Process(target=_generator, args=(plan, its), daemon=True)
    with _ended_early_by_signals(process):
        process.start()
        its.close()  # or its end would be no end of file
        result = _watch(plan, ours, console)
        process.join()
    if result is None:
        raise OperatorError(f"The load generator ended without a result (exit code {process.exitcode}).")
    return result


def _generator(plan: Plan, pipe: Connection) -> None:
    """In the new process. locust's fast HTTP client is on gevent's sockets and TLS: nothing is patched for it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal's Ctrl-C it hears from us
    os.environ["LOCUST_SKIP_MONKEY_PATCH"] = "1"
    from firstclaim.loadtest.users import generate  # nothing of it may be in the process of a service

    generate(plan, pipe)


@contextmanager
def _ended_early_by_signals(process: BaseProcess) -> Iterator[None]:
    """Hand them on: the generator then stops and reports."""

    def end(_signum: int, _frame: FrameType | None) -> None:
        if process.is_alive():
            process.terminate()

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(plan: Plan, pipe: Connection, console: Console) -> Result | None:
    with progress_bar(console, "starting", plan.duration_seconds, counted=False) as bar:
        before = 0.0, 0
        while True:
            try:
                said = pipe.recv()
            except EOFError:
                return None
            if isinstance(said, Result):
                return said
            bar.update(said.seconds, live_line(said, *before))
            before = said.seconds, said.deliveries


def live_line(now: Progress, seconds_before: float, deliveries_before: int) -> str:
    """How it goes: the rate since the last look, and all deliveries by what they were told."""
    rate = (now.deliveries - deliveries_before) / max(now.seconds - seconds_before, 0.001)
    kinds = [f"{each} {now.counts[each]:,}" for each in AnswerKind if now.counts.get(each)]
    return ", ".join([f"{now.seconds:.0f} s", f"{rate:,.0f}/s", *kinds])


# -- what is said -------------------------------------------------------------------------------------


def report(plan: Plan, result: Result, console: Console) -> None:
    """Print throughput and latency by answer, and what limits their meaning."""
    table = Table("answer")
    for column in ("deliveries", "per second", "p50 ms", "p95 ms", "p99 ms", "slowest"):
        table.add_column(column, justify="right")
    rows = [(str(kind), result.by_kind[kind]) for kind in AnswerKind if kind in result.by_kind]
    for name, took in [*rows, ("all", result.total)]:
        table.add_row(name, *_figures(took, result.seconds))
    console.print(table)
    asked = f"; asked for {plan.deliveries_per_second:,g}/s" if plan.deliveries_per_second else ""
    sent = sum(1 for _ in entries(result.journal))
    console.print(
        f"{result.total.count:,} deliveries of {sent:,} events in {result.seconds:.1f} s: "
        f"{result.total.count / result.seconds:,.0f}/s{asked}",
        soft_wrap=True,
    )
    for error, count in sorted(result.errors.items(), key=lambda item: -item[1])[:_NAMED_MOST]:
        console.print(Text(f"no answer: {error} ({count:,} times)"), soft_wrap=True)
    used = result.cpu_seconds / result.seconds
    if used > _CPU_OF_ITS_OWN:
        warning = f"The generator used {used:.0%} of a core: it was the limit, and its figures are too low."
        console.print(Text(warning, style="yellow"), soft_wrap=True)


def _figures(took: Latencies, seconds: float) -> list[str]:
    milliseconds = (took.p50, took.p95, took.p99, took.slowest)
    return [f"{took.count:,}", f"{took.count / seconds:,.0f}", *(f"{each:,.1f}" for each in milliseconds)]


@contextmanager
def _waiting(settle_seconds: float, console: Console) -> Iterator[Callable[[int], None]]:
    """Hands out what `read` tells how many events it waits for: a line, and on a terminal one that counts down."""
    with console.status("reading the ledger") as status:
        said = False

        def waiting(unfinished: int) -> None:
            nonlocal said
            line = f"{unfinished:,} events are not settled yet; waiting up to {settle_seconds:g} s"
            if not said and not console.is_terminal:
                console.print(line, soft_wrap=True)
            said = True
            status.update(line)

        yield waiting


def report_verdict(plan: Plan, result: Result, fates: dict[Fate, list[str]] | None, console: Console) -> int:
    """Print what became of the events, naming those that it should not have become of; returns the exit code."""
    table = Table("verdict")
    table.add_column("events", justify="right")
    table.add_row("sent", f"{sum(1 for _ in entries(result.journal)):,}")
    if fates is None:
        # Without the database only the service's own word counts, and that can show a doubled event, no more.
        twice = [
            plan.event_id(number) for number, noted in entries(result.journal) if Observed.PROCESSED_AGAIN in noted
        ]
        counts = {Fate.ONCE: "unknown", Fate.LOST: "unknown", Fate.DOUBLED: f"{len(twice):,}" if twice else "unknown"}
        broken = {Fate.DOUBLED: twice}
    else:
        counts = {
            fate: f"{len(ids):,}" for fate, ids in fates.items() if ids or fate in BROKEN[:2] or fate is Fate.ONCE
        }
        broken = {fate: fates[fate] for fate in BROKEN}
    for fate, count in counts.items():
        table.add_row(fate, count)
    console.print(table)
    for fate, ids in broken.items():
        _name(fate, ids, console)
    code, sentence = _sentence(result, fates, broken)
    console.print(Text(sentence, style="bold red" if code else "bold green"), soft_wrap=True)
    return code


def _name(fate: Fate, ids: list[str], console: Console) -> None:
    for event_id in ids[:_NAMED_MOST]:
        console.print(Text(f"{fate}: {event_id}", style="red"), soft_wrap=True)
    if len(ids) > _NAMED_MOST:
        console.print(Text(f"{fate}: and {len(ids) - _NAMED_MOST:,} more", style="red"), soft_wrap=True)


def _sentence(result: Result, fates: dict[Fate, list[str]] | None, broken: dict[Fate, list[str]]) -> tuple[int, str]:
    """The exit code, and why."""
    if found := [f"{len(ids):,} {fate}" for fate, ids in broken.items() if ids]:
        nowhere = broken.get(Fate.LOST) and fates and not any(fates[each] for each in Fate if each is not Fate.LOST)
        hint = " None is in this database: is it the service's own?" if nowhere else ""
        return 1, f"Not as promised: {', '.join(found)}.{hint}"
    if not any(Observed.ACKNOWLEDGED in noted for _, noted in entries(result.journal)):
        return 1, "Nothing was accepted, so there is nothing to judge."
    if fates is None:
        return 0, "Lost and doubled are unknown: no database to ask (--database-url)."
    if not fates[Fate.ONCE]:
        return 0, (
            "Lost and doubled are unknown: the probe handled nothing. "
            "Serve with FIRSTCLAIM_HANDLERS=firstclaim.handlers.load_probe."
        )
    return 0, "Nothing lost, nothing doubled."
