"""`firstclaim events replay`: which events may be replayed, how many the operator means, and how they ended.

Exit codes as of `firstclaim.cli.events`.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from firstclaim.cli.environment import database, operator, run_on_ledger
from firstclaim.cli.options import (
    Account,
    DryRun,
    Endpoint,
    Group,
    Ids,
    NewerThan,
    OlderThan,
    Statuses,
    Type,
    is_type_of_events,
)
from firstclaim.cli.pauses import resume_commands
from firstclaim.cli.terminal import fail, out, print_text, printable, reported
from firstclaim.formatting import ago, number_of, number_of_events
from firstclaim.progress import progress_bar
from firstclaim.status import Status

if TYPE_CHECKING:
    from firstclaim.operations.commands import Commands, ReplayCandidate
    from firstclaim.operations.pauses import Paused
    from firstclaim.operations.selection import Selection

_POLL_SECONDS = 0.5


def replay(
    ids: Ids = None,
    status: Statuses = None,
    event_type: Type = None,
    account: Account = None,
    older_than: OlderThan = None,
    newer_than: NewerThan = None,
    group: Group = None,
    endpoint: Endpoint = None,
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

    An event of a paused type waits until `firstclaim resume`; --wait does not wait for it, and says so.

    Exit code 1 if not all of them could be replayed, or with --wait if not all were completed or ignored.
    """
    from firstclaim.operations.selection import Selection

    selection = Selection(
        ids or None, status or None, event_type, account, older_than, newer_than, group, endpoint=endpoint
    )
    if selection.is_empty:
        raise typer.BadParameter("select events by id, or with --status and the other filters")
    if yes and at_most is None:
        raise typer.BadParameter("--yes needs --at-most N: the most events that you mean")
    with reported(), database() as settings:
        found = run_on_ledger(settings, lambda operations: operations.select_candidates(selection))
        chosen = _replayable(found, ids, force=force)
        _print_selected(chosen, pruned=len(found) - len(chosen))
        _print_paused(run_on_ledger(settings, lambda operations: _paused(operations, chosen)), "will wait", "will wait")
        if dry_run or not chosen:
            raise typer.Exit(0 if chosen else 1)
        _confirm(len(chosen), count, at_most, yes=yes)
        replayed = run_on_ledger(
            settings, lambda operations: _replay(operations, chosen, selection, settings.give_up_seconds, force)
        )
        unchanged = len(chosen) - len(replayed)
        held = run_on_ledger(settings, lambda operations: _paused(operations, replayed))
        if held.events < len(replayed) or not replayed:
            print_text(f"{number_of(len(replayed) - held.events, 'event is', 'events are')} due now")
        if unchanged:
            print_text(f"{number_of_events(unchanged)} not replayed: changed in the meantime, or locked")
        settled: dict[Status, int] = {}
        if wait and replayed:
            settled, held = run_on_ledger(settings, lambda operations: _wait_until_settled(operations, replayed))
            print_text(_by_status(settled))
        _print_paused(held, "waits", "wait")
        raise typer.Exit(0 if not unchanged and set(settled) <= {Status.COMPLETED, Status.IGNORED} else 1)


def _replayable(found: list[ReplayCandidate], ids: list[str] | None, *, force: bool) -> list[ReplayCandidate]:
    """The candidates that have a payload; exits if the selection holds an event that must not be replayed."""
    if unknown := sorted(set(ids or ()) - {each.event_id for each in found}):
        hint = "".join(f"; --type {each} selects by type" for each in unknown if is_type_of_events(each))
        fail(f"not in the ledger, or excluded by the other filters: {', '.join(unknown)}{hint}", 1)
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
        count = _asked(chosen)
    if count is not None and count != chosen:
        fail(f"the selection matches {number_of_events(chosen)}, not {count}: nothing was changed", 1)


def _asked(chosen: int) -> int:
    """The number that the operator types. Exits if there is nobody to ask."""
    try:
        return int(typer.prompt(f"Type {chosen} to replay {'it' if chosen == 1 else 'them'}", type=int))
    except typer.Abort:
        if sys.stdin.isatty():  # Ctrl-C
            raise
        print_text("")  # the question has no end of line
        fail(
            "standard input ended before that: without a terminal, give the number with --count, or the most that you "
            "mean with --at-most N --yes. Nothing was changed",
            1,
        )


def _print_selected(chosen: list[ReplayCandidate], *, pruned: int) -> None:
    counts = Counter(each.status for each in chosen)
    print_text(f"{number_of_events(len(chosen))} selected" + (f": {_by_status(counts)}" if chosen else ""))
    if completed := counts[Status.COMPLETED]:
        print_text(f"The effects of {number_of(completed, 'completed event', 'completed events')} will happen AGAIN.")
    if pruned:
        print_text(f"{number_of(pruned, 'more event', 'more events')} cannot be replayed: the payload was pruned")


def _print_paused(paused: Paused, waits: str, wait: str) -> None:
    """Say how many events a pause holds, which one, and how to end it. `waits`, `wait`: the verb for one, for more."""
    if not paused.events:
        return
    why = "its type is paused" if paused.events == 1 else "their types are paused"
    by = "; ".join(f"{each.pattern}, by {each.operator}, {ago(each.paused_at)}" for each in paused.pauses)
    print_text(printable(f"{number_of(paused.events, f'event {waits}', f'events {wait}')}, because {why}: {by}"))
    print_text(printable(f"To end that: {resume_commands(paused.pauses)}"))


async def _paused(operations: Commands, events: list[ReplayCandidate]) -> Paused:
    from firstclaim.operations.pauses import paused_among

    return await paused_among(operations, Counter(each.type for each in events))


async def _replay(
    operations: Commands, chosen: list[ReplayCandidate], selection: Selection, give_up_seconds: float, force: bool
) -> list[ReplayCandidate]:
    """Returns the events that were replayed."""
    replayed: set[str] = set()
    with progress_bar(out, "replaying", len(chosen)) as bar:
        async for batch in operations.replay(
            chosen, selection.filters, operator(), give_up_seconds=give_up_seconds, repeat_completed=force
        ):
            replayed.update(batch)
            bar.advance(len(batch))
    return [each for each in chosen if each.event_id in replayed]


async def _wait_until_settled(operations: Commands, events: list[ReplayCandidate]) -> tuple[dict[Status, int], Paused]:
    """Wait until none of the events is pending or processing, or until all that are left are paused.

    An event that failed again is not waited for. A pause may last for days, and nobody may be there to end it.
    """
    import asyncio

    from firstclaim.operations.pauses import paused_pending
    from firstclaim.operations.selection import Selection

    event_ids = [each.event_id for each in events]
    with progress_bar(out, "settled", len(event_ids)) as bar:
        while True:
            held = await paused_pending(operations, event_ids)
            counts = await operations.count(Selection(event_ids))
            waiting = sum(counts.get(each, 0) for each in (Status.PENDING, Status.PROCESSING))
            bar.update(len(event_ids) - waiting)
            if waiting == held.events and not counts.get(Status.PROCESSING):
                return counts, held
            await asyncio.sleep(_POLL_SECONDS)


def _by_status(counts: Mapping[Status, int]) -> str:
    return ", ".join(f"{number} {status}" for status, number in counts.items())
