"""`firstclaim send`: one signed event, in any number of copies."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from firstclaim.cli.environment import endpoint_url, signing_secret
from firstclaim.cli.options import SendTo, WebhookUrl
from firstclaim.cli.terminal import invalid_arguments, out, reported
from firstclaim.progress import progress_bar


def send(
    event_type: Annotated[str, typer.Argument(metavar="TYPE", help="Event type, e.g. invoice.payment_failed.")] = "",
    copies: Annotated[int, typer.Option(min=1, max=10_000, help="Number of copies, up to 200 in flight at once.")] = 1,
    url: WebhookUrl = "",
    event_id: Annotated[str, typer.Option("--id", help="Event id. Default: a new one.")] = "",
    file: Annotated[Path | None, typer.Option(help="Send the event in this JSON file instead of a template.")] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PATH=VALUE", help="Set a field: data.object.currency=usd. Repeat it for more."),
    ] = None,
    secret: Annotated[str, typer.Option(help="Signing secret.", show_default="the one that serve uses here")] = "",
    endpoint: SendTo = "",
) -> None:
    """Sign an event as Stripe would, send it, and print the answers.

    Exit code 1 if more than one copy was processed, or if none was answered with a 2xx.
    """
    import asyncio

    from firstclaim.sending import client, events, report

    if bool(event_type) == (file is not None):
        raise typer.BadParameter("give either an event TYPE, or a file with --file")
    with reported():
        url = url or endpoint_url(endpoint)
        with invalid_arguments():
            client.check_url(url)
            body = events.changed(_event(event_type, event_id, file), changes or ())
        with progress_bar(out, "sending", copies) as bar:
            answers = asyncio.run(
                client.send(url, body, signing_secret(secret, endpoint), copies, lambda _: bar.advance())
            )
        report.report(answers, out, events.event_id_of(body))
        raise typer.Exit(report.exit_code(answers))


def _event(event_type: str, event_id: str, file: Path | None) -> bytes:
    from firstclaim.sending import events

    if file is not None:
        return events.read_event(file, event_id or None)
    return events.build_event(event_type, event_id or None)
