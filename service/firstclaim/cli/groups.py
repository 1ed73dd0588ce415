"""`firstclaim events groups`: what fails, grouped by handler, class of error and place in the user's code.

Guarantees: an id is never cut or broken. Exit codes and `--json` as of `firstclaim.cli.events`.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from firstclaim.cli.environment import database, run_on_ledger
from firstclaim.cli.options import AsJson, duration_option
from firstclaim.cli.terminal import print_field, print_json, print_text, reported
from firstclaim.formatting import ago, number_of, number_of_events

if TYPE_CHECKING:
    from firstclaim.operations.commands import Commands
    from firstclaim.operations.failure_groups import FailureGroup, Ungrouped


def groups(
    newer_than: Annotated[
        float | None, duration_option("Only groups that failed within this time, and only these failures.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="List at most this many.")] = 50,
    as_json: AsJson = False,
) -> None:
    """List what fails: failures of one handler, of one class of error, from one line of your code. The latest first.

    The events of a group are those whose last failure belongs to it: --group of list, replay and prune selects them.
    """

    async def read(operations: Commands) -> tuple[list[FailureGroup], Ungrouped]:
        return await operations.failure_groups(limit, newer_than_seconds=newer_than), await operations.ungrouped()

    with reported(), database() as settings:
        found, ungrouped = run_on_ledger(settings, read)
    if as_json:
        for each in found:
            print_json(asdict(each))
        return
    if not found:
        print_text("no group of failures")
    for number, each in enumerate(found):
        if number:
            print_text("")
        _print(each)
    if len(found) == limit:
        print_text(f"limited to the latest {limit}; --limit lists more")
    if ungrouped.words:
        print_text("")
        print_text(ungrouped.words)


def _print(group: FailureGroup) -> None:
    left = [(group.events_failed, "failed"), (group.events_dead, "dead")]
    now = ", ".join(f"{number_of_events(number)} {status}" for number, status in left if number)
    print_field("group", group.group, "bold")
    print_field("handler", group.handler)
    print_field("error", group.error_class + (f" at {group.place}" if group.place else ""))
    print_field("failures", number_of(group.failures, "failed attempt", "failed attempts"))
    print_field("events now", now or "none failed or dead", "red" if group.events_dead else "")
    print_field("seen", f"first {ago(group.first_seen_at)}, last {ago(group.last_seen_at)}")
    print_field("example", group.example_id)
