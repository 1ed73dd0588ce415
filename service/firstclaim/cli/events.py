"""`firstclaim events` and `firstclaim stats`: parses, calls `firstclaim.operations.commands`, prints; decides nothing.

`--json` prints one JSON object per event (or one in all). Its fields are those of the ledger's row; fields may be
added, none is renamed. Exit codes: 0 success · 1 negative result (unknown id, refused, not all events replayed, or with
`--wait` not all of them completed or ignored) · 2 the command line is wrong · 3 Postgres is unreachable, or not
migrated.
"""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from firstclaim.cli.environment import database, operator, run_on_ledger
from firstclaim.cli.options import Account, AsJson, DryRun, Id, NewerThan, OlderThan, Statuses, Type
from firstclaim.cli.replay import replay
from firstclaim.cli.terminal import STATUS_COLOURS, fail, out, print_field, print_json, print_text, printable, reported
from firstclaim.formatting import ago, instant, number_of
from firstclaim.operations.limits import ROW_DAYS_LEAST
from firstclaim.progress import progress_bar
from firstclaim.status import Status

if TYPE_CHECKING:
    from firstclaim.operations.commands import Commands
    from firstclaim.operations.queries import AttemptRow, Backlog, EventRow

app = typer.Typer(no_args_is_help=True, help="List, show, replay and prune events.")

_DAYS_MOST = 36_500


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


app.command()(replay)


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


def _pruned(rows: int, payloads: int) -> str:
    return (
        f"{number_of(rows, 'event with its payload', 'events with their payloads')}, "
        f"and {number_of(payloads, 'payload of another event', 'payloads of other events')}"
    )


def _instant(at: datetime) -> str:
    return f"{instant(at)} UTC ({ago(at)})"
