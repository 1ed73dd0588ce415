"""`firstclaim send`: one signed event, in as many copies as asked."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from firstclaim.cli.terminal import WEBHOOK_URL, arguments, out, reported, signing_secret
from firstclaim.progress import progress_bar


def send(
    event_type: Annotated[str, typer.Argument(metavar="TYPE", help="Event type, e.g. invoice.payment_failed.")] = "",
    copies: Annotated[int, typer.Option(min=1, max=10_000, help="Copies, all in flight at once.")] = 1,
    url: Annotated[str, typer.Option(help="Where to.")] = WEBHOOK_URL,
    event_id: Annotated[str, typer.Option("--id", help="Event id; default: a fresh one.")] = "",
    file: Annotated[Path | None, typer.Option(help="Send this event instead of a template.")] = None,
) -> None:
    """Sign and send an event as Stripe would; exit 1 if more than one copy was processed."""
    from firstclaim.sending import client, report

    if bool(event_type) == (file is not None):
        raise typer.BadParameter("name an event TYPE, or give one with --file")
    with reported():
        with arguments():
            client.check_url(url)
            body = _event(event_type, event_id, file)
        with progress_bar(out, "sending", copies) as bar:
            answers = asyncio.run(client.send(url, body, signing_secret(), copies, lambda _: bar.advance()))
        report.report(answers, out)
        raise typer.Exit(report.exit_code(answers))


def _event(event_type: str, event_id: str, file: Path | None) -> bytes:
    from firstclaim.sending import events

    if file is not None:
        return events.read_event(file, event_id or None)
    return events.build_event(event_type, event_id or None)
