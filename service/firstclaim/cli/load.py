"""`firstclaim load`: a load test and its verdict."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Annotated, Any

import typer

from firstclaim.cli.environment import dsn_of, endpoint_url, read_settings, signing_secret
from firstclaim.cli.options import SendTo, WebhookUrl
from firstclaim.cli.terminal import invalid_arguments, out, reported

# `firstclaim.loadtest.plan.IN_FLIGHT_MOST`, which a test compares: the help needs no load generator.
_USERS_MOST = 900


def _percent(help_text: str) -> Any:
    return typer.Option(min=0, max=100, metavar="PERCENT", help=help_text)


def load(
    url: WebhookUrl = "",
    users: Annotated[
        int, typer.Option(min=1, max=_USERS_MOST, help="Concurrent users; each sends one event at a time.")
    ] = 20,
    rate: Annotated[
        float, typer.Option(min=0, help="Deliveries per second, of all users together. 0: as many as possible.")
    ] = 0,
    duration: Annotated[float, typer.Option(min=0.1, help="Seconds to send for.")] = 10,
    duplicates: Annotated[
        float, _percent("Share of the events that are sent a second time, 1 to 1000 events later.")
    ] = 20,
    concurrent_duplicates: Annotated[
        float, _percent("Share of the events that are sent as several copies, all in flight at the same instant.")
    ] = 50,
    copies: Annotated[int, typer.Option(min=2, max=100, help="Number of those copies.")] = 5,
    types: Annotated[
        list[str] | None,
        typer.Option("--type", help="An event type. Repeat it for more.", show_default="all that have a template"),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Determines the sequence of events.", show_default="random")] = None,
    secret: Annotated[str, typer.Option(help="Signing secret.", show_default="the one that serve uses here")] = "",
    endpoint: SendTo = "",
    database_url: Annotated[
        str, typer.Option(help="The service's Postgres, for the verdict.", show_default="the one that serve uses here")
    ] = "",
    settle: Annotated[float, typer.Option(min=0, help="Seconds to wait at the end for unfinished events.")] = 60,
    html: Annotated[Path | None, typer.Option(help="Write locust's report, with charts, to this file.")] = None,
) -> None:
    """Send signed events of mixed types to a service, and report the outcome of each event.

    For the verdict the service must run with
    FIRSTCLAIM_HANDLERS=firstclaim.handlers.load_probe.

    An event may be drawn both for a second time and for several copies.
    A second time that would come after the end is left out.
    At a fixed rate, latency counts from the time at which a delivery was due.

    Exit code 1 if an event was lost, doubled or not settled in time, if none
    was accepted, or if the probe handled none.
    """
    from firstclaim.embedded.data_folder import running_database
    from firstclaim.loadtest import capacity, runner
    from firstclaim.loadtest.plan import Plan
    from firstclaim.sending.events import shipped_types
    from firstclaim.urls.postgres import postgres_dsn

    with reported():
        settings = read_settings(receiving=False)
        plan = Plan(
            url=url or endpoint_url(endpoint),
            secret=signing_secret(secret, endpoint),
            types=tuple(types or shipped_types()),
            users=users,
            deliveries_per_second=rate,
            duration_seconds=duration,
            duplicates_percent=duplicates,
            concurrent_percent=concurrent_duplicates,
            copies=copies,
            seed=random.getrandbits(32) if seed is None else seed,
            html=None if html is None else str(html.resolve()),
        )
        metrics = capacity.metrics_url(plan.url, settings.webhook_path, endpoint)
        if database_url:
            with invalid_arguments():
                dsn: str | None = postgres_dsn(database_url)
        else:
            dsn = dsn_of(settings) if settings.database_url else running_database(settings)
        raise typer.Exit(runner.run(plan, metrics, dsn, settings.schema_name, settle, out))
