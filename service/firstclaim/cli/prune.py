"""`firstclaim events prune`: parses, calls `firstclaim.operations.prune`, prints; decides nothing.

Exit codes as of `firstclaim.cli.events`; 3 also if the archive could not store a file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from firstclaim.cli.environment import database, operator, run_on_ledger
from firstclaim.cli.options import ArchiveUrl, DryRun, Group
from firstclaim.cli.terminal import out, print_text, reported
from firstclaim.formatting import number_of
from firstclaim.operations.limits import PRUNE_BUSY_PERCENT, ROW_DAYS_LEAST
from firstclaim.progress import progress_bar

if TYPE_CHECKING:
    from firstclaim.operations.archive_storage import Storage
    from firstclaim.operations.commands import Commands
    from firstclaim.operations.prune import Pruned, Retention

_DAYS_MOST = 36_500


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
    group: Group = None,
    archive: ArchiveUrl = None,
    busy_percent: Annotated[
        int,
        typer.Option(
            min=1, max=100, help="The share of the time, at most, for which the server deletes; 100: no rests."
        ),
    ] = PRUNE_BUSY_PERCENT,
    dry_run: DryRun = False,
) -> None:
    """Delete old events that are completed or ignored, in small batches. Unfinished events are never deleted.

    An event without its payload cannot be replayed. After its row is deleted, a late duplicate is a new event.

    With an archive, each payload is stored there before it is deleted.
    """
    from firstclaim.operations.archive_storage import open_storage
    from firstclaim.operations.prune import Retention, count_prunable

    if group is not None and not include_dead:
        raise typer.BadParameter("the events of a group are failed or dead: --group needs --include-dead")
    retention = Retention(payload_days, row_days, include_dead, group)
    with reported(), database(flags={} if archive is None else {"archive_url": archive}) as settings:
        storage = None if settings.archive_url is None else open_storage(settings.archive_url)
        if dry_run:
            payloads, rows = run_on_ledger(settings, lambda commands: count_prunable(commands, retention))
            where = "" if storage is None else f", and store the payloads at {settings.archive_url} before"
            print_text(f"would delete {_deleted(rows, max(0, payloads - rows))}{where}")
            return
        done = run_on_ledger(settings, lambda commands: _delete(commands, retention, storage, busy_percent))
    if settings.archive_url is None:
        print_text(f"deleted {_deleted(done.rows, done.payloads)}")
    else:
        print_text(
            f"stored {number_of(done.archived, 'payload', 'payloads')} at {settings.archive_url}; deleted "
            f"{number_of(done.payloads, 'payload', 'payloads')}, and {number_of(done.rows, 'event', 'events')}"
        )


async def _delete(commands: Commands, retention: Retention, storage: Storage | None, busy_percent: int) -> Pruned:
    from firstclaim.operations.prune import Pruned
    from firstclaim.operations.prune import prune as prune_ledger

    done = Pruned()
    # Without a total: to count a million events takes half a minute, in which deliveries wait longer.
    with progress_bar(out, f"pruning for at most {busy_percent}% of the time", None) as bar:
        async for batch in prune_ledger(commands, operator(), retention, storage, busy_percent=busy_percent):
            done += batch
            bar.advance(batch.payloads + batch.rows)
    return done


def _deleted(rows: int, payloads: int) -> str:
    return (
        f"{number_of(rows, 'event with its payload', 'events with their payloads')}, "
        f"and {number_of(payloads, 'payload of another event', 'payloads of other events')}"
    )
