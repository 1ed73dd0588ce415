"""Arguments and options that several commands share."""

from __future__ import annotations

import re
from typing import Annotated, Any

import typer

from firstclaim.operations.limits import TEXT_MOST_CHARACTERS, is_storable
from firstclaim.status import Status

WebhookUrl = Annotated[
    str, typer.Option("--url", help="The webhook endpoint.", show_default="where serve listens here")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, one object per line.")]

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def duration(text: str) -> float:
    """A duration in seconds. Raises a usage error."""
    found = re.fullmatch(r"(\d{1,6})([smhd])", text)
    if found is None:
        raise typer.BadParameter(f"expected a number and s, m, h or d (90s, 15m, 2h, 3d), not {text!r}")
    return int(found[1]) * _SECONDS[found[2]]


def duration_option(help_text: str) -> Any:
    """An option that takes a duration."""
    return typer.Option(parser=duration, metavar="90s|15m|2h|3d", help=help_text)


def storable(text: str) -> str:
    """The text, if the ledger can store it. Raises a usage error."""
    if not is_storable(text):
        raise typer.BadParameter(f"expected 1 to {TEXT_MOST_CHARACTERS} printable characters, not {text!r:.80}")
    return text


# Which events a command is about.
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
