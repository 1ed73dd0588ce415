"""All commands of `firstclaim`, put together."""

from importlib.metadata import version
from typing import Annotated

import typer

from firstclaim.cli import admin, archive, database, events, livez, load, pauses, psql, reconcile, send, serve
from firstclaim.cli.terminal import out

app = typer.Typer(
    name="firstclaim",
    help="Receives Stripe webhooks and dispatches each event once.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(requested: bool) -> None:
    if requested:
        out.print(f"firstclaim {version('firstclaim')}")
        raise typer.Exit


@app.callback()
def _root(
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None: ...


app.command()(serve.serve)


@app.command("livez")
def _livez() -> None:
    """Check that the service on this machine is alive, for a container's health check. Exit code 1 if it is not."""
    raise typer.Exit(livez.livez())


app.command()(database.migrate)
app.command()(database.check)
app.command(context_settings=psql.PASS_ON)(psql.psql)
app.command("admin-password")(admin.admin_password)
app.command()(admin.dashboard)
app.command()(send.send)
app.command()(load.load)
app.add_typer(database.epoch, name="epoch")
app.add_typer(events.app, name="events")
app.add_typer(archive.app, name="archive")
app.command()(events.stats)
app.command()(pauses.pause)
app.command()(pauses.resume)
app.command("pauses")(pauses.list_pauses)
app.command()(reconcile.reconcile)
