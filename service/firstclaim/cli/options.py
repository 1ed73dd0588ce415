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
SendTo = Annotated[
    str,
    typer.Option(
        "--endpoint", metavar="NAME", help="Send to this named endpoint, signed with its secret.", show_default=False
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, one object per line.")]

PATTERNS = 'an event type, "prefix.*", "task:name", "task:*", "handler:name", "handler:*", or "*" for all'
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


def pattern_of_types(text: str) -> str:
    """The text, if it is one pattern of types. Raises a usage error."""
    from firstclaim.registry import is_pattern

    if not (is_storable(text) and is_pattern(text)):
        one = " (one pattern: call the command once for each)" if "," in text else ""
        raise typer.BadParameter(f"expected {PATTERNS}, not {text!r:.80}{one}")
    return text


def types_filter(text: str) -> str:
    """The patterns with commas between, if each is one: a mistyped one would select nothing. Raises a usage error."""
    from firstclaim.registry import is_pattern

    for each in storable(text).split(","):
        if not is_pattern(each.strip()):
            raise typer.BadParameter(f"expected {PATTERNS}, or several with commas between, not {each.strip()!r:.80}")
    return text


def is_type_of_events(event_id: str) -> bool:
    """Whether an unknown id is a type instead: what is refused can then name --type."""
    from firstclaim.registry import is_pattern

    return ("." in event_id or ":" in event_id) and is_pattern(event_id)


def status(text: str) -> Status:
    """The status. Raises a usage error, in words of ours: typer's begin with "Value error,"."""
    try:
        return Status(text)
    except ValueError:
        raise typer.BadParameter(f"expected {', '.join(Status)}, not {text!r:.80}") from None


def endpoint_filter(text: str) -> str:
    """The name of an endpoint, as `Selection` takes it. Raises a usage error."""
    return "" if text == "-" else storable(text)


# Which events a command is about.
Id = Annotated[str, typer.Argument(parser=storable, metavar="ID", help="Event id.")]
Ids = Annotated[list[str] | None, typer.Argument(parser=storable, metavar="ID...", help="Event ids.")]
Statuses = Annotated[
    list[Status] | None,
    typer.Option(
        "--status",
        parser=status,
        autocompletion=lambda: list(Status),
        metavar="|".join(Status),
        help="Only events with this status. Repeat it for more.",
    ),
]
Type = Annotated[
    str | None,
    typer.Option(
        "--type",
        parser=types_filter,
        metavar="TYPE",
        help='Only events of this type, of "prefix.*", "task:*", "handler:*" or "*" (all), or of several: "a,b.*".',
    ),
]
Account = Annotated[
    str | None, typer.Option("--account", parser=storable, metavar="ID", help="Only events of this connected account.")
]
Endpoint = Annotated[
    str | None,
    typer.Option(
        "--endpoint",
        parser=endpoint_filter,
        metavar="NAME",
        help="Only events that this named endpoint received first; '-': the endpoint without a name.",
    ),
]
Group = Annotated[
    str | None,
    typer.Option("--group", parser=storable, metavar="GROUP", help="Only events of this group of `events groups`."),
]
OlderThan = Annotated[float | None, duration_option("Only events received longer ago than this.")]
NewerThan = Annotated[float | None, duration_option("Only events received within this time.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print how many, and change nothing.")]
ArchiveUrl = Annotated[
    str | None,
    typer.Option(
        "--archive",
        metavar="URL",
        help="Archive of payloads: s3://bucket/prefix, or file:///folder.",
        show_default="FIRSTCLAIM_ARCHIVE_URL, or none",
    ),
]
