"""What every command of the terminal has in common: where it prints, how it fails, and which database it asks."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import NoReturn

import typer
from rich.console import Console

from firstclaim.embedded.data_folder import servers
from firstclaim.errors import ConfigurationError, LedgerUnavailable, OperatorError
from firstclaim.observability.logging import configure
from firstclaim.settings import Settings, load_settings

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
    settings = load_settings(receiving=receiving)
    configure(settings.log_format, settings.log_level)
    return settings


@contextmanager
def database() -> Iterator[Settings]:
    """For commands that ask Postgres alone: settings with its address, no Redis and no secret needed."""
    settings = read_settings(receiving=False)
    with nullcontext(settings) if settings.database_url else servers(settings, share=True) as ready:
        yield ready


def dsn_of(settings: Settings) -> str:
    """The database's address; raises `ConfigurationError` when there is none."""
    if settings.database_url is None:
        raise ConfigurationError(["DATABASE_URL is missing"])
    return settings.database_url.get_secret_value()
