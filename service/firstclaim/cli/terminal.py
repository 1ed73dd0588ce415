"""What every command of the terminal has in common: where it prints, how it fails, and which database it asks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, NoReturn

import typer
from rich.console import Console
from rich.text import Text

from firstclaim.errors import ConfigurationError, LedgerUnavailable, OperatorError

if TYPE_CHECKING:
    from firstclaim.server.preflight import Check
    from firstclaim.settings import Settings

WEBHOOK_URL = "http://127.0.0.1:8000/webhooks/stripe"  # where `serve` listens by default

out = Console(highlight=False)
if not out.is_terminal:
    out.width = 10_000  # into a pipe or a file lines go whole


@contextmanager
def reported() -> Iterator[None]:
    """Say what is wrong in sentences on standard error and exit with its code; a traceback helps no operator."""
    try:
        yield
    except OperatorError as error:
        fail(str(error), error.exit_code)
    except LedgerUnavailable as error:
        fail(f"Postgres: {error}", OperatorError.exit_code)


def fail(message: str, code: int) -> NoReturn:
    """On standard error, a line each."""
    for line in message.splitlines():
        typer.echo(f"firstclaim: {line}", err=True)
    raise typer.Exit(code)


def read_settings(*, receiving: bool = True) -> Settings:
    """From the environment, the logs set up by them; `receiving`: also what only a receiver needs."""
    from firstclaim.observability.logging import configure
    from firstclaim.settings import load_settings

    settings = load_settings(receiving=receiving)
    configure(settings.log_format, settings.log_level)
    return settings


@contextmanager
def database() -> Iterator[Settings]:
    """For commands that ask Postgres alone: settings with its address, no Redis and no secret needed."""
    from firstclaim.embedded.data_folder import servers

    settings = read_settings(receiving=False)
    with nullcontext(settings) if settings.database_url else servers(settings, share=True) as ready:
        yield ready


def dsn_of(settings: Settings) -> str:
    """The database's address; raises `ConfigurationError` when there is none."""
    if settings.database_url is None:
        raise ConfigurationError(["DATABASE_URL is missing"])
    return settings.database_url.get_secret_value()


def signing_secret() -> str:
    """The secret that `serve` uses here. Raises `ConfigurationError` when there is none yet."""
    from firstclaim.embedded.data_folder import kept_secret

    settings = read_settings()
    if settings.stripe_webhook_secrets:
        return settings.stripe_webhook_secrets[0].get_secret_value()
    if (kept := kept_secret(settings)) is not None:
        return kept
    raise ConfigurationError(
        [f"no signing secret: set STRIPE_WEBHOOK_SECRETS, or start `firstclaim serve` on {settings.data_dir} first"]
    )


@contextmanager
def arguments() -> Iterator[None]:
    """A `ValueError` in the block is about the command line."""
    try:
        yield
    except ValueError as error:
        raise ConfigurationError([str(error)]) from error


def print_checks(found: list[Check]) -> None:
    """A line for each."""
    from firstclaim.server.preflight import Verdict

    colours = {Verdict.OK: "green", Verdict.WARN: "yellow", Verdict.FAIL: "red"}
    for each in found:
        line = Text.assemble((f"{each.verdict:6}", colours[each.verdict]), f"{each.name:20} ", each.detail)
        out.print(line, soft_wrap=True)
