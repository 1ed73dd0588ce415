"""`firstclaim pause`, `resume` and `pauses`: parses, calls `firstclaim.operations.pauses`, prints; decides nothing.

Exit codes: 0 success · 1 nothing was changed · 2 the command line is wrong · 3 Postgres is unreachable, or not
migrated.
"""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from firstclaim.cli.environment import database, operator, run_on_ledger
from firstclaim.cli.options import PATTERNS, AsJson, pattern_of_types, storable
from firstclaim.cli.terminal import NAME_WIDTH, fail, print_field, print_json, print_text, reported
from firstclaim.formatting import ago, number_of
from firstclaim.status import Status

if TYPE_CHECKING:
    from firstclaim.operations.commands import Commands
    from firstclaim.operations.pauses import Overlapping, Pause


# An event's type, or what was accepted for follow-ups before it had to be a name: such a pause must end like any other.
_STORED = re.compile(r"[A-Za-z0-9_.\[\]\-]+|(task|handler):[!-)+-~]+")


def _resumable(text: str) -> str:
    """The text, if there can be such a pause: a handler that raises `Pause` pauses any type. Raises a usage error."""
    return storable(text) if _STORED.fullmatch(text) else pattern_of_types(text)


_HELP = f"{PATTERNS[0].upper()}{PATTERNS[1:]}."
Pattern = Annotated[str, typer.Argument(parser=pattern_of_types, metavar="TYPES", help=_HELP)]
PausedPattern = Annotated[str, typer.Argument(parser=_resumable, metavar="TYPES", help=_HELP)]


def pause(types: Pattern) -> None:
    """Stop dispatching events of these types, in all services. They are still received and recorded, and wait.

    Running services learn of it within a round of recovery, about a second. Events that are claimed by then go on.

    Exit code 1 if exactly these types are paused already.
    """
    from firstclaim.operations import pauses
    from firstclaim.operations.selection import Selection

    async def work(operations: Commands) -> tuple[bool, int]:
        new = await pauses.pause(operations, operator(), types)
        counts = await operations.count(Selection(statuses=[Status.PROCESSING], type=types))
        return new, counts.get(Status.PROCESSING, 0)

    with reported(), database() as settings:
        new, processing = run_on_ledger(settings, work)
        if not new:
            fail(f"{types} is paused already", 1)
        print_text(f"paused {types}; {number_of(processing, 'event is', 'events are')} being handled right now")
        if (doubt := _doubt(types)) is not None:
            typer.echo(f"note: {doubt}", err=True)


def _doubt(types: str) -> str | None:
    """Why the pause may hold nothing: it matches no known type. It is made all the same: Stripe may have newer ones."""
    from firstclaim.follow_up import is_follow_up
    from firstclaim.server.event_types import no_event_type

    if is_follow_up(types):  # which tasks and handlers there are, only the services know
        return None
    if (doubt := no_event_type([types])) is not None and "." not in types:
        return f"{doubt}; a handler is paused as handler:{types}, a task as task:{types}"
    return doubt


def resume(types: PausedPattern) -> None:
    """Dispatch events of these types again. Those that have waited have their whole time to give up again.

    Exit code 1 if exactly these types are not paused: `firstclaim pauses` lists what is.
    """
    from firstclaim.operations import pauses

    async def work(operations: Commands) -> tuple[int | None, Overlapping]:
        waited = await pauses.resume(operations, operator(), types, give_up_seconds=settings.give_up_seconds)
        return waited, await pauses.overlapping(operations, types)

    with reported(), database() as settings:
        waited, others = run_on_ledger(settings, work)
        if waited is None:
            pattern_of_types(types)
            fail(f"{types} {_not_paused(others)}", 1)
        print_text(f"resumed {types}; {number_of(waited, 'event has', 'events have')} waited")
        if others.of_all:
            print_text(f"{types} is still {_paused_by(others.of_all)}")
        elif others.of_some:
            print_text(f"some of its types are still {_paused_by(others.of_some)}")


def _not_paused(others: Overlapping) -> str:
    if others.of_all:
        return f"has no pause of its own, and is {_paused_by(others.of_all)}"
    if others.of_some:
        return f"has no pause of its own; some of its types are {_paused_by(others.of_some)}"
    return "is not paused"


def _paused_by(pauses: list[Pause]) -> str:
    return f"paused by {' and '.join(each.pattern for each in pauses)}: to end that, {resume_commands(pauses)}"


def resume_commands(pauses: list[Pause]) -> str:
    """What an operator types to end these pauses."""
    import shlex

    return " and ".join(f"firstclaim resume {shlex.quote(each.pattern)}" for each in pauses)


def list_pauses(as_json: AsJson = False) -> None:
    """List what is paused, by whom, and since when."""
    from firstclaim.operations.pauses import paused

    with reported(), database() as settings:
        found = run_on_ledger(settings, paused)
    if as_json:
        for each in found:
            print_json(asdict(each))
        return
    if not found:
        print_text("nothing is paused")
    width = max([NAME_WIDTH, *(len(each.pattern) for each in found)])
    for each in found:
        print_field(each.pattern, f"by {each.operator}, {ago(each.paused_at)}", width=width)
