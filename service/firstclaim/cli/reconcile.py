"""`firstclaim reconcile`: parses, calls `firstclaim.operations.reconcile`, prints; decides nothing.

`--json` prints one JSON object, also when the run did not come to its end; fields may be added, none is renamed. Exit
codes: 0 done · 1 the answer is no (Stripe does not take the key, or sent an event that is none) · 2 the command line
or a setting is wrong · 3 Postgres or Stripe is away. 3, not 1, for Stripe: trying again later is all there is to do.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Any

import typer

from firstclaim.cli.events import AsJson, duration, on, operator, print_json
from firstclaim.cli.terminal import database, fail, out, reported
from firstclaim.errors import ConfigurationError
from firstclaim.operations.limits import LISTED_DAYS_MOST
from firstclaim.progress import progress_bar

if TYPE_CHECKING:
    from firstclaim.operations.commands import Commands
    from firstclaim.operations.reconcile import ReconcileProgress
    from firstclaim.settings import Settings


def _since(text: str) -> int:
    """Seconds; raises a usage error."""
    seconds = int(duration(text))
    if not 0 < seconds <= LISTED_DAYS_MOST * 86_400:
        raise typer.BadParameter(
            f"expected more than nothing and at most {LISTED_DAYS_MOST}d: Stripe lists no older events"
        )
    return seconds


def reconcile(
    since: Annotated[
        int,
        typer.Option(
            parser=_since, metavar="90s|15m|2h|3d", help=f"From how long ago on; at most {LISTED_DAYS_MOST}d."
        ),
    ],
    undelivered: Annotated[
        bool, typer.Option("--undelivered", help="Only what Stripe could not deliver to all endpoints, or not yet.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say how many are missing, and change nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Record what Stripe's list of events has and the ledger has not; running services take it up, oldest first.

    Needs DATABASE_URL, and STRIPE_API_KEY with the permission to read Events. After a lost ledger the full list is the
    repair; --undelivered is for an outage of the endpoint.

    To resume a run that was interrupted, give the same command again: what it recorded is already here then.
    """
    from firstclaim.operations.reconcile import ReconcileOptions, ReconcileProgress, Reconciliation
    from firstclaim.operations.stripe_api import StripeEvents

    options = ReconcileOptions(since, undelivered)
    progress = ReconcileProgress()
    with reported(), database() as settings:
        key = _key(settings)

        async def work(operations: Commands) -> None:
            nonlocal progress
            async with StripeEvents.connect(settings.stripe_api_base, key) as events:
                run = Reconciliation(
                    operations,
                    events,
                    options,
                    body_most_bytes=settings.body_most_bytes,
                    give_up_seconds=settings.give_up_seconds,
                )
                progress = run.progress
                with progress_bar(out, "reconciling, percent", 100) as bar:
                    async for _ in run.run(operator(), dry_run=dry_run):
                        bar.update(int(100 * progress.covered))

        complete = False
        try:
            asyncio.run(on(settings, work))
            complete = True
        finally:  # what was recorded stays, whatever ended the run, and is said
            if as_json:
                print_json(_fields(progress, complete=complete, dry_run=dry_run))
            elif complete or progress.found:
                out.print(_words(progress, complete=complete, dry_run=dry_run), soft_wrap=True)
        if progress.refused_events:
            fail("\n".join(_refusals(progress)), 1)


def _key(settings: Settings) -> str:
    if settings.stripe_api_key is None:
        raise ConfigurationError(
            ["STRIPE_API_KEY is missing: set it to a secret key, or to a restricted one that may read Events"]
        )
    return settings.stripe_api_key.get_secret_value()


def _words(progress: ReconcileProgress, *, complete: bool, dry_run: bool) -> str:
    did = f"{progress.missing} would be recorded" if dry_run else f"{progress.recorded} recorded"
    said = f"{progress.found} events found at Stripe: {progress.already_here} already here, {did}"
    if progress.refused_events:
        said += f", {progress.refused_events} refused"
    return said if complete else f"{said}; not finished: run it again, nothing is recorded twice"


def _fields(progress: ReconcileProgress, *, complete: bool, dry_run: bool) -> dict[str, Any]:
    return {
        "found": progress.found,
        "already_here": progress.already_here,
        "recorded": progress.recorded,
        "missing": progress.missing - progress.recorded,  # a dry run leaves it so
        "refused": progress.refused_events,
        "refusals": [{"event_id": event_id, "reason": reason} for event_id, reason in progress.refused],
        "dry_run": dry_run,
        "complete": complete,
    }


def _refusals(progress: ReconcileProgress) -> list[str]:
    lines = [
        f"{event_id} is not recorded, it would be refused as a delivery too: {why}"
        for event_id, why in progress.refused
    ]
    more = progress.refused_events - len(lines)
    return [*lines, f"and {more} more"] if more else lines
