"""`firstclaim admin-password` and `firstclaim dashboard`."""

from __future__ import annotations

from importlib import resources
from typing import Annotated

import typer

from firstclaim.cli.terminal import out

_RUNBOOK = "docs/runbook"  # where the repository has it


def admin_password() -> None:
    """Prompt for a password, and print its hash for FIRSTCLAIM_ADMIN_PASSWORD."""
    from firstclaim.passwords import make_hash

    password: str = typer.prompt("Password", hide_input=True, confirmation_prompt=True, err=True)
    try:
        typer.echo(make_hash(password))
    except ValueError as error:
        raise typer.BadParameter(f"the password {error}") from None


def dashboard(
    print_it: Annotated[bool, typer.Option("--print", help="Print it. Required: nothing is installed.")] = False,
    alerts: Annotated[bool, typer.Option("--alerts", help="The Prometheus alert rules instead.")] = False,
    runbook: Annotated[
        str, typer.Option(metavar="URL", help="With --alerts: the folder of the runbook, for the alerts' runbook_url.")
    ] = _RUNBOOK,
) -> None:
    """Print the Grafana dashboard of this service as JSON to import, or its Prometheus alert rules."""
    if not print_it:
        raise typer.BadParameter("add --print: the command can only print")
    name = "alerts.yaml" if alerts else "dashboard.json"
    text = resources.files("firstclaim").joinpath("observability", name).read_text()
    out.file.write(text.replace(f"runbook_url: {_RUNBOOK}/", f"runbook_url: {runbook.rstrip('/')}/"))
