"""`firstclaim migrate`, `check` and `epoch rotate`: the commands that concern the stores as a whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from firstclaim.cli.environment import (
    database,
    dsn_of,
    embedded_stopped,
    operator,
    read_settings,
    run_on_ledger,
    shared_servers,
)
from firstclaim.cli.terminal import out, print_checks, reported

if TYPE_CHECKING:
    from firstclaim.settings import Settings

epoch = typer.Typer(no_args_is_help=True, help="The ledger's epoch, which every marker in Redis contains.")


def migrate() -> None:
    """Migrate the database's schema to the newest revision. Any number of processes may do so at once."""
    with reported(), database() as settings:
        migrate_schema(settings)


def check() -> None:
    """Check the configuration, the handlers and both stores, and print a line for each. Changes nothing.

    Exit code 2 if the environment or a handler module is at fault, 3 if another check fails.
    """
    import asyncio

    from firstclaim.embedded.data_folder import running_database
    from firstclaim.server.check import Verdict
    from firstclaim.server.preflight import all_checks

    with reported(), shared_servers(given := read_settings()) as settings:
        checks = asyncio.run(all_checks(settings))
        failed = [each for each in checks if each.verdict is Verdict.FAIL]
        if failed and given.embedded_database and running_database(given) is None:
            raise embedded_stopped(given)
        print_checks(checks)
        if failed:
            raise typer.Exit(min(each.exit_code for each in failed))


@epoch.command()
def rotate() -> None:
    """Invalidate all markers in Redis. Run it after the ledger was restored from a backup, before you serve."""
    with reported(), database() as settings:
        before, after = run_on_ledger(settings, lambda operations: operations.rotate_epoch(operator()))
        out.print(f"epoch {before} -> {after}. Running services adopt it within one recovery round.", soft_wrap=True)


def migrate_schema(settings: Settings) -> None:
    """Migrate, and print the revisions before and after."""
    import asyncio

    from firstclaim.migrations import schema

    def say(line: str) -> None:
        out.print(line, soft_wrap=True)

    before, after = asyncio.run(
        schema.migrate(
            dsn_of(settings),
            settings.postgres_timeout_seconds,
            schema=settings.schema_name,
            handlers=settings.handlers,
            say=say,
        )
    )
    if before != after:
        out.print(f"schema {before or 'empty'} -> {after}")
    else:
        out.print(f"schema {after}, up to date")
