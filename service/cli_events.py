"""`firstclaim events` and `firstclaim stats`: parses, calls `service.inbox.operations`, prints; decides nothing.

`--json` prints one JSON object per event (or one in all), its fields are those of the ledger's row; fields may be
added, none is renamed. Exit codes: 0 done · 1 the answer is no (unknown id, refused, or with `--wait` not all of them
completed) · 2 the command line is wrong · 3 Postgres is away.
"""

import asyncio
import getpass
import re
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated, Any, TypeVar

import orjson
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table

from service.inbox.model import Status
from service.inbox.operations import ROW_DAYS_LEAST, Listed, Operations, Selection
from service.settings import Settings
from service.terminal import database, dsn_of, fail, out, reported

T = TypeVar("T")

app = typer.Typer(no_args_is_help=True, help="See what became of events, and put it right.")

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_COLOURS = {
    Status.PENDING: "yellow",
    Status.PROCESSING: "cyan",
    Status.COMPLETED: "green",
    Status.IGNORED: "bright_black",
    Status.FAILED: "magenta",
    Status.DEAD: "red",
}
_POLL_SECONDS = 0.5


def _duration(text: str) -> float:
    """Seconds; raises a usage error."""
    found = re.fullmatch(r"(\d{1,6})([smhd])", text)
    if found is None:
        raise typer.BadParameter(f"expected a number and s, m, h or d (90s, 15m, 2h, 3d), not {text!r}")
    return int(found[1]) * _UNITS[found[2]]


def _age(text: str) -> Any:
    return typer.Option(parser=_duration, metavar="90s|15m|2h|3d", help=text)


Ids = Annotated[list[str] | None, typer.Argument(metavar="ID...", help="Event ids.")]
Statuses = Annotated[list[Status] | None, typer.Option("--status", help="Only in this status; again for more.")]
Type = Annotated[str | None, typer.Option("--type", help='Only of this type, or of "prefix.*".')]
Account = Annotated[str | None, typer.Option("--account", help="Only of this connected account.")]
OlderThan = Annotated[float | None, _age("Only if it came in longer ago.")]
NewerThan = Annotated[float | None, _age("Only if it came in since.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object per line.")]


@app.command("list")
def list_events(
    status: Statuses = None,
    event_type: Type = None,
    account: Account = None,
    older_than: OlderThan = None,
    newer_than: NewerThan = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="How many, the newest first.")] = 50,
    as_json: AsJson = False,
) -> None:
    """List events, the newest first."""
    selection = Selection((), status or (), event_type, account, older_than, newer_than)
    with reported():
        found = _asked(lambda operations: operations.list_events(selection, limit))
    if as_json:
        for each in found:
            _print_json(asdict(each))
        return
    table = Table("event", "type", "status", "attempts", "received", "what came of it", box=None, pad_edge=False)
    for each in found:
        table.add_row(
            each.event_id,
            each.type,
            f"[{_COLOURS[each.status]}]{each.status}[/]",
            str(each.attempt),
            _ago(each.received_at),
            _plain(each.last_error or each.action or ""),
        )
    out.print(table if found else "no such event")
    if len(found) == limit:
        out.print(f"the newest {limit}; --limit shows more")


@app.command()
def show(
    event_id: Annotated[str, typer.Argument(metavar="ID", help="Event id.")],
    payload: Annotated[
        bool, typer.Option("--payload", help="Also the signed body: it may hold personal data.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show one event: what it is, what became of it, and what was done to it by hand."""

    async def ask(operations: Operations) -> tuple[Listed | None, list[dict[str, Any]], bytes | None]:
        event = await operations.find(event_id)
        body = await operations.payload(event_id) if payload else None
        return event, await operations.actions_on(event_id), body

    with reported():
        event, actions, body = _asked(ask)
    if event is None:
        fail(f"the ledger has no event {event_id!r}", 1)
    if as_json:
        extra = {"payload": None if body is None else orjson.loads(body)} if payload else {}
        _print_json({**asdict(event), "actions": actions, **extra})
        return
    for name, value in asdict(event).items():
        shown = f"{value:%Y-%m-%d %H:%M:%S} UTC ({_ago(value)})" if isinstance(value, datetime) else value
        if name == "status":
            shown = f"[{_COLOURS[event.status]}]{event.status}[/]"
        elif value is not None:
            shown = _plain(str(shown))
        out.print(f"[bold]{name:12}[/] {'-' if value is None else shown}", soft_wrap=True)
    for each in actions:
        out.print(f"[bold]{each['action']:12}[/] {each['at']:%Y-%m-%d %H:%M:%S} UTC by {_plain(each['operator'])}")
    if payload:
        out.print("its payload has been pruned" if body is None else _plain(body.decode()), soft_wrap=True)


@app.command()
def replay(
    ids: Ids = None,
    status: Statuses = None,
    event_type: Type = None,
    account: Account = None,
    older_than: OlderThan = None,
    newer_than: NewerThan = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say how many, and change nothing.")] = False,
    count: Annotated[int | None, typer.Option(help="How many you expect, instead of being asked.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Also completed ones: their effects happen again.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Follow them until all are settled, or failed again.")] = False,
) -> None:
    """Make events due again: failures reset, the attempt's number kept; running services take them up.

    Named by id, or by what --status and the others say. What is being handled right now is refused.
    """
    selection = Selection(tuple(ids or ()), status or (), event_type, account, older_than, newer_than)
    if selection.is_empty:
        raise typer.BadParameter("name events by id, or say which with --status and the others")
    with reported(), database() as settings:
        found = asyncio.run(_on(settings, lambda operations: operations.count(selection)))
        if ids and (missing := len(set(ids)) - sum(found.values())):
            known = asyncio.run(_on(settings, lambda operations: operations.list_events(selection, len(ids))))
            unknown = sorted(set(ids) - {each.event_id for each in known})
            fail(f"{missing} of these are not in the ledger, or not as selected: {', '.join(unknown)}", 1)
        if found.get(Status.PROCESSING):
            fail(f"{found[Status.PROCESSING]} of them are being handled right now: try again when they have ended", 1)
        done = found.get(Status.COMPLETED, 0)
        if done and not force:
            fail(f"{done} of them are completed: --force would run their handlers a second time", 1)
        expected = sum(found.values())
        words = ", ".join(f"{events} {each}" for each, events in found.items()) or "none"
        out.print(f"{expected} events: {words}" + (f"; the effects of {done} will happen AGAIN" if done else ""))
        if dry_run or not expected:
            raise typer.Exit(0 if expected else 1)
        if count is None:
            count = typer.prompt(f"Type {expected} to replay them", type=int)
        if count != expected:
            fail(f"{expected} events are meant, not {count}: nothing was changed", 1)
        replayed = asyncio.run(
            _on(settings, lambda operations: _replay(operations, selection, settings, force, expected))
        )
        kept = expected - len(replayed)
        out.print(
            f"{len(replayed)} made due" + (f"; {kept} have no payload any more, or changed meanwhile" if kept else "")
        )
        if wait:
            settled = asyncio.run(_on(settings, lambda operations: _follow(operations, replayed)))
            out.print(", ".join(f"{events} {each}" for each, events in settled.items()))
            raise typer.Exit(0 if set(settled) <= {Status.COMPLETED, Status.IGNORED} else 1)


@app.command()
def prune(
    payload_days: Annotated[int, typer.Option(min=1, help="Delete payloads of what was settled so long ago.")] = 90,
    row_days: Annotated[int, typer.Option(min=ROW_DAYS_LEAST, help="And the whole event, so long ago.")] = 400,
    include_dead: Annotated[bool, typer.Option("--include-dead", help="Also what waits for an operator.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say how many, and change nothing.")] = False,
) -> None:
    """Delete what is old: completed and ignored events only, never an unfinished one, in small batches.

    Without its payload an event cannot be replayed; without its row a late duplicate of it would be a new event.
    """
    with reported(), database() as settings:
        payloads, rows = asyncio.run(
            _on(settings, lambda operations: operations.old(payload_days, row_days, include_dead=include_dead))
        )
        if dry_run:
            out.print(f"would delete {rows} events with their payloads, and {max(0, payloads - rows)} payloads more")
            return

        async def work(operations: Operations) -> tuple[int, int]:
            deleted_payloads = deleted_rows = 0
            with _bar("pruning", max(payloads, rows)) as (bar, task):
                async for some_payloads, some_rows in operations.prune(
                    operator(), payload_days, row_days, include_dead=include_dead
                ):
                    deleted_payloads, deleted_rows = deleted_payloads + some_payloads, deleted_rows + some_rows
                    bar.advance(task, some_payloads + some_rows)
            return deleted_payloads, deleted_rows

        deleted_payloads, deleted_rows = asyncio.run(_on(settings, work))
        out.print(f"deleted {deleted_rows} events with their payloads, and {deleted_payloads} payloads more")


def stats(as_json: AsJson = False) -> None:
    """The ledger at a glance: events by status, what is due, and for how long."""
    with reported():
        found = _asked(lambda operations: operations.stats())
    if as_json:
        _print_json(asdict(found))
        return
    for status, events in found.events.items():
        out.print(f"[{_COLOURS[status]}]{status:18}[/] {events}")
    oldest = "-" if found.oldest_due_seconds is None else f"{found.oldest_due_seconds:.0f} s"
    out.print(f"{'due now':18} {found.due}\n{'oldest due':18} {oldest}")
    out.print(f"{'past their lease':18} {found.past_their_lease}\n{'abandoned before':18} {found.abandoned_before}")


def operator() -> str:
    """Who is at the terminal, for the audit."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a uid without a name, as containers have
        user = "unknown"
    return f"{user}@{socket.gethostname()}"


# -- shared -------------------------------------------------------------------------------------------


def _asked(ask: Callable[[Operations], Awaitable[T]]) -> T:
    with database() as settings:
        return asyncio.run(_on(settings, ask))


async def _on(settings: Settings, ask: Callable[[Operations], Awaitable[T]]) -> T:
    async with Operations.on(dsn_of(settings), settings.postgres_timeout_seconds) as operations:
        return await ask(operations)


async def _replay(
    operations: Operations, selection: Selection, settings: Settings, force: bool, expected: int
) -> list[str]:
    replayed: list[str] = []
    with _bar("replaying", expected) as (bar, task):
        async for batch in operations.replay(
            selection, operator(), give_up_seconds=settings.give_up_seconds, repeat_completed=force
        ):
            replayed += batch
            bar.advance(task, len(batch))
    return replayed


async def _follow(operations: Operations, event_ids: list[str]) -> dict[Status, int]:
    """Until none of them is on its way any more; one that failed again has its answer."""
    waiting = (Status.PENDING, Status.PROCESSING)
    with _bar("settled", len(event_ids)) as (bar, task):
        while True:
            found = await operations.count(Selection(event_ids))
            left = sum(found.get(each, 0) for each in waiting)
            bar.update(task, completed=len(event_ids) - left)
            if not left:
                return found
            await asyncio.sleep(_POLL_SECONDS)


@contextmanager
def _bar(what: str, total: int) -> Iterator[tuple[Progress, TaskID]]:
    """A progress bar; none where the output is no terminal."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=out, transient=True, disable=not out.is_terminal) as bar:
        yield bar, bar.add_task(what, total=total)


def _print_json(content: dict[str, Any]) -> None:
    out.file.write(orjson.dumps(content, option=orjson.OPT_NON_STR_KEYS).decode() + "\n")


def _ago(at: datetime) -> str:
    seconds = (datetime.now(UTC) - at).total_seconds()
    unit = next((unit for unit in "dhm" if abs(seconds) >= _UNITS[unit]), "s")
    amount = f"{abs(seconds) / _UNITS[unit]:.0f} {unit}"
    return f"{amount} ago" if seconds >= 0 else f"in {amount}"


def _plain(text: str) -> str:
    """What comes from outside is no markup and moves no cursor."""
    printable = "".join(each if each.isprintable() or each == "\n" else " " for each in text)
    return printable.replace("[", "\\[")
