"""`firstclaim reconcile`: parses, calls `firstclaim.operations.reconcile`, prints; decides nothing.

`--json` prints one JSON object, also when the run was interrupted; fields may be added, none is renamed. Exit codes:
0 success · 1 negative result (Stripe refuses the key, or listed an invalid event) · 2 the command line or a setting is
wrong · 3 Postgres or Stripe is unreachable. 3, not 1, for Stripe: the only thing to do is to try again later.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from firstclaim.cli.environment import database, operator, run_on_ledger
from firstclaim.cli.options import AsJson, duration
from firstclaim.cli.terminal import fail, out, print_json, reported
from firstclaim.errors import ConfigurationError
from firstclaim.formatting import number_of_events
from firstclaim.operations.limits import LISTED_DAYS_MOST
from firstclaim.progress import progress_bar

if TYPE_CHECKING:
    from firstclaim.operations.commands import Commands
    from firstclaim.operations.reconcile import ReconcileProgress
    from firstclaim.settings import Settings


def _since(text: str) -> int:
    """Seconds. Raises a usage error."""
    seconds = int(duration(text))
    if not 0 < seconds <= LISTED_DAYS_MOST * 86_400:
        raise typer.BadParameter(f"expected more than 0 and at most {LISTED_DAYS_MOST}d: Stripe lists no older events")
    return seconds


def reconcile(
    since: Annotated[
        int,
        typer.Option(
            parser=_since, metavar="90s|15m|2h|3d", help=f"How far back to start; at most {LISTED_DAYS_MOST}d."
        ),
    ],
    undelivered: Annotated[
        bool,
        typer.Option("--undelivered", help="Only events that Stripe has not delivered to all endpoints."),
    ] = False,
    endpoint: Annotated[
        str | None,
        typer.Option(
            "--endpoint",
            metavar="NAME",
            help="Record them as if this named endpoint had received them. It must be in STRIPE_WEBHOOK_SECRETS.",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print how many are missing, and change nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Record the events that Stripe lists and the ledger lacks. Running services handle them.

    Needs DATABASE_URL, STRIPE_API_KEY with the permission to read Events, and
    the services' FIRSTCLAIM_HANDLERS: other events are recorded as ignored.

    After the ledger was lost, reconcile the full list. After an outage of the endpoint, --undelivered is enough.

    To resume an interrupted run, repeat the command: what it recorded is in the ledger then.
    """
    from firstclaim.inbox.routes import Routes
    from firstclaim.operations.reconcile import ReconcileOptions, ReconcileProgress, Reconciliation
    from firstclaim.operations.stripe_api import StripeEvents
    from firstclaim.registry import Registry

    options = ReconcileOptions(since, undelivered, endpoint)
    progress = ReconcileProgress()
    with reported(), database() as settings:
        key = _key(settings)
        _check_endpoint(settings, endpoint)
        routes = Routes(Registry.load(settings.handlers, settings), settings.livemode)

        async def work(operations: Commands) -> None:
            nonlocal progress
            async with StripeEvents.connect(settings.stripe_api_base, key) as events:
                run = Reconciliation(
                    operations,
                    events,
                    options,
                    wants=routes.wants,
                    body_most_bytes=settings.body_most_bytes,
                    give_up_seconds=settings.give_up_seconds,
                )
                progress = run.progress
                with progress_bar(out, "percent reconciled", 100) as bar:
                    async for _ in run.run(operator(), dry_run=dry_run):
                        bar.update(int(100 * progress.covered))

        complete = False
        try:
            run_on_ledger(settings, work)
            complete = True
        finally:  # what was recorded stays recorded, however the run ended: print it
            if as_json:
                print_json(_fields(progress, complete=complete, dry_run=dry_run))
            elif complete or progress.found:
                out.print(_summary(progress, complete=complete, dry_run=dry_run), soft_wrap=True)
        if progress.refused_events:
            fail("\n".join(_refusals(progress)), 1)


def _check_endpoint(settings: Settings, endpoint: str | None) -> None:
    if endpoint is not None and endpoint not in settings.endpoints:
        raise ConfigurationError([f"--endpoint: STRIPE_WEBHOOK_SECRETS names no endpoint {endpoint!r}"])


def _key(settings: Settings) -> str:
    if settings.stripe_api_key is None:
        raise ConfigurationError(
            ["STRIPE_API_KEY is missing: set it to a secret key, or to a restricted one that may read Events"]
        )
    return settings.stripe_api_key.get_secret_value()


def _summary(progress: ReconcileProgress, *, complete: bool, dry_run: bool) -> str:
    recorded = f"{progress.missing} would be recorded" if dry_run else f"{progress.recorded} recorded"
    parts = [f"{progress.already_here} already in the ledger", recorded]
    if progress.ignored:
        parts[-1] += f" ({progress.ignored} ignored: no handler in FIRSTCLAIM_HANDLERS)"
    if progress.refused_events:
        parts.append(f"{progress.refused_events} refused")
    summary = f"{number_of_events(progress.found)} listed by Stripe: {', '.join(parts)}"
    return summary if complete else f"{summary}. The run is incomplete: repeat it, no event is recorded twice."


def _fields(progress: ReconcileProgress, *, complete: bool, dry_run: bool) -> dict[str, Any]:
    return {
        "found": progress.found,
        "already_here": progress.already_here,
        "recorded": progress.recorded,
        "ignored": progress.ignored,
        "missing": progress.missing - progress.recorded,  # after a dry run all of them are still missing
        "refused": progress.refused_events,
        "refusals": [{"event_id": event_id, "reason": reason} for event_id, reason in progress.refused],
        "dry_run": dry_run,
        "complete": complete,
    }


def _refusals(progress: ReconcileProgress) -> list[str]:
    lines = [
        f"{event_id} was not recorded, because its delivery would be rejected too: {reason}"
        for event_id, reason in progress.refused
    ]
    more = progress.refused_events - len(lines)
    return [*lines, f"and {more} more"] if more else lines
