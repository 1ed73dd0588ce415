"""Pruning: payloads of old events are deleted, later the rows themselves; with an archive, payloads are stored before.

Guarantees: an unfinished event is never pruned. A row is kept for at least 35 days, because until then only the row
detects a duplicate. With an archive, a payload is deleted only after the file that holds it is stored, and no row is
deleted that still has a payload. A prune that is killed has deleted nothing that is not stored, and the next one begins
again.

Old events are found by when they were received, through an index: a batch costs the same in a ledger of millions as in
a small one, and what is too young is not looked at. (By the id alone, a day's prune would look at every payload.)
Payloads from before schema 0015 have no time of their own. They are walked through by id, and so is everything where an
index is missing: a large ledger leaves it to the operator to make.

Each batch is a transaction of its own, of some milliseconds, and skips rows that are locked: no delivery waits for a
lock. Between batches the run rests, so that deliveries have the server for most of the time: `pace.py`.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import date
from typing import Any

from firstclaim.operations import archive
from firstclaim.operations.archive import ArchivedEvent, ArchiveFile
from firstclaim.operations.archive_storage import Storage
from firstclaim.operations.commands import Commands, OperatorAction
from firstclaim.operations.limits import ROW_DAYS_LEAST
from firstclaim.operations.pace import Pace
from firstclaim.operations.selection import IN_GROUP
from firstclaim.postgres.statement import Statement, statement
from firstclaim.status import Status

BATCH = 100  # events in one statement
_BODIES = 100  # that are read at once: a body has up to a megabyte
_OPEN_FILES_MOST = 50  # days; by the index they come one after the other, from before schema 0015 in any order

PAYLOADS_INDEX = "stripe_event_payloads_received"
_ROWS_INDEX = "stripe_events_received"
_HAS_INDEX = statement("""
SELECT EXISTS (SELECT FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
                WHERE i.indrelid IN (CAST('firstclaim.stripe_events' AS regclass),
                                     CAST('firstclaim.stripe_event_payloads' AS regclass))
                  AND c.relname = :name AND i.indisvalid) AS found
""")

# The next events to look at, in the order of an index, whether they can be pruned or not. The clock is read in a
# subquery, because a volatile function by itself cannot be an index condition.
_CUTOFF = "(SELECT clock_timestamp()) - make_interval(days => :days)"
_NEXT = {
    "old": f"""
    SELECT event_id, received_at FROM firstclaim.{{table}}
     WHERE (received_at, event_id) > (coalesce(CAST(:after_at AS timestamptz), '-infinity'), CAST(:after AS text))
       AND received_at < {_CUTOFF}
     ORDER BY received_at, event_id LIMIT :limit""",
    "undated": """
    SELECT event_id, received_at FROM firstclaim.{table}
     WHERE received_at IS NULL AND event_id > :after
     ORDER BY event_id LIMIT :limit""",
    "all": """
    SELECT event_id, received_at FROM firstclaim.{table}
     WHERE event_id > :after
     ORDER BY event_id LIMIT :limit""",
}
# Of these, what is old enough since it was settled.
_PRUNABLE = f"""e.status = ANY(:statuses) AND e.settled_at < {_CUTOFF} AND {IN_GROUP}"""
# A follow-up is kept as long as the row that wrote it: a replay of that one would write it again, and run it again.
_WITHOUT_PARENT = """(e.parent_id IS NULL OR NOT EXISTS (
           SELECT FROM firstclaim.stripe_events parent WHERE parent.event_id = e.parent_id))"""

# The event's row is locked first, because an event that is being replayed needs its payload.
_DELETE_PAYLOADS = f"""
old AS MATERIALIZED (
    SELECT e.event_id FROM firstclaim.stripe_events e JOIN looked USING (event_id)
     WHERE {_PRUNABLE}
       FOR UPDATE OF e SKIP LOCKED
), gone AS (
    DELETE FROM firstclaim.stripe_event_payloads p USING old WHERE p.event_id = old.event_id RETURNING p.event_id
)"""
# A follow-up was received after the row that wrote it. So by then that row is deleted, or it is looked at in the same
# statement, which does not see what it deletes itself: hence `doomed`. A row that is locked keeps what it has written.
# What was received before its parent, because a clock went back, waits for the next run; so it may in the order `all`.
_DELETE_ROWS = f"""
old AS MATERIALIZED (
    SELECT e.event_id, e.parent_id FROM firstclaim.stripe_events e JOIN looked USING (event_id)
     WHERE {_PRUNABLE}
       AND NOT (:keep_payloads AND EXISTS (
               SELECT FROM firstclaim.stripe_event_payloads p WHERE p.event_id = e.event_id))
       FOR UPDATE OF e SKIP LOCKED
), doomed AS (
    SELECT event_id FROM old e WHERE {_WITHOUT_PARENT}
    UNION ALL
    SELECT old.event_id FROM doomed JOIN old ON old.parent_id = doomed.event_id
), payloads AS (
    DELETE FROM firstclaim.stripe_event_payloads p USING doomed WHERE p.event_id = doomed.event_id
), attempts AS (
    DELETE FROM firstclaim.stripe_event_attempts a USING doomed WHERE a.event_id = doomed.event_id
), duplicates AS (
    DELETE FROM firstclaim.stripe_event_duplicates d USING doomed WHERE d.event_id = doomed.event_id
), gone AS (
    DELETE FROM firstclaim.stripe_events e USING doomed WHERE e.event_id = doomed.event_id RETURNING e.event_id
)"""
_CANDIDATES = f"""
gone AS (SELECT e.event_id FROM firstclaim.stripe_events e JOIN looked USING (event_id) WHERE {_PRUNABLE})"""


def _over(table: str, then: str) -> dict[str, Statement]:
    """Look at the next events, and then: the last that was looked at, and the ids in `gone`."""
    return {
        order: statement(f"""
WITH RECURSIVE looked AS MATERIALIZED ({look.format(table=table)}
), {then}
SELECT event_id AS after, received_at AS after_at, (SELECT array_agg(event_id) FROM gone) AS ids
  FROM looked ORDER BY {"received_at DESC, " if order == "old" else ""}event_id DESC LIMIT 1
""")
        for order, look in _NEXT.items()
    }


_PRUNE_PAYLOADS = _over("stripe_event_payloads", _DELETE_PAYLOADS)
_PRUNE_ROWS = _over("stripe_events", _DELETE_ROWS)
_TO_ARCHIVE = _over("stripe_event_payloads", _CANDIDATES)
_READ = statement("""
SELECT e.event_id AS id, type, account, livemode, endpoint, status, e.received_at, settled_at, traceparent, headers,
       body
  FROM firstclaim.stripe_events e JOIN firstclaim.stripe_event_payloads p USING (event_id)
 WHERE e.event_id = ANY(:event_ids) AND settled_at IS NOT NULL ORDER BY e.received_at, e.event_id
""")
# The payloads of these events, which are stored: unless one has been replayed since.
_PRUNE_STORED = statement(f"""
WITH looked AS (
    SELECT unnest(CAST(:event_ids AS text[])) AS event_id
), {_DELETE_PAYLOADS}
SELECT event_id FROM gone
""")
_COUNT = {
    "payloads": statement(f"""
SELECT count(*) AS events FROM firstclaim.stripe_event_payloads p JOIN firstclaim.stripe_events e USING (event_id)
 WHERE (p.received_at < {_CUTOFF} OR p.received_at IS NULL) AND {_PRUNABLE}
"""),
    "rows": statement(f"""
WITH RECURSIVE follow_ups AS (
    SELECT event_id FROM firstclaim.stripe_events e
     WHERE e.parent_id IS NOT NULL AND {_PRUNABLE} AND e.parent_id IN (
           SELECT e.event_id FROM firstclaim.stripe_events e WHERE {_PRUNABLE} AND {_WITHOUT_PARENT})
    UNION ALL
    SELECT e.event_id FROM follow_ups JOIN firstclaim.stripe_events e ON e.parent_id = follow_ups.event_id
     WHERE {_PRUNABLE}
)
SELECT count(*) + (SELECT count(*) FROM follow_ups) AS events FROM firstclaim.stripe_events e
 WHERE e.received_at < {_CUTOFF} AND {_PRUNABLE} AND {_WITHOUT_PARENT}
"""),
}


@dataclass(frozen=True, slots=True)
class Retention:
    """What is pruned: payloads and rows of events that were settled at least so many days ago.

    `include_dead`: dead events too. `group`: only of events in this group of failures.
    """

    payload_days: int
    row_days: int
    include_dead: bool = False
    group: str | None = None

    def __post_init__(self) -> None:
        if self.row_days < ROW_DAYS_LEAST:
            raise ValueError(f"rows are kept for at least {ROW_DAYS_LEAST} days: until then they detect duplicates")

    def __str__(self) -> str:
        """For the audit."""
        group = "" if self.group is None else f" group={self.group}"
        return f"payloads={self.payload_days}d rows={self.row_days}d" + (" dead" if self.include_dead else "") + group

    def parameters(self, days: int) -> dict[str, Any]:
        """The parameters of a statement on what was settled at least `days` ago."""
        statuses = [Status.COMPLETED, Status.IGNORED, *([Status.DEAD] if self.include_dead else [])]
        return {"days": days, "statuses": statuses, "group": self.group}


@dataclass(frozen=True, slots=True)
class Pruned:
    """What one batch has deleted. `archived`: the payloads in the file that was stored before."""

    payloads: int = 0
    rows: int = 0
    archived: int = 0

    def __add__(self, other: "Pruned") -> "Pruned":
        return Pruned(self.payloads + other.payloads, self.rows + other.rows, self.archived + other.archived)


async def count_prunable(commands: Commands, retention: Retention) -> tuple[int, int]:
    """The number of payloads and the number of rows that `prune` would delete."""
    days = {"payloads": retention.payload_days, "rows": retention.row_days}
    counts = [await commands.fetch(_COUNT[name], **retention.parameters(days[name])) for name in ("payloads", "rows")]
    return counts[0][0]["events"], counts[1][0]["events"]


async def prune(
    commands: Commands,
    operator: str,
    retention: Retention,
    storage: Storage | None = None,
    *,
    busy_percent: float = 100,
) -> AsyncIterator[Pruned]:
    """Delete old rows with their payloads, then old payloads; yields what each batch has deleted.

    With `storage`, payloads are stored there and deleted, then old rows are deleted. Raises `ArchiveUnavailable`.
    `busy_percent`: at most this share of the time is spent in statements.
    """
    archived = "" if storage is None else " archived"
    action = OperatorAction(operator, "prune", f"{retention}{archived}")
    run = _Prune(commands, retention, Pace(busy_percent))
    steps = [run.rows(), run.payloads()] if storage is None else [run.stored_payloads(storage), run.rows(kept=True)]
    async with commands.audited(action):
        for step in steps:
            async for batch in step:
                action.changed += batch.rows + batch.payloads
                yield batch


class _Prune:
    """One run."""

    def __init__(self, commands: Commands, retention: Retention, pace: Pace) -> None:
        self._commands = commands
        self._retention = retention
        self._pace = pace

    async def rows(self, *, kept: bool = False) -> AsyncIterator[Pruned]:
        """Delete rows, with their payloads, each with its follow-ups. `kept`: only rows that have no payload."""
        async for ids in self._walk(_PRUNE_ROWS, _ROWS_INDEX, self._retention.row_days, keep_payloads=kept):
            yield Pruned(rows=len(ids))

    async def payloads(self) -> AsyncIterator[Pruned]:
        """Delete payloads."""
        async for ids in self._walk(_PRUNE_PAYLOADS, PAYLOADS_INDEX, self._retention.payload_days):
            yield Pruned(payloads=len(ids))

    async def stored_payloads(self, storage: Storage) -> AsyncIterator[Pruned]:
        """Store payloads, also of rows that are deleted soon, and delete them."""
        days = min(self._retention.payload_days, self._retention.row_days)
        files: dict[date, ArchiveFile] = {}
        async for ids in self._walk(_TO_ARCHIVE, PAYLOADS_INDEX, days):
            async for event in self._events(ids):
                day = archive.day_of(event)
                file = files.setdefault(day, ArchiveFile())
                file.add(event)
                if file.is_full:
                    yield await self._store_and_delete(storage, files.pop(day), days)
            while len(files) > _OPEN_FILES_MOST:
                largest = max(files, key=lambda day: len(files[day].ids))
                yield await self._store_and_delete(storage, files.pop(largest), days)
        for file in files.values():
            yield await self._store_and_delete(storage, file, days)

    async def _events(self, ids: list[str]) -> AsyncIterator[ArchivedEvent]:
        for first in range(0, len(ids), _BODIES):
            for row in await self._fetch(_READ, event_ids=ids[first : first + _BODIES]):
                yield ArchivedEvent(**row)

    async def _store_and_delete(self, storage: Storage, file: ArchiveFile, days: int) -> Pruned:
        """The only place that deletes what has been archived: after its file is stored."""
        await archive.store(storage, file)
        deleted = 0
        for first in range(0, len(file.ids), BATCH):
            batch = file.ids[first : first + BATCH]
            deleted += len(await self._fetch(_PRUNE_STORED, event_ids=batch, **self._retention.parameters(days)))
        return Pruned(payloads=deleted, archived=len(file.ids))

    async def _walk(
        self, statements: dict[str, Statement], index: str, days: int, **values: object
    ) -> AsyncIterator[list[str]]:
        """Look at all events that can be old enough; yields the ids that each statement has deleted or found."""
        [indexed] = await self._fetch(_HAS_INDEX, name=index)
        for order in ("old", "undated") if indexed["found"] else ("all",):
            place: dict[str, Any] = {"after": "", "after_at": None}
            while True:
                rows = await self._fetch(
                    statements[order], **place, **self._retention.parameters(days), limit=BATCH, **values
                )
                if not rows:
                    break
                [row] = rows
                place = {"after": row["after"], "after_at": row["after_at"]}
                if row["ids"]:
                    yield row["ids"]

    async def _fetch(self, sql: Statement, **values: object) -> list[Any]:
        async with self._pace.statement():
            return await self._commands.fetch(sql, **values)
