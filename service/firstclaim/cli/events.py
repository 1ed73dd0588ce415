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

from firstclaim.cli.environment import database, run_on_ledger
from firstclaim.cli.groups import groups
from firstclaim.cli.options import (
    Account,
    AsJson,
    Endpoint,
    Group,
    Id,
    NewerThan,
    OlderThan,
    Statuses,
    Type,
    is_type_of_events,
)
from firstclaim.cli.prune import prune
from firstclaim.cli.replay import replay
from firstclaim.cli.terminal import STATUS_COLOURS, fail, print_field, print_json, print_text, printable, reported
from firstclaim.formatting import ago, instant
from firstclaim.status import Status

if TYPE_CHECKING:
    from firstclaim.operations.commands import Commands
    from firstclaim.operations.deliveries import Deliveries
    from firstclaim.operations.queries import Backlog, EventRow, History

app = typer.Typer(no_args_is_help=True, help="List, show, replay and prune events.")


@app.command("list")
def list_events(
    status: Statuses = None,
    event_type: Type = None,
    account: Account = None,
    older_than: OlderThan = None,
    newer_than: NewerThan = None,
    group: Group = None,
    endpoint: Endpoint = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="List at most this many.")] = 50,
    as_json: AsJson = False,
) -> None:
    """List events, newest first."""
    from firstclaim.cli.event_list import print_events
    from firstclaim.operations.selection import Selection

    selection = Selection(None, status or None, event_type, account, older_than, newer_than, group, endpoint=endpoint)
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
    """Show one event: its row, its deliveries, its attempts, and what operators did to it."""

    async def read(operations: Commands) -> tuple[EventRow, History, bytes | None] | None:
        if (event := await operations.find(event_id)) is None:
            return None
        body = await operations.payload(event_id) if payload else None
        return event, await operations.history(event_id), body

    with reported(), database() as settings:
        found = run_on_ledger(settings, read)
    if found is None:
        hint = f"; --type {event_id} of `events list` selects by type" if is_type_of_events(event_id) else ""
        fail(f"the ledger has no event {event_id!r}{hint}", 1)
    event, history, body = found
    text = None if body is None else body.decode(errors="replace")
    if as_json:
        print_json({**asdict(event), **_as_json(history), **({"payload": text} if payload else {})})
        return
    _print_event(event, history)
    if payload:
        print_text("")
        print_text(printable(text or "The payload was pruned."))


def _as_json(history: History) -> dict[str, Any]:
    return {
        **asdict(history.deliveries),
        "attempts": [asdict(each) for each in history.attempts],
        "actions": history.actions,
        "follow_ups": [
            {"event_id": each.event_id, "type": each.type, "status": each.status, "due_at": each.due_at}
            for each in history.follow_ups
        ],
    }


def _print_event(event: EventRow, history: History) -> None:
    from firstclaim.operations.queries import timeline

    for name, value in asdict(event).items():
        if name in ("due_at", "give_up_at") and event.settled_at is not None:
            continue  # a settled event is not due any more
        shown = _instant(value) if isinstance(value, datetime) else "-" if value is None else str(value)
        print_field(name, shown, STATUS_COLOURS[event.status] if name == "status" else "")
    if event.parent_id is None:
        _print_deliveries(history.deliveries)
    for each in history.follow_ups:
        print_field("follow-up", f"{each.event_id}  {each.type}  {each.status}", STATUS_COLOURS[each.status])
    print_text("")
    for entry in timeline(event, history.attempts, history.actions):
        print_field(f"{entry.at:%Y-%m-%d %H:%M:%S.%f}"[:-3], entry.text)
        for frame in entry.frames:
            print_field("", f"  {frame}")


def _print_deliveries(deliveries: Deliveries) -> None:
    last = deliveries.last_duplicate_at
    print_field("duplicates", str(deliveries.duplicates) + ("" if last is None else f", the last {_instant(last)}"))
    for header in deliveries.headers or ():
        print_field("header", printable(header))


app.command()(groups)
app.command()(replay)
app.command()(prune)


def stats(as_json: AsJson = False) -> None:
    """Count events by status, and how many are due and for how long.

    A refused request is no event: the admin page, /metrics and the log event signatures_refused count those.
    """
    from firstclaim.operations.selection import Selection

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


def _instant(at: datetime) -> str:
    return f"{instant(at)} UTC ({ago(at)})"
