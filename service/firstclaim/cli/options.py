"""Arguments and options that several commands share."""

from __future__ import annotations

import re
from typing import Annotated, Any

import typer

from firstclaim.operations.limits import TEXT_MOST_CHARACTERS, is_storable

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
