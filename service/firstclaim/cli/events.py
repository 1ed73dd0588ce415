"""`firstclaim events` and `firstclaim stats`: parses, calls `firstclaim.operations.commands`, prints; decides nothing.

`--json` prints one JSON object per event (or one in all), its fields are those of the ledger's row; fields may be
added, none is renamed. Exit codes: 0 done · 1 the answer is no (unknown id, refused, or with `--wait` not all of them
completed or ignored) · 2 the command line is wrong · 3 Postgres is away, or not migrated.
"""

from __future__ import annotations

import asyncio
import getpass
import re
import socket
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.text import Text

from firstclaim.cli.terminal import database, dsn_of, fail, out, reported
from firstclaim.formatting import ago, instant, number_of_events
from firstclaim.operations.limits import ROW_DAYS_LEAST
from firstclaim.progress import progress_bar
from firstclaim.status import Status

if TYPE_CHECKING:
    from rich.console import RenderableType

    from firstclaim.operations.commands import Commands, ReplayCandidate
    from firstclaim.operations.queries import AttemptRow, Backlog, EventRow, Selection
    from firstclaim.settings import Settings

T = TypeVar("T")

app = typer.Typer(no_args_is_help=True, help="List, show, replay and prune events.")

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
_WORD_MOST = 255
_DAYS_MOST = 36_500


def duration(text: str) -> float:
    """Seconds; raises a usage error."""
    found = re.fullmatch(r"(\d{1,6})([smhd])", text)
    if found is None:
        raise typer.BadParameter(f"expected a number and s, m, h or d (90s, 15m, 2h, 3d), not {text!r}")
    return int(found[1]) * _UNITS[found[2]]


def _age(text: str) -> Any:
    return typer.Option(parser=duration, metavar="90s|15m|2h|3d", help=text)


def _word(text: str) -> str:
    """What can be stored; raises a usage error."""
    if not (text.isprintable() and 0 < len(text) <= _WORD_MOST):
        raise typer.BadParameter(f"expected up to {_WORD_MOST} printable characters, not {text!r:.80}")
    return text


Id = Annotated[str, typer.Argument(parser=_word, metavar="ID", help="Event id.")]
Ids = Annotated[list[str] | None, typer.Argument(parser=_word, metavar="ID...", help="Event ids.")]
Statuses = Annotated[list[Status] | None, typer.Option("--status", help="Only in this status; again for more.")]
Type = Annotated[
    str | None, typer.Option("--type", parser=_word, metavar="TYPE", help='Only of this type, or of "prefix.*".')
]
Account = Annotated[
    str | None, typer.Option("--account", parser=_word, metavar="ID", help="Only of this connected account.")
]
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
    from rich.table import Table

    from firstclaim.operations.queries import Selection

    selection = Selection(None, status or None, event_type, account, older_than, newer_than)
    with reported():
        found = _asked(lambda operations: operations.list_events(selection, limit))
    if as_json:
        for each in found:
            print_json(asdict(each))
        return
    table = Table("event", "type", "status", "attempts", "received", "result", box=None, pad_edge=False)
    for column in table.columns[:2]:
        column.no_wrap = True
    for each in found:
        came = each.last_error or each.action or ""
        cells = (each.event_id, each.type, each.status, str(each.attempt), ago(each.received_at), came)
        table.add_row(*(Text(_plain(cell), _COLOURS[each.status] if cell is each.status else "") for cell in cells))
    _print(table if found else "no such event")
    if len(found) == limit:
        _print(f"the newest {limit}; --limit shows more")


@app.command()
def show(
    event_id: Id,
    payload: Annotated[
        bool, typer.Option("--payload", help="Also the signed body, as it came: it may hold personal data.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show one event: its row, its attempts, and what operators did to it."""
    from firstclaim.operations.queries import timeline

    async def ask(
        operations: Commands,
    ) -> tuple[EventRow | None, list[AttemptRow], list[dict[str, Any]], bytes | None]:
        event = await operations.find(event_id)
        body = await operations.payload(event_id) if payload else None
        return event, await operations.attempts(event_id), await operations.actions_on(event_id), body

    with reported():
        event, attempts, actions, body = _asked(ask)
    if event is None:
        fail(f"the ledger has no event {event_id!r}", 1)
    text = None if body is None else body.decode(errors="replace")
    if as_json:
        told = {"attempts": [asdict(each) for each in attempts], "actions": actions}
        print_json({**asdict(event), **told, **({"payload": text} if payload else {})})
        return
    for name, value in asdict(event).items():
        if name in ("due_at", "give_up_at") and event.settled_at is not None:
            continue  # nothing is due any more
        shown = _at(value) if isinstance(value, datetime) else "-" if value is None else str(value)
        _print_line(name, shown, _COLOURS[event.status] if name == "status" else "")
    _print("")
    for moment in timeline(event, attempts, actions):
        _print_line(f"{moment.at:%Y-%m-%d %H:%M:%S.%f}"[:-3], moment.text)
    if payload:
        _print("")
        _print(_plain(text or "its payload has been pruned"))


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
    wait: Annotated[bool, typer.Option("--wait", help="Follow them to their end, or until they failed again.")] = False,
) -> None:
    """Make events due again: failures reset, the attempt's number kept; running services take them up.

    Named by id, or by what --status and the others say. What is being handled right now is refused.
    """
    from firstclaim.operations.queries import Selection

    selection = Selection(ids or None, status or None, event_type, account, older_than, newer_than)
    if selection.is_empty:
        raise typer.BadParameter("name events by id, or say which with --status and the others")
    with reported(), database() as settings:
        found = asyncio.run(on(settings, lambda operations: operations.select_candidates(selection)))
        chosen = _allowed(found, ids, force=force)
        counts = Counter(each.status for each in chosen)
        words = ", ".join(f"{events} {each}" for each, events in counts.items()) or "none"
        again = counts[Status.COMPLETED]
        _print(
            f"{number_of_events(len(chosen))}: {words}"
            + (f"; the effects of {again} will happen AGAIN" if again else "")
        )
        if pruned := len(found) - len(chosen):
            _print(f"{pruned} more cannot be replayed: their payloads have been pruned")
        if dry_run or not chosen:
            raise typer.Exit(0 if chosen else 1)
        if count is None:
            count = typer.prompt(f"Type {len(chosen)} to replay them", type=int)
        if count != len(chosen):
            fail(f"the selection matches {number_of_events(len(chosen))}, not {count}: nothing was changed", 1)
        replayed = asyncio.run(
            on(settings, lambda operations: _replay(operations, chosen, selection, settings.give_up_seconds, force))
        )
        kept = len(chosen) - len(replayed)
        _print(
            f"{number_of_events(len(replayed))} replayed: due now"
            + (f"; {kept} not replayed, because they changed meanwhile or are locked" if kept else "")
        )
        if wait and replayed:
            settled = asyncio.run(on(settings, lambda operations: _follow(operations, replayed)))
            _print(", ".join(f"{events} {each}" for each, events in settled.items()))
            raise typer.Exit(0 if not kept and set(settled) <= {Status.COMPLETED, Status.IGNORED} else 1)
        raise typer.Exit(1 if kept else 0)


@app.command()
def prune(
    payload_days: Annotated[
        int, typer.Option(min=1, max=_DAYS_MOST, help="Delete payloads of what was settled so long ago.")
    ] = 90,
    row_days: Annotated[
        int, typer.Option(min=ROW_DAYS_LEAST, max=_DAYS_MOST, help="And the whole event, so long ago.")
    ] = 400,
    include_dead: Annotated[bool, typer.Option("--include-dead", help="Also what waits for an operator.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say how many, and change nothing.")] = False,
) -> None:
    """Delete what is old: completed and ignored events only, never an unfinished one, in small batches.

    Without its payload an event cannot be replayed; without its row a late duplicate of it would be a new event.
    """
    with reported(), database() as settings:
        payloads, rows = asyncio.run(
            on(
                settings,
                lambda operations: operations.count_prunable(payload_days, row_days, include_dead=include_dead),
            )
        )
        if dry_run:
            _print(f"would delete {rows} events with their payloads, and {max(0, payloads - rows)} payloads more")
            return

        async def work(operations: Commands) -> tuple[int, int]:
            deleted_payloads = deleted_rows = 0
            with progress_bar(out, "pruning", max(payloads, rows)) as bar:
                async for some_payloads, some_rows in operations.prune(
                    operator(), payload_days, row_days, include_dead=include_dead
                ):
                    deleted_payloads, deleted_rows = deleted_payloads + some_payloads, deleted_rows + some_rows
                    bar.advance(some_payloads + some_rows)
            return deleted_payloads, deleted_rows

        deleted_payloads, deleted_rows = asyncio.run(on(settings, work))
        _print(f"deleted {deleted_rows} events with their payloads, and {deleted_payloads} payloads more")


def stats(as_json: AsJson = False) -> None:
    """The ledger at a glance: events by status, what is due, and for how long."""
    from firstclaim.operations.queries import Selection

    async def ask(operations: Commands) -> tuple[dict[Status, int], Backlog]:
        return await operations.count(Selection()), await operations.backlog()

    with reported():
        counts, backlog = _asked(ask)
    events = {status: counts.get(status, 0) for status in Status}
    if as_json:
        print_json({"events": events, **asdict(backlog)})
        return
    for status, number in events.items():
        _print_line(status, str(number), _COLOURS[status])
    _print_line("due now", str(backlog.due))
    _print_line("oldest due", "-" if backlog.oldest_due_seconds is None else f"{backlog.oldest_due_seconds:.0f} s")
    _print_line("past their lease", str(backlog.past_their_lease))
    _print_line("abandoned before", str(backlog.abandoned_before))


def operator() -> str:
    """Who is at the terminal, for the audit."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a uid without a name, as containers have
        user = "unknown"
    return f"{user}@{socket.gethostname()}"


# -- shared -------------------------------------------------------------------------------------------


def _asked(ask: Callable[[Commands], Awaitable[T]]) -> T:
    with database() as settings:
        return asyncio.run(on(settings, ask))


async def on(settings: Settings, ask: Callable[[Commands], Awaitable[T]]) -> T:
    """What `ask` says on a connection of its own."""
    from firstclaim.operations.commands import Commands

    async with Commands.connect(dsn_of(settings), settings.postgres_timeout_seconds) as operations:
        return await ask(operations)


def _allowed(found: list[ReplayCandidate], ids: list[str] | None, *, force: bool) -> list[ReplayCandidate]:
    """Those that may be replayed; exits where what was asked for may not be done."""
    if unknown := sorted(set(ids or ()) - {each.event_id for each in found}):
        fail(f"{len(unknown)} of these are not in the ledger, or not as selected: {', '.join(unknown)}", 1)
    if held := sum(each.status is Status.PROCESSING for each in found):
        fail(f"{held} of them are being handled right now: try again when their handlers have ended", 1)
    allowed = [each for each in found if each.has_payload]
    if (done := sum(each.status is Status.COMPLETED for each in allowed)) and not force:
        fail(f"{done} of them are completed: --force would run their handlers a second time", 1)
    return allowed


async def _replay(
    operations: Commands, chosen: list[ReplayCandidate], selection: Selection, give_up_seconds: float, force: bool
) -> list[str]:
    replayed: list[str] = []
    with progress_bar(out, "replaying", len(chosen)) as bar:
        async for batch in operations.replay(
            chosen, selection, operator(), give_up_seconds=give_up_seconds, repeat_completed=force
        ):
            replayed += batch
            bar.advance(len(batch))
    return replayed


async def _follow(operations: Commands, event_ids: list[str]) -> dict[Status, int]:
    """Until none of them is on its way any more; one that failed again has its answer."""
    from firstclaim.operations.queries import Selection

    waiting = (Status.PENDING, Status.PROCESSING)
    with progress_bar(out, "settled", len(event_ids)) as bar:
        while True:
            found = await operations.count(Selection(event_ids))
            left = sum(found.get(each, 0) for each in waiting)
            bar.update(len(event_ids) - left)
            if not left:
                return found
            await asyncio.sleep(_POLL_SECONDS)


def print_json(content: dict[str, Any]) -> None:
    """On a line of its own."""
    import orjson

    out.file.write(orjson.dumps(content, option=orjson.OPT_NON_STR_KEYS).decode() + "\n")


def _print(content: RenderableType) -> None:
    """No markup: what comes from outside may look like it."""
    if isinstance(content, str):
        content = Text(content)
    out.print(content, soft_wrap=isinstance(content, Text))


def _print_line(name: str, value: str, style: str = "") -> None:
    _print(Text.assemble((f"{name:18}", "bold"), " ", (_plain(value), style)))


def _at(at: datetime) -> str:
    return f"{instant(at)} UTC ({ago(at)})"


def _plain(text: str) -> str:
    """What comes from outside moves no cursor."""
    return "".join(each if each.isprintable() or each == "\n" else " " for each in text)
