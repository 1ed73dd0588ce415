"""Runs a load test: starts the generator, shows its progress, prints the report and the verdict.

Guarantees: the figures are those that the generator measured in its own process. The exit code is 1 if an event was
lost or doubled, or if that is unknown although there is a database to read. Without a database, "lost" and "doubled"
are unknown, never 0. An interrupted run still has its figures and its verdict.
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
from firstclaim.formatting import number_of
from firstclaim.loadtest import capacity, verdict
from firstclaim.loadtest.plan import AnswerKind, Latencies, Observed, Plan, Progress, Result, entries
from firstclaim.loadtest.verdict import BROKEN, Fate, judge
from firstclaim.progress import progress_bar

_ALWAYS_SHOWN = (Fate.ONCE, Fate.LOST, Fate.DOUBLED)  # also if there is none
_LISTED_MOST = 20  # event ids of one fate; a longer list is not read
_CPU_SHARE_MOST = 0.9  # of a core: above it the generator itself was the limit that was measured


def run(plan: Plan, metrics_url: str, dsn: str | None, schema: str, settle_seconds: float, console: Console) -> int:
    """Send the load, print the report and the verdict, return the exit code. `dsn` None: no verdict.

    `metrics_url` is where the service says how long its handlers took.

    Raises `ConfigurationError`, `OperatorError`, `LedgerUnavailable`.
    """
    if importlib.util.find_spec("locust") is None:
        raise ConfigurationError(["a load test needs locust: pip install 'firstclaim[load]'"])
    if faults := [*plan.faults(), *_html_faults(plan.html)]:
        raise ConfigurationError(faults)
    if dsn is not None:
        asyncio.run(verdict.check(dsn, schema))
    console.print(f"run {plan.run}, seed {plan.seed}: events {plan.id_head}...", soft_wrap=True)
    before = capacity.read(metrics_url)
    result = generate(plan, console)
    after = capacity.read(metrics_url)
    report(plan, result, console)
    console.print(capacity.ceiling(before, after), soft_wrap=True)
    fates = None
    if dsn is not None:
        with _waiting(settle_seconds, console) as waiting:
            found = asyncio.run(verdict.read(dsn, schema, plan, settle_seconds, waiting))
        fates = judge(plan, result.journal, found)
    return report_verdict(plan, result, fates, console)


def _html_faults(html: str | None) -> Iterator[str]:
    """Checked before the load, not after it."""
    if html is None:
        return
    path = Path(html)
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        yield f"--html {html}: cannot be written"


# -- the generator's process --------------------------------------------------------------------------


def generate(plan: Plan, console: Console) -> Result:
    """Run the plan in a process of its own, and show its progress. SIGINT and SIGTERM end it early."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_generator, args=(plan, sender), daemon=True)
    with _ended_early_by_signals(process):
        process.start()
        sender.close()  # otherwise the generator's exit would not be the end of file for us
        result = _watch(plan, receiver, console)
        process.join()
    if result is None:
        raise OperatorError(f"The load generator ended without a result (exit code {process.exitcode}).")
    return result


def _generator(plan: Plan, pipe: Connection) -> None:
    """Runs in the new process. locust's fast HTTP client uses gevent's own sockets and TLS, so nothing is patched."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C reaches us, and we send it SIGTERM
    os.environ["LOCUST_SKIP_MONKEY_PATCH"] = "1"
    from firstclaim.loadtest.users import generate  # it must never be loaded in the process of a service

    generate(plan, pipe)


@contextmanager
def _ended_early_by_signals(process: BaseProcess) -> Iterator[None]:
    """Send SIGTERM to the generator, which then stops and reports."""

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
                message = pipe.recv()
            except EOFError:
                return None
            if isinstance(message, Result):
                return message
            bar.update(message.seconds, live_line(message, *before))
            before = message.seconds, message.deliveries


def live_line(now: Progress, seconds_before: float, deliveries_before: int) -> str:
    """The text beside the progress bar: the rate since the last update, and all deliveries by kind of answer."""
    rate = (now.deliveries - deliveries_before) / max(now.seconds - seconds_before, 0.001)
    kinds = [f"{each} {now.counts[each]:,}" for each in AnswerKind if now.counts.get(each)]
    return ", ".join([f"{now.seconds:.0f} s", f"{rate:,.0f}/s", *kinds])


# -- the report --------------------------------------------------------------------------------------


def report(plan: Plan, result: Result, console: Console) -> None:
    """Print throughput and latency by kind of answer, and a warning if the generator was the limit."""
    table = Table("answer")
    for column in ("deliveries", "per second", "p50 ms", "p95 ms", "p99 ms", "slowest"):
        table.add_column(column, justify="right")
    rows = [(str(kind), result.by_kind[kind]) for kind in AnswerKind if kind in result.by_kind]
    for name, latencies in [*rows, ("all", result.total)]:
        table.add_row(name, *_figures(latencies, result.seconds))
    console.print(table)
    requested = f"; requested: {plan.deliveries_per_second:,g}/s" if plan.deliveries_per_second else ""
    sent = sum(1 for _ in entries(result.journal))
    console.print(
        f"{result.total.count:,} deliveries of {sent:,} events in {result.seconds:.1f} s: "
        f"{result.total.count / result.seconds:,.0f}/s{requested}",
        soft_wrap=True,
    )
    for error, count in sorted(result.errors.items(), key=lambda item: -item[1])[:_LISTED_MOST]:
        console.print(Text(f"no answer: {error} ({count:,} times)"), soft_wrap=True)
    used = result.cpu_seconds / result.seconds
    if used > _CPU_SHARE_MOST:
        warning = f"The generator used {used:.0%} of a core: it was the limit, and the service can do more."
        console.print(Text(warning, style="yellow"), soft_wrap=True)


def _figures(latencies: Latencies, seconds: float) -> list[str]:
    milliseconds = (latencies.p50, latencies.p95, latencies.p99, latencies.slowest)
    return [f"{latencies.count:,}", f"{latencies.count / seconds:,.0f}", *(f"{each:,.1f}" for each in milliseconds)]


@contextmanager
def _waiting(settle_seconds: float, console: Console) -> Iterator[Callable[[int], None]]:
    """The callback that prints how many events `verdict.read` waits for; on a terminal the number counts down."""
    with console.status("reading the ledger") as status:
        printed = False

        def waiting(unfinished: int) -> None:
            nonlocal printed
            events = number_of(unfinished, "event is", "events are")
            line = f"{events} not settled yet; waiting up to {settle_seconds:g} s"
            if not printed and not console.is_terminal:
                console.print(line, soft_wrap=True)
            printed = True
            status.update(line)

        yield waiting


def report_verdict(plan: Plan, result: Result, fates: dict[Fate, list[str]] | None, console: Console) -> int:
    """Print the number of events of each fate, and the ids of those that broke the guarantee. Returns the exit code."""
    table = Table("verdict")
    table.add_column("events", justify="right")
    table.add_row("sent", f"{sum(1 for _ in entries(result.journal)):,}")
    if fates is None:
        # Without the database there are only the service's answers, and they can show a doubled event, but no lost one.
        twice = [
            plan.event_id(number)
            for number, observed in entries(result.journal)
            if Observed.PROCESSED_AGAIN in observed
        ]
        counts = {Fate.ONCE: "unknown", Fate.LOST: "unknown", Fate.DOUBLED: f"{len(twice):,}" if twice else "unknown"}
        broken = {Fate.DOUBLED: twice}
    else:
        counts = {fate: f"{len(ids):,}" for fate, ids in fates.items() if ids or fate in _ALWAYS_SHOWN}
        if not fates[Fate.ONCE]:  # nothing shows that the probe, which counts effects, is served at all
            counts |= {fate: "unknown" for fate in (Fate.LOST, Fate.DOUBLED) if not fates[fate]}
        broken = {fate: fates[fate] for fate in BROKEN}
    for fate, count in counts.items():
        table.add_row(fate, count)
    console.print(table)
    for fate, ids in broken.items():
        _list(fate, ids, console)
    code, sentence = _sentence(result, fates, broken)
    console.print(Text(sentence, style="bold red" if code else "bold green"), soft_wrap=True)
    return code


def _list(fate: Fate, ids: list[str], console: Console) -> None:
    for event_id in ids[:_LISTED_MOST]:
        console.print(Text(f"{fate}: {event_id}", style="red"), soft_wrap=True)
    if len(ids) > _LISTED_MOST:
        console.print(Text(f"{fate}: and {len(ids) - _LISTED_MOST:,} more", style="red"), soft_wrap=True)


def _sentence(result: Result, fates: dict[Fate, list[str]] | None, broken: dict[Fate, list[str]]) -> tuple[int, str]:
    """The exit code, and the sentence that explains it."""
    if found := [f"{len(ids):,} {fate}" for fate, ids in broken.items() if ids]:
        none_found = broken.get(Fate.LOST) and fates and not any(fates[each] for each in Fate if each is not Fate.LOST)
        hint = " This database has none of the events: is it the service's own?" if none_found else ""
        return 1, f"The guarantee was broken: {', '.join(found)}.{hint}"
    if not any(Observed.ACKNOWLEDGED in observed for _, observed in entries(result.journal)):
        return 1, "No event was accepted, so there is no verdict."
    if fates is None:
        return 0, "Lost and doubled events are unknown: there is no database to read (--database-url)."
    if not fates[Fate.ONCE]:
        return 1, (
            "Lost and doubled events are unknown: the probe handled no event. "
            "Serve with FIRSTCLAIM_HANDLERS=firstclaim.handlers.load_probe."
        )
    return 0, "No event was lost, and none was doubled."
