"""`firstclaim migrate`, `check` and `epoch rotate`: what concerns the stores as a whole."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import typer

from firstclaim.cli.terminal import database, dsn_of, out, print_checks, read_settings, reported

if TYPE_CHECKING:
    from firstclaim.settings import Settings

epoch = typer.Typer(no_args_is_help=True, help="The ledger's epoch, which every marker in Redis carries.")


def migrate() -> None:
    """Bring the database's schema up to date; safe to run from many places at once."""
    with reported(), database() as settings:
        bring_up_to_date(settings)


def check() -> None:
    """Check configuration, handlers and both stores, a line each; changes nothing."""
    from firstclaim.embedded.data_folder import servers
    from firstclaim.server.preflight import Verdict, all_checks

    with reported(), servers(read_settings(), share=True) as settings:
        found = asyncio.run(all_checks(settings))
        print_checks(found)
        if any(each.verdict is Verdict.FAIL for each in found):
            raise typer.Exit(2 if any(each.fatal and each.name == "handlers" for each in found) else 3)


@epoch.command()
def rotate() -> None:
    """Invalidate all markers in Redis: the step after restoring the ledger from a backup."""
    from firstclaim.cli.events import on, operator

    with reported(), database() as settings:
        before, after = asyncio.run(on(settings, lambda operations: operations.rotate_epoch(operator())))
        out.print(f"epoch {before} -> {after}; running services notice within one recovery round", soft_wrap=True)


def bring_up_to_date(settings: Settings) -> None:
    """Migrate, and print from which revision to which."""
    from firstclaim.migrations import schema

    before, after = asyncio.run(schema.migrate(dsn_of(settings), settings.postgres_timeout_seconds))
    if before != after:
        out.print(f"schema {before or 'empty'} -> {after}")
    else:
        out.print(f"schema {after}, up to date")
