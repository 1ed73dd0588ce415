"""What an operator reads from the ledger.

Guarantees: nothing here changes a row or waits for a lock, and no statement runs for longer than a minute.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from firstclaim.postgres.connection import PinnedConnection
from firstclaim.postgres.statement import Statement, statement
from firstclaim.status import Status

_STATEMENT_SECONDS = 60.0  # enough to count millions of rows

# The conditions of a `Selection`, on `stripe_events e`. The clock is read in a subquery, because a volatile function by
# itself cannot be an index condition.
SELECTED = """
      (CAST(:event_ids AS text[]) IS NULL OR e.event_id = ANY(CAST(:event_ids AS text[])))
  AND (CAST(:statuses AS text[]) IS NULL OR e.status = ANY(CAST(:statuses AS text[])))
  AND (CAST(:type AS text) IS NULL OR e.type LIKE CAST(:type AS text))
  AND (CAST(:account AS text) IS NULL OR e.account = CAST(:account AS text))
  AND (CAST(:older AS float8) IS NULL
       OR e.received_at <= (SELECT clock_timestamp()) - make_interval(secs => CAST(:older AS float8)))
  AND (CAST(:newer AS float8) IS NULL
       OR e.received_at > (SELECT clock_timestamp()) - make_interval(secs => CAST(:newer AS float8)))
"""

COLUMNS = """event_id, type, account, livemode, object_id, api_version, status, attempt, failures, abandoned, action,
       last_error, created_at, received_at, due_at, give_up_at, settled_at, claimed_at, claimed_by"""

_LIST = statement(
    f"SELECT {COLUMNS} FROM firstclaim.stripe_events e WHERE {SELECTED} ORDER BY received_at DESC LIMIT :limit"
)
_COUNT = statement(
    f"SELECT status, count(*) AS events FROM firstclaim.stripe_events e WHERE {SELECTED} GROUP BY status"
)
# Each half reads a partial index: `stripe_events_due`, and `stripe_events_unsuccessful`.
_COUNT_OPEN = statement("""
SELECT status, count(*) AS events FROM firstclaim.stripe_events
 WHERE status IN ('pending', 'processing', 'failed') GROUP BY status
UNION ALL
SELECT status, count(*) FROM firstclaim.stripe_events WHERE status = 'dead' GROUP BY status
""")
_PAYLOAD = statement("SELECT body FROM firstclaim.stripe_event_payloads WHERE event_id = :event_id")
_ATTEMPTS = statement("""
SELECT attempt, outcome, process, began_at, ended_at, error FROM firstclaim.stripe_event_attempts
 WHERE event_id = :event_id ORDER BY ended_at
""")
_ACTIONS_ON = statement("""
SELECT at, operator, action, selection FROM firstclaim.operator_actions
 WHERE position(:event_id IN selection) > 0 ORDER BY at
""")
_BACKLOG = statement("""
SELECT count(*) FILTER (WHERE status IN ('pending', 'failed') AND due_at <= now) AS due,
       CAST(max(extract(epoch FROM now - due_at)) FILTER (WHERE status IN ('pending', 'failed') AND due_at <= now)
            AS float8) AS oldest_due_seconds,
       count(*) FILTER (WHERE status = 'processing' AND due_at <= now) AS past_their_lease,
       count(*) FILTER (WHERE abandoned > 0) AS abandoned_before
  FROM firstclaim.stripe_events, clock_timestamp() AS now
 WHERE status IN ('pending', 'processing', 'failed')
""")


@dataclass(frozen=True, slots=True)
class Selection:
    """Selects events: every given condition must hold. `type` may be `prefix.*`; ages count from `received_at`."""

    event_ids: Sequence[str] | None = None
    statuses: Sequence[Status] | None = None
    type: str | None = None
    account: str | None = None
    older_than_seconds: float | None = None
    newer_than_seconds: float | None = None

    @property
    def is_empty(self) -> bool:
        """Whether it selects all events."""
        return self == Selection()

    def __str__(self) -> str:
        """As options of the command line, for the audit."""
        given = {
            "status": None if self.statuses is None else ",".join(self.statuses),
            "type": self.type,
            "account": self.account,
            "older-than": None if self.older_than_seconds is None else f"{self.older_than_seconds:.0f}s",
            "newer-than": None if self.newer_than_seconds is None else f"{self.newer_than_seconds:.0f}s",
        }
        words = [f"{name}={value}" for name, value in given.items() if value is not None]
        return " ".join((*(self.event_ids or ()), *words)) or "all"

    def parameters(self) -> dict[str, Any]:
        """The parameters of a statement with `SELECTED`."""
        pattern = None if self.type is None else self.type.replace("\\", "\\\\").replace("_", "\\_").replace("%", "\\%")
        if pattern is not None and pattern.endswith(".*"):
            pattern = pattern[:-1] + "%"
        return {
            "event_ids": self.event_ids,
            "statuses": self.statuses,
            "type": pattern,
            "account": self.account,
            "older": self.older_than_seconds,
            "newer": self.newer_than_seconds,
        }


@dataclass(frozen=True, slots=True)
class EventRow:
    """An event as the ledger stores it."""

    event_id: str
    type: str
    account: str | None
    livemode: bool
    object_id: str | None
    api_version: str | None
    status: Status
    attempt: int
    failures: int
    abandoned: int
    action: str | None
    last_error: str | None
    created_at: datetime
    received_at: datetime
    due_at: datetime
    give_up_at: datetime
    settled_at: datetime | None
    claimed_at: datetime | None
    claimed_by: str | None


@dataclass(frozen=True, slots=True)
class AttemptRow:
    """An attempt that did not succeed: `failed`, `dead` (its failure was final) or `abandoned`.

    `began_at` is when it was claimed, and `process` (`host:pid`) what claimed it; None if an older build did not record
    it. `frames` are lines (`firstclaim.observability.frames`): where the error was raised, and its causes.
    """

    attempt: int
    outcome: str
    process: str | None
    began_at: datetime | None
    ended_at: datetime
    error: str
    frames: list[str]


@dataclass(frozen=True, slots=True)
class TimelineEntry:
    """What happened to an event. `kind`: `received`, a status, `claimed`, an attempt's outcome, or an action."""

    at: datetime
    kind: str
    text: str
    frames: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Backlog:
    """The unfinished events. `oldest_due_seconds` is None if no event is due."""

    due: int
    oldest_due_seconds: float | None
    past_their_lease: int
    abandoned_before: int


class Queries:
    """Queries on one connection."""

    def __init__(self, connection: PinnedConnection) -> None:
        self._connection = connection

    async def list_events(self, selection: Selection, limit: int) -> list[EventRow]:
        """The selected events, the newest first, at most `limit`."""
        rows = await self._fetch(_LIST, **selection.parameters(), limit=limit)
        return [event_row(row) for row in rows]

    async def count(self, selection: Selection) -> dict[Status, int]:
        """The number of selected events in each status that has any."""
        rows = await self._fetch(_COUNT, **selection.parameters())
        return {Status(row["status"]): row["events"] for row in rows}

    async def count_open(self) -> dict[Status, int]:
        """The number of unfinished and dead events in each status that has any. Fast in a ledger of any size."""
        return {Status(row["status"]): row["events"] for row in await self._fetch(_COUNT_OPEN)}

    async def find(self, event_id: str) -> EventRow | None:
        """The event, or None if the ledger does not have it."""
        return next(iter(await self.list_events(Selection([event_id]), 1)), None)

    async def payload(self, event_id: str) -> bytes | None:
        """The bytes that were signed, or None if they have been pruned."""
        rows = await self._fetch(_PAYLOAD, event_id=event_id)
        return rows[0]["body"] if rows else None

    async def attempts(self, event_id: str) -> list[AttemptRow]:
        """The attempts that did not succeed, the oldest first."""
        return [_attempt_row(**row) for row in await self._fetch(_ATTEMPTS, event_id=event_id)]

    async def actions_on(self, event_id: str) -> list[dict[str, Any]]:
        """The actions of operators that named the event's id, the oldest first: `at`, `operator`, `action`."""
        rows = await self._fetch(_ACTIONS_ON, event_id=event_id)
        return [dict(row) for row in rows if event_id in row["selection"].split(" ")]

    async def timeline(self, event: EventRow) -> list[TimelineEntry]:
        """What happened to the event and when, the oldest first: the function `timeline` on what the ledger has."""
        return timeline(event, await self.attempts(event.event_id), await self.actions_on(event.event_id))

    async def backlog(self) -> Backlog:
        """The unfinished events, by an index. Fast in a ledger of any size."""
        [row] = await self._fetch(_BACKLOG)
        return Backlog(**row)

    async def _fetch(self, query: Statement, **values: object) -> list[Any]:
        async with asyncio.timeout(_STATEMENT_SECONDS):
            return await query.fetch(self._connection, **values)


def event_row(row: Mapping[str, Any]) -> EventRow:
    """The event in a row of `COLUMNS`."""
    return EventRow(**{**row, "status": Status(row["status"])})


def _attempt_row(error: str, **columns: Any) -> AttemptRow:
    first, *frames = error.split("\n")
    return AttemptRow(**columns, error=first, frames=frames)


def timeline(
    event: EventRow, attempts: Sequence[AttemptRow], actions: Sequence[Mapping[str, Any]]
) -> list[TimelineEntry]:
    """What happened to the event and when, as far as the ledger keeps it.

    Of an attempt that succeeds, the ledger keeps the claim and the end.
    """
    entries = [TimelineEntry(event.received_at, "received", "received")]
    for each in attempts:
        lasted = "" if each.began_at is None else f" after {(each.ended_at - each.began_at).total_seconds():.2f} s"
        process = "" if each.process is None else f" on {each.process}"
        text = f"attempt {each.attempt}{process}: {each.outcome}{lasted}: {each.error}"
        entries.append(TimelineEntry(each.ended_at, each.outcome, text, each.frames))
    entries += [
        TimelineEntry(each["at"], each["action"], f"{each['action']} by {each['operator']}") for each in actions
    ]
    if event.status in (Status.PROCESSING, Status.COMPLETED) and event.claimed_at is not None:
        entries.append(
            TimelineEntry(event.claimed_at, "claimed", f"attempt {event.attempt} claimed by {event.claimed_by}")
        )
    # A final failure already has an entry: its attempt.
    if event.settled_at is not None and not any((e.attempt, e.outcome) == (event.attempt, "dead") for e in attempts):
        entries.append(TimelineEntry(event.settled_at, event.status, event.status))
    return sorted(entries, key=lambda each: each.at)
