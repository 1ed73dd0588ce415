"""What every command prints with, and how it fails: text, JSON lines, errors with an exit code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from textwrap import TextWrapper
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from rich.console import Console
from rich.text import Text

from firstclaim.errors import ConfigurationError, LedgerRefused, LedgerUnavailable, OperatorError
from firstclaim.status import Status

if TYPE_CHECKING:
    from rich.console import RenderableType

    from firstclaim.server.check import Check

STATUS_COLOURS = {
    Status.PENDING: "yellow",
    Status.PROCESSING: "cyan",
    Status.COMPLETED: "green",
    Status.IGNORED: "bright_black",
    Status.FAILED: "magenta",
    Status.DEAD: "red",
}

COLUMN_LEAST = 24  # characters: text in a narrower column is a column of single words
NAME_WIDTH = 18  # characters: of a field's name
_INDENT = "  "

out = Console(highlight=False)
if not out.is_terminal:
    out.width = 10_000  # no line is wrapped in a pipe or a file


@contextmanager
def reported() -> Iterator[None]:
    """Print the errors of the block as sentences on standard error and exit with their code, without a traceback."""
    try:
        yield
    except OperatorError as error:
        fail(str(error), error.exit_code)
    except LedgerRefused as error:
        fail(f"Postgres: {error.explained}", error.exit_code)
    except LedgerUnavailable as error:
        fail(f"Postgres: {error}", OperatorError.exit_code)


@contextmanager
def invalid_arguments() -> Iterator[None]:
    """Treat a `ValueError` of the block as an error in the command line."""
    try:
        yield
    except ValueError as error:
        raise ConfigurationError([str(error)]) from error


def fail(message: str, code: int) -> NoReturn:
    """Print each line of the message on standard error, and exit."""
    for line in message.splitlines():
        typer.echo(f"firstclaim: {line}", err=True)
    raise typer.Exit(code)


def print_text(content: RenderableType) -> None:
    """Print a table or text, never as markup: values from outside may look like it."""
    if isinstance(content, str):
        content = Text(content)
    out.print(content, soft_wrap=isinstance(content, Text))


def print_field(name: str, value: str, style: str = "", *, width: int = NAME_WIDTH) -> None:
    """Print a name and its value in two columns. `width`: of the first one."""
    _print_columns(Text(f"{name:{width}} ", "bold"), printable(value), style)


def print_json(content: dict[str, Any]) -> None:
    """Print an object on a line of its own."""
    import orjson

    out.file.write(orjson.dumps(content, option=orjson.OPT_NON_STR_KEYS).decode() + "\n")


def print_checks(checks: list[Check]) -> None:
    """Print a line for each check."""
    from firstclaim.server.check import Verdict

    colours = {Verdict.OK: "green", Verdict.WARN: "yellow", Verdict.FAIL: "red"}
    for check in checks:
        heading = Text.assemble((f"{check.verdict:6}", colours[check.verdict]), f"{check.name:20} ")
        _print_columns(heading, check.detail)


def _print_columns(heading: Text, value: str, style: str = "") -> None:
    """Print the value beside its heading, or below it where the terminal leaves too little room.

    No word is broken, even one that is longer than a line: an id or a path is there to be copied.
    """
    indent = len(heading)
    longest = max(map(len, value.split()), default=0)
    if len(value) > out.width - indent < max(longest, COLUMN_LEAST):
        heading.rstrip()
        if heading:
            print_text(heading)
        heading = Text(_INDENT)
        indent = len(heading)
    width = max(1, out.width - indent)
    wrap = TextWrapper(width, break_long_words=False, break_on_hyphens=False).wrap
    lines = [line for paragraph in value.splitlines() for line in wrap(paragraph)]
    for line in lines or [""]:
        print_text(Text.assemble(heading, (line, style)))
        heading = Text(" " * indent)


def printable(text: str) -> str:
    """The text without control characters: a value from outside must not move the cursor."""
    return "".join(each if each.isprintable() or each == "\n" else " " for each in text)
