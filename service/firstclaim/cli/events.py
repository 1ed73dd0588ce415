"""`firstclaim events` and `firstclaim stats`: parses, calls `firstclaim.operations.commands`, prints; decides nothing.

`--json` prints one JSON object per event (or one in all). Its fields are those of the ledger's row; fields may be
added, none is renamed. Exit codes: 0 success · 1 negative result (unknown id, refused, not all events replayed, or with
`--wait` not all of them completed or ignored) · 2 the command line is wrong · 3 Postgres is unreachable, or not
migrated.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from firstclaim.cli.environment import database, operator, run_on_ledger
from firstclaim.cli.options import AsJson, duration_option, storable
from firstclaim.cli.terminal import STATUS_COLOURS, fail, out, print_field, print_json, print_text, printable, reported
from firstclaim.formatting import ago, instant, number_of, number_of_events
from firstclaim.operations.limits import ROW_DAYS_LEAST
from firstclaim.progress import progress_bar
from firstclaim.status import Status

if TYPE_CHECKING:
    from firstclaim.operations.commands import Commands, ReplayCandidate
    from firstclaim.operations.queries import AttemptRow, Backlog, EventRow, Selection

app = typer.Typer(no_args_is_help=True, help="List, show, replay and prune events.")

_POLL_SECONDS = 0.5
_DAYS_MOST = 36_500

Id = Annotated[str, typer.Argument(parser=storable, metavar="ID", help="Event id.")]
Ids = Annotated[list[str] | None, typer.Argument(parser=storable, metavar="ID...", help="Event ids.")]
Statuses = Annotated[
    list[Status] | None, typer.Option("--status", help="Only events with this status. Repeat it for more.")
]
Type = Annotated[
    str | None,
    typer.Option("--type", parser=storable, metavar="TYPE", help='Only events of this type, or of "prefix.*".'),
]
Account = Annotated[
    str | None, typer.Option("--account", parser=storable, metavar="ID", help="Only events of this connected account.")
]
OlderThan = Annotated[float | None, duration_option("Only events received longer ago than this.")]
NewerThan = Annotated[float | None, duration_option("Only events received within this time.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print how many, and change nothing.")]


@app.command("list")
def list_events(
    status: Statuses = None,
    event_type: Type = None,
    account: Account = None,
    older_than: OlderThan = None,
    newer_than: NewerThan = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="List at most this many.")] = 50,
    as_json: AsJson = False,
) -> None:
    """List events, newest first."""
    from firstclaim.cli.event_list import print_events
    from firstclaim.operations.queries import Selection

    selection = Selection(None, status or None, event_type, account, older_than, newer_than)
    with reported(), database() as settings:
        events = run_on_ledger(settings, lambda operations: operations.list_events(selection, limit))
    if as_json:
        for event in events:
            print_json(asdict(event))
        return
    print_events(events)
    if len(events) == limit:
        print_text(f"limited to the newest {limit}; --limit lists more")


@app.command()
def show(
    event_id: Id,
    payload: Annotated[
        bool, typer.Option("--payload", help="Print the signed body too. It may hold personal data.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show one event: its row, its attempts, and what operators did to it."""
    from firstclaim.operations.queries import timeline

    async def read(
        operations: Commands,
    ) -> tuple[EventRow | None, list[AttemptRow], list[dict[str, Any]], bytes | None]:
        event = await operations.find(event_id)
        body = await operations.payload(event_id) if payload else None
        return event, await operations.attempts(event_id), await operations.actions_on(event_id), body

    with reported(), database() as settings:
        event, attempts, actions, body = run_on_ledger(settings, read)
    if event is None:
        fail(f"the ledger has no event {event_id!r}", 1)
    text = None if body is None else body.decode(errors="replace")
    if as_json:
        history = {"attempts": [asdict(each) for each in attempts], "actions": actions}
        print_json({**asdict(event), **history, **({"payload": text} if payload else {})})
        return
    for name, value in asdict(event).items():
        if name in ("due_at", "give_up_at") and event.settled_at is not None:
            continue  # a settled event is not due any more
        shown = _instant(value) if isinstance(value, datetime) else "-" if value is None else str(value)
        print_field(name, shown, STATUS_COLOURS[event.status] if name == "status" else "")
    print_text("")
    for entry in timeline(event, attempts, actions):
        print_field(f"{entry.at:%Y-%m-%d %H:%M:%S.%f}"[:-3], entry.text)
        for frame in entry.frames:
            print_field("", f"  {frame}")
    if payload:
        print_text("")
        print_text(printable(text or "The payload was pruned."))


@app.command()
def replay(
    ids: Ids = None,
    status: Statuses = None,
    event_type: Type = None,
    account: Account = None,
    older_than: OlderThan = None,
    newer_than: NewerThan = None,
    dry_run: DryRun = False,
    count: Annotated[
        int | None, typer.Option(help="How many events you expect. Without it the command asks you.")
    ] = None,
    at_most: Annotated[
        int | None,
        typer.Option(min=1, help="Replay nothing if more events are selected: for a selection that changes meanwhile."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="With --at-most: do not ask for the number.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replay completed events too: their effects happen again.")
    ] = False,
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait until each of them is completed, ignored, dead, or failed again.")
    ] = False,
) -> None:
    """Make events due now, for running services to handle. Failures count from 0 again; the attempt number continues.

    Select events by id, or with --status and the other filters. Events that are being handled right now are refused.

    Exit code 1 if not all of them could be replayed, or with --wait if not all were completed or ignored.
    """
    from firstclaim.operations.queries import Selection

    selection = Selection(ids or None, status or None, event_type, account, older_than, newer_than)
    if selection.is_empty:
        raise typer.BadParameter("select events by id, or with --status and the other filters")
    if yes and at_most is None:
        raise typer.BadParameter("--yes needs --at-most N: the most events that you mean")
    with reported(), database() as settings:
        found = run_on_ledger(settings, lambda operations: operations.select_candidates(selection))
        chosen = _replayable(found, ids, force=force)
        _print_selected(chosen, pruned=len(found) - len(chosen))
        if dry_run or not chosen:
            raise typer.Exit(0 if chosen else 1)
        _confirm(len(chosen), count, at_most, yes=yes)
        replayed = run_on_ledger(
            settings, lambda operations: _replay(operations, chosen, selection, settings.give_up_seconds, force)
        )
        unchanged = len(chosen) - len(replayed)
        print_text(f"{number_of(len(replayed), 'event is', 'events are')} due now")
        if unchanged:
            print_text(f"{number_of_events(unchanged)} not replayed: changed in the meantime, or locked")
        if wait and replayed:
            settled = run_on_ledger(settings, lambda operations: _wait_until_settled(operations, replayed))
            print_text(_by_status(settled))
            raise typer.Exit(0 if not unchanged and set(settled) <= {Status.COMPLETED, Status.IGNORED} else 1)
        raise typer.Exit(1 if unchanged else 0)


@app.command()
def prune(
    payload_days: Annotated[
        int,
        typer.Option(min=1, max=_DAYS_MOST, help="Delete the payloads of events settled at least this many days ago."),
    ] = 90,
    row_days: Annotated[
        int, typer.Option(min=ROW_DAYS_LEAST, max=_DAYS_MOST, help="Delete events settled at least this many days ago.")
    ] = 400,
    include_dead: Annotated[
        bool, typer.Option("--include-dead", help="Prune dead events too, which wait for an operator.")
    ] = False,
    dry_run: DryRun = False,
) -> None:
    """Delete old events that are completed or ignored, in small batches. Unfinished events are never deleted.

    An event without its payload cannot be replayed. After its row is deleted, a late duplicate is a new event.
    """
    with reported(), database() as settings:
        payloads, rows = run_on_ledger(
            settings,
            lambda operations: operations.count_prunable(payload_days, row_days, include_dead=include_dead),
        )
        if dry_run:
            print_text(f"would delete {_pruned(rows, max(0, payloads - rows))}")
            return

        async def delete(operations: Commands) -> tuple[int, int]:
            deleted_payloads = deleted_rows = 0
            with progress_bar(out, "pruning", max(payloads, rows)) as bar:
                async for batch_payloads, batch_rows in operations.prune(
                    operator(), payload_days, row_days, include_dead=include_dead
                ):
                    deleted_payloads, deleted_rows = deleted_payloads + batch_payloads, deleted_rows + batch_rows
                    bar.advance(batch_payloads + batch_rows)
            return deleted_payloads, deleted_rows

        deleted_payloads, deleted_rows = run_on_ledger(settings, delete)
        print_text(f"deleted {_pruned(deleted_rows, deleted_payloads)}")


def stats(as_json: AsJson = False) -> None:
    """Count events by status, and how many are due and for how long."""
    from firstclaim.operations.queries import Selection

    async def read(operations: Commands) -> tuple[dict[Status, int], Backlog]:
        return await operations.count(Selection()), await operations.backlog()

    with reported(), database() as settings:
        counts, backlog = run_on_ledger(settings, read)
    events = {status: counts.get(status, 0) for status in Status}
    if as_json:
        print_json({"events": events, **asdict(backlog)})
        return
    for status, number in events.items():
        print_field(status, str(number), STATUS_COLOURS[status])
    print_field("due now", str(backlog.due))
    print_field("oldest due", "-" if backlog.oldest_due_seconds is None else f"{backlog.oldest_due_seconds:.0f} s")
    print_field("past their lease", str(backlog.past_their_lease))
    print_field("abandoned before", str(backlog.abandoned_before))


# -- replay -------------------------------------------------------------------------------------------


def _replayable(found: list[ReplayCandidate], ids: list[str] | None, *, force: bool) -> list[ReplayCandidate]:
    """The candidates that have a payload; exits if the selection holds an event that must not be replayed."""
    if unknown := sorted(set(ids or ()) - {each.event_id for each in found}):
        fail(f"not in the ledger, or excluded by the other filters: {', '.join(unknown)}", 1)
    if running := sum(each.status is Status.PROCESSING for each in found):
        fail(f"{number_of(running, 'event is', 'events are')} being handled right now: try again later", 1)
    with_payload = [each for each in found if each.has_payload]
    if (completed := sum(each.status is Status.COMPLETED for each in with_payload)) and not force:
        fail(
            f"{number_of(completed, 'event is', 'events are')} completed: "
            "--force would run their handlers a second time",
            1,
        )
    return with_payload


def _confirm(chosen: int, count: int | None, at_most: int | None, *, yes: bool) -> None:
    """Exit unless the operator means that many events."""
    if at_most is not None and chosen > at_most:
        fail(f"the selection matches {number_of_events(chosen)}, more than {at_most}: nothing was changed", 1)
    if count is None and not yes:
        count = typer.prompt(f"Type {chosen} to replay {'it' if chosen == 1 else 'them'}", type=int)
    if count is not None and count != chosen:
        fail(f"the selection matches {number_of_events(chosen)}, not {count}: nothing was changed", 1)


def _print_selected(chosen: list[ReplayCandidate], *, pruned: int) -> None:
    counts = Counter(each.status for each in chosen)
    print_text(f"{number_of_events(len(chosen))} selected" + (f": {_by_status(counts)}" if chosen else ""))
    if completed := counts[Status.COMPLETED]:
        print_text(f"The effects of {number_of(completed, 'completed event', 'completed events')} will happen AGAIN.")
    if pruned:
        print_text(f"{number_of(pruned, 'more event', 'more events')} cannot be replayed: the payload was pruned")


async def _replay(
    operations: Commands, chosen: list[ReplayCandidate], selection: Selection, give_up_seconds: float, force: bool
) -> list[str]:
    """Returns the ids of the events that were replayed."""
    replayed: list[str] = []
    with progress_bar(out, "replaying", len(chosen)) as bar:
        async for batch in operations.replay(
            chosen, selection, operator(), give_up_seconds=give_up_seconds, repeat_completed=force
        ):
            replayed += batch
            bar.advance(len(batch))
    return replayed


async def _wait_until_settled(operations: Commands, event_ids: list[str]) -> dict[Status, int]:
    """Wait until none of the events is pending or processing. An event that failed again is not waited for."""
    import asyncio

    from firstclaim.operations.queries import Selection

    with progress_bar(out, "settled", len(event_ids)) as bar:
        while True:
            counts = await operations.count(Selection(event_ids))
            waiting = sum(counts.get(each, 0) for each in (Status.PENDING, Status.PROCESSING))
            bar.update(len(event_ids) - waiting)
            if not waiting:
                return counts
            await asyncio.sleep(_POLL_SECONDS)


# -- text ---------------------------------------------------------------------------------------------


def _by_status(counts: Mapping[Status, int]) -> str:
    return ", ".join(f"{number} {status}" for status, number in counts.items())


def _pruned(rows: int, payloads: int) -> str:
    return (
        f"{number_of(rows, 'event with its payload', 'events with their payloads')}, "
        f"and {number_of(payloads, 'payload of another event', 'payloads of other events')}"
    )


def _instant(at: datetime) -> str:
    return f"{instant(at)} UTC ({ago(at)})"
