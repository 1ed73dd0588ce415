"""What an operator reads from the ledger.

Guarantees: nothing here changes a row or waits for a lock, and no statement runs for longer than a minute.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from firstclaim.operations.deliveries import DELIVERIES, Deliveries, deliveries_of
from firstclaim.operations.failure_groups import GROUPS, UNGROUPED, FailureGroup, Ungrouped
from firstclaim.operations.selection import SELECTED, Selection
from firstclaim.postgres.connection import PinnedConnection
from firstclaim.postgres.statement import Statement, statement
from firstclaim.status import Status

STATEMENT_SECONDS = 60.0  # enough to count millions of rows

# Whether the handler of an attempt, `stripe_event_attempts a`, asked for a retry: it has a handler, and no group of
# failures. (An attempt that no handler ended, or that a build from before schema 0008 recorded, has neither.)
REQUESTED = "(a.outcome = 'failed' AND a.failure_group IS NULL AND a.handler IS NOT NULL)"

COLUMNS = """event_id, type, account, livemode, object_id, api_version, status, attempt, failures, abandoned, action,
       last_error, created_at, received_at, due_at, give_up_at, settled_at, claimed_at, claimed_by, endpoint,
       parent_id"""

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
_FOLLOW_UPS = statement(f"""
SELECT {COLUMNS} FROM firstclaim.stripe_events e WHERE parent_id = :event_id ORDER BY received_at, event_id LIMIT :limit
""")
FOLLOW_UPS_SHOWN: Final = 100
_PAYLOAD = statement("SELECT body FROM firstclaim.stripe_event_payloads WHERE event_id = :event_id")
_ATTEMPTS = statement(f"""
SELECT attempt, outcome, process, began_at, ended_at, error, {REQUESTED} AS requested
  FROM firstclaim.stripe_event_attempts a
 WHERE event_id = :event_id ORDER BY ended_at
""")
_ACTIONS_ON = statement("""
SELECT at, operator, action, selection FROM firstclaim.operator_actions
 WHERE position(:event_id IN selection) > 0 AND :event_id = ANY(string_to_array(selection, ' ')) ORDER BY at
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


def _oldest_of_each_type(name: str, condition: str) -> str:
    """The oldest waiting event of each type and mode: one descent of recovery's index for each."""
    waiting = f"status IN ('pending', 'failed') AND {condition}"
    return f"""{name} AS (
    (SELECT type, livemode, due_at FROM firstclaim.stripe_events
      WHERE {waiting} ORDER BY type, livemode, due_at LIMIT 1)
    UNION ALL
    SELECT following.* FROM {name}, LATERAL (
        SELECT type, livemode, due_at FROM firstclaim.stripe_events
         WHERE {waiting} AND (type, livemode) > ({name}.type, {name}.livemode)
         ORDER BY type, livemode, due_at LIMIT 1) AS following
)"""


# Recovery's indexes have the events that were abandoned before apart from the others.
_OLDEST_DUE = statement(f"""
WITH RECURSIVE {_oldest_of_each_type("fresh", "abandoned = 0")},
     {_oldest_of_each_type("abandoned_before", "abandoned > 0")}
SELECT type, livemode, CAST(max(extract(epoch FROM now - due_at)) AS float8) AS seconds
  FROM (TABLE fresh UNION ALL TABLE abandoned_before) AS waiting, clock_timestamp() AS now
 WHERE due_at <= now GROUP BY type, livemode
""")
# Of the newest events, by an index. The open gap since the last one is not among those that say what is usual.
# Follow-ups say nothing about deliveries.
_GAPS = statement("""
WITH newest AS (
    SELECT received_at FROM firstclaim.stripe_events WHERE parent_id IS NULL ORDER BY received_at DESC LIMIT :events
), gaps AS (
    SELECT received_at, extract(epoch FROM received_at - lag(received_at) OVER (ORDER BY received_at)) AS gap
      FROM newest
)
SELECT CAST(extract(epoch FROM clock_timestamp() - max(received_at)) AS float8) AS open_seconds,
       CASE WHEN count(gap) >= :fewest
            THEN percentile_cont(0.99) WITHIN GROUP (ORDER BY CAST(gap AS float8)) END AS usual_seconds
  FROM gaps
""")
GAPS_OF_EVENTS: Final = 1000
_FEWEST_GAPS: Final = 100  # fewer say nothing about what only one in a hundred exceeds


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
    endpoint: str | None = None
    parent_id: str | None = None


@dataclass(frozen=True, slots=True)
class AttemptRow:
    """An attempt that did not succeed: `failed`, `dead` (its failure was final) or `abandoned`.

    `began_at` is when it was claimed, and `process` (`host:pid`) what claimed it; None if an older build did not record
    it. `frames` are lines (`firstclaim.observability.frames`): where the error was raised, and its causes. `requested`:
    the handler asked for a retry, which is no failure.
    """

    attempt: int
    outcome: str
    process: str | None
    began_at: datetime | None
    ended_at: datetime
    error: str
    frames: list[str]
    requested: bool = False


@dataclass(frozen=True, slots=True)
class TimelineEntry:
    """What happened to an event. `kind`: `received`, a status, `claimed`, an attempt's outcome, or an action.

    Of an attempt that asked for a retry, it is `retry`.
    """

    at: datetime
    kind: str
    text: str
    frames: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class History:
    """What the ledger has about an event beside its row: `attempts` are those that did not succeed."""

    deliveries: Deliveries
    follow_ups: list[EventRow]
    attempts: list[AttemptRow]
    actions: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Backlog:
    """The unfinished events. `oldest_due_seconds` is None if no event is due."""

    due: int
    oldest_due_seconds: float | None
    past_their_lease: int
    abandoned_before: int


@dataclass(frozen=True, slots=True)
class Gaps:
    """Seconds between new events.

    `open_seconds`: since the last one; None if there is none. `usual_seconds`: one in a hundred of the gaps between the
    newest events is longer; None if there are too few.
    """

    open_seconds: float | None
    usual_seconds: float | None


class Queries:
    """Queries on one connection."""

    def __init__(self, connection: PinnedConnection) -> None:
        self._connection = connection

    async def list_events(self, selection: Selection, limit: int) -> list[EventRow]:
        """The selected events, the newest first, at most `limit`."""
        rows = await self.fetch(_LIST, **selection.parameters(), limit=limit)
        return [event_row(row) for row in rows]

    async def count(self, selection: Selection) -> dict[Status, int]:
        """The number of selected events in each status that has any."""
        rows = await self.fetch(_COUNT, **selection.parameters())
        return {Status(row["status"]): row["events"] for row in rows}

    async def count_open(self) -> dict[Status, int]:
        """The number of unfinished and dead events in each status that has any. Fast in a ledger of any size."""
        return {Status(row["status"]): row["events"] for row in await self.fetch(_COUNT_OPEN)}

    async def find(self, event_id: str) -> EventRow | None:
        """The event, or None if the ledger does not have it."""
        return next(iter(await self.list_events(Selection([event_id]), 1)), None)

    async def follow_ups(self, event_id: str, limit: int = FOLLOW_UPS_SHOWN) -> list[EventRow]:
        """The rows that the handler of this one has written, the oldest first, at most `limit`."""
        return [event_row(row) for row in await self.fetch(_FOLLOW_UPS, event_id=event_id, limit=limit)]

    async def payload(self, event_id: str) -> bytes | None:
        """The bytes that were signed, or None if they have been pruned."""
        rows = await self.fetch(_PAYLOAD, event_id=event_id)
        return rows[0]["body"] if rows else None

    async def deliveries(self, event_id: str) -> Deliveries:
        """The deliveries of the event."""
        [row] = await self.fetch(DELIVERIES, event_id=event_id)
        return deliveries_of(row)

    async def attempts(self, event_id: str) -> list[AttemptRow]:
        """The attempts that did not succeed, the oldest first."""
        return [_attempt_row(**row) for row in await self.fetch(_ATTEMPTS, event_id=event_id)]

    async def actions_on(self, event_id: str) -> list[dict[str, Any]]:
        """The actions of operators that named the event's id, the oldest first: `at`, `operator`, `action`."""
        return [dict(row) for row in await self.fetch(_ACTIONS_ON, event_id=event_id)]

    async def history(self, event_id: str) -> History:
        """All of it."""
        return History(
            await self.deliveries(event_id),
            await self.follow_ups(event_id),
            await self.attempts(event_id),
            await self.actions_on(event_id),
        )

    async def timeline(self, event: EventRow) -> list[TimelineEntry]:
        """What happened to the event and when, the oldest first: the function `timeline` on what the ledger has."""
        return timeline(event, await self.attempts(event.event_id), await self.actions_on(event.event_id))

    async def failure_groups(self, limit: int, *, newer_than_seconds: float | None = None) -> list[FailureGroup]:
        """The groups of failures, what failed last first; only those that failed within that time."""
        rows = await self.fetch(GROUPS, limit=limit, newer=newer_than_seconds)
        return [FailureGroup(**row) for row in rows]

    async def ungrouped(self) -> Ungrouped:
        """How many failed and dead events are in no group of failures."""
        [row] = await self.fetch(UNGROUPED)
        return Ungrouped(**row)

    async def backlog(self) -> Backlog:
        """The unfinished events, by an index. Fast in a ledger of any size."""
        [row] = await self.fetch(_BACKLOG)
        return Backlog(**row)

    async def oldest_due(self) -> dict[tuple[str, bool], float]:
        """For how many seconds the oldest due event of each type and mode has been due, if it has one.

        Fast in a ledger of any size.
        """
        return {(row["type"], row["livemode"]): row["seconds"] for row in await self.fetch(_OLDEST_DUE)}

    async def gaps(self) -> Gaps:
        """The gaps between new events, duplicates left out. Fast in a ledger of any size."""
        [row] = await self.fetch(_GAPS, events=GAPS_OF_EVENTS, fewest=_FEWEST_GAPS)
        return Gaps(**row)

    @property
    def schema(self) -> str:
        """The schema of the ledger."""
        return self._connection.schema

    async def fetch(self, query: Statement, **values: object) -> list[Any]:
        """The rows of a statement of ours, which may take a minute at most."""
        async with asyncio.timeout(STATEMENT_SECONDS):
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
    received = "received" if event.parent_id is None else f"enqueued by {event.parent_id}"
    entries = [TimelineEntry(event.received_at, "received", received)]
    for each in attempts:
        lasted = "" if each.began_at is None else f" after {(each.ended_at - each.began_at).total_seconds():.2f} s"
        process = "" if each.process is None else f" on {each.process}"
        kind, outcome = ("retry", "asked for a retry") if each.requested else (each.outcome, each.outcome)
        text = f"attempt {each.attempt}{process}: {outcome}{lasted}: {each.error}"
        entries.append(TimelineEntry(each.ended_at, kind, text, each.frames))
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
