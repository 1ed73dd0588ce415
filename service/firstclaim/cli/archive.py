"""`firstclaim archive`: what `events prune --archive` has stored, read back; decides nothing.

Exit codes: 0 success · 1 the archive, or the ledger, does not have the event · 2 the command line or the address is
wrong · 3 the archive or Postgres is unreachable.
"""

from __future__ import annotations

import sys
from datetime import UTC, date, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from firstclaim.cli.environment import database, operator, read_settings, run_on_ledger
from firstclaim.cli.options import ArchiveUrl, Id
from firstclaim.cli.terminal import fail, print_text, reported
from firstclaim.errors import ConfigurationError

if TYPE_CHECKING:
    from firstclaim.operations.archive import ArchivedEvent
    from firstclaim.operations.commands import Commands
    from firstclaim.settings import Settings

app = typer.Typer(no_args_is_help=True, help="Read archived payloads back.")

_NEEDS_DAY = "the ledger has no event {!r} any more: name the day on which it was received, --received 2026-08-27"


def _day(text: str) -> date:
    """The day. Raises a usage error, in words of ours: typer's begin with "Value error,"."""
    try:
        return datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC).date()
    except ValueError:
        raise typer.BadParameter(f"expected a day, such as 2026-08-27, not {text!r:.80}") from None


Received = Annotated[
    date | None,
    typer.Option(
        "--received",
        parser=_day,
        metavar="DAY",
        help="The day, in UTC, on which the event was received: for one that the ledger does not have any more.",
    ),
]


@app.command()
def get(event_id: Id, received: Received = None, archive: ArchiveUrl = None) -> None:
    """Print the signed body of an event, byte for byte. It may hold personal data.

    The time at which the event was received leads to its file. The ledger knows it while it has the event's row.
    """
    with reported():
        url = _url(archive)
        if received is None:
            with database() as settings:
                found = _find(url, event_id, _received_at(settings, event_id))
        else:
            found = _find(url, event_id, received)
    sys.stdout.buffer.write(found.body)
    sys.stdout.buffer.flush()


@app.command()
def restore(event_id: Id, archive: ArchiveUrl = None) -> None:
    """Put the payload of an event back into the ledger, so that it can be replayed. `events replay` does that."""

    async def put_back(commands: Commands) -> bool:
        return await commands.restore_payload(
            operator(), event_id, found.body, traceparent=found.traceparent, headers=found.headers
        )

    with reported():
        url = _url(archive)
        with database() as settings:
            found = _find(url, event_id, _received_at(settings, event_id))
            if not run_on_ledger(settings, put_back):
                fail(f"the ledger has the payload of {event_id}: nothing was changed", 1)
    print_text(f"the ledger has the payload of {event_id} again: firstclaim events replay {event_id}")


def _url(archive: str | None) -> str:
    """The archive's address, from `--archive` or the settings. Raises `ConfigurationError` if there is none."""
    settings = read_settings(receiving=False, flags={} if archive is None else {"archive_url": archive})
    if settings.archive_url is None:
        raise ConfigurationError(["no archive: set FIRSTCLAIM_ARCHIVE_URL, or name it with --archive"])
    return settings.archive_url


def _received_at(settings: Settings, event_id: str) -> datetime:
    event = run_on_ledger(settings, lambda commands: commands.find(event_id))
    if event is None:
        fail(_NEEDS_DAY.format(event_id), 1)
    return event.received_at


def _find(url: str, event_id: str, received_at: datetime | date) -> ArchivedEvent:
    import asyncio

    from firstclaim.operations import archive
    from firstclaim.operations.archive_storage import open_storage

    found = asyncio.run(archive.find(open_storage(url), event_id, received_at))
    if found is None:
        day = received_at.strftime("%Y-%m-%d")
        fail(f"{url} has no event {event_id!r} that was received on {day}", 1)
    return found
