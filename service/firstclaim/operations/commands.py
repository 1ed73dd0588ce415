"""What an operator changes in the ledger.

Guarantees: nothing here dispatches: a replay makes events due, and the running services take them up. What is being
handled right now is never changed, what is unfinished never pruned. Every change is noted in `operator_actions`
before it begins (who, what, which events) and closed with the number of events that it changed; one that was
interrupted shows by having no number. Changes come in small batches, a transaction each, and skip rows that are
locked: no delivery waits for them.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from firstclaim.errors import LedgerUnavailable, OperatorError
from firstclaim.event import Delivery
from firstclaim.inbox.ledger import NewRow, insert
from firstclaim.inbox.statements import FIND, statement
from firstclaim.migrations import schema
from firstclaim.operations.limits import ROW_DAYS_LEAST
from firstclaim.operations.queries import SELECTED, Queries, Selection
from firstclaim.postgres.connection import UNAVAILABLE, describe, open_connection, read_epoch
from firstclaim.status import Status

BATCH = 500  # events in one transaction: some ten milliseconds, so that nobody waits long for a row
_RECORD_SECONDS = 60.0  # for a batch, bodies and all, over a slow line
_PATIENCE_SECONDS = 5.0  # a delivery of the same event at the same moment commits in milliseconds
_MICROSECOND = 1e-6
REPLAYABLE = (Status.PENDING, Status.FAILED, Status.DEAD, Status.IGNORED)  # without repeating any effect

_CHOOSE = statement(f"""
SELECT event_id, status, attempt, p.event_id IS NOT NULL AS has_payload
  FROM stripe_events e LEFT JOIN stripe_event_payloads p USING (event_id)
 WHERE {SELECTED} ORDER BY due_at
""")
# Only as it was chosen: what has changed since may have had its effects. With its payload, for without one an event
# cannot be dispatched; that is locked too, or a prune that runs beside this one deletes it.
_REPLAY = statement("""
WITH chosen AS MATERIALIZED (
    SELECT e.event_id
      FROM stripe_events e
      JOIN unnest(CAST(:event_ids AS text[]), CAST(:statuses AS text[]), CAST(:attempts AS int[]))
           AS c (event_id, status, attempt) ON e.event_id = c.event_id
      JOIN stripe_event_payloads p ON p.event_id = e.event_id
     WHERE e.status = c.status AND e.attempt = c.attempt
       FOR UPDATE OF e, p SKIP LOCKED
)
UPDATE stripe_events e
   SET status = 'pending', failures = 0, abandoned = 0, settled_at = NULL, due_at = clock_timestamp(),
       give_up_at = clock_timestamp() + make_interval(secs => :give_up_in)
  FROM chosen WHERE e.event_id = chosen.event_id
RETURNING e.event_id
""")
_ROTATE = statement("UPDATE ledger_epoch SET id = gen_random_uuid(), rotated_at = clock_timestamp()")
_BEGIN_ACTION = statement("""
INSERT INTO operator_actions (at, operator, action, selection)
VALUES (clock_timestamp(), :operator, :action, :selection) RETURNING action_id
""")
_END_ACTION = statement("UPDATE operator_actions SET changed = :changed WHERE action_id = :action_id")

# Payloads of what was settled so long ago, in the order of the ids, from where the last batch ended. The event's row is
# locked first: one that is replayed meanwhile needs its payload.
_PRUNE_PAYLOADS = statement("""
WITH old AS MATERIALIZED (
    SELECT event_id FROM stripe_events JOIN stripe_event_payloads USING (event_id)
     WHERE event_id > :after AND status = ANY(:statuses)
       AND settled_at < clock_timestamp() - make_interval(days => :days)
     ORDER BY event_id LIMIT :most
       FOR UPDATE OF stripe_events SKIP LOCKED
)
DELETE FROM stripe_event_payloads p USING old WHERE p.event_id = old.event_id RETURNING p.event_id
""")
_PRUNE_ROWS = statement("""
WITH old AS MATERIALIZED (
    SELECT event_id FROM stripe_events
     WHERE event_id > :after AND status = ANY(:statuses)
       AND settled_at < clock_timestamp() - make_interval(days => :days)
     ORDER BY event_id LIMIT :most
       FOR UPDATE SKIP LOCKED
), body AS (
    DELETE FROM stripe_event_payloads p USING old WHERE p.event_id = old.event_id
), tried AS (
    DELETE FROM stripe_event_attempts a USING old WHERE a.event_id = old.event_id
)
DELETE FROM stripe_events e USING old WHERE e.event_id = old.event_id RETURNING e.event_id
""")
_COUNT_PRUNABLE = statement("""
SELECT count(*) FILTER (WHERE p.event_id IS NOT NULL
                          AND settled_at < clock_timestamp() - make_interval(days => :payload_days)) AS payloads,
       count(*) FILTER (WHERE settled_at < clock_timestamp() - make_interval(days => :row_days)) AS rows
  FROM stripe_events LEFT JOIN stripe_event_payloads p USING (event_id)
 WHERE status = ANY(:statuses)
""")


@dataclass(frozen=True, slots=True)
class ReplayCandidate:
    """An event as it was when it was chosen for a replay; what it is by then is not touched if it differs."""

    event_id: str
    status: Status
    attempt: int
    has_payload: bool


@dataclass(slots=True)
class Change:
    """One change by hand, while it goes on."""

    operator: str
    action: str
    selection: str
    changed: int = field(default=0, init=False)


class Commands(Queries):
    """What can be asked, and changed, on one connection."""

    @classmethod
    @asynccontextmanager
    async def connect(cls, dsn: str, timeout_seconds: float) -> AsyncIterator["Commands"]:
        """Connected for as long as the block runs; whatever Postgres says in it is a `LedgerUnavailable`.

        Raises `SchemaOutdated` before anything is changed.
        """
        try:
            connection = await open_connection(dsn, timeout_seconds)
            try:
                async with asyncio.timeout(timeout_seconds):
                    version = await schema.read_version(connection)
                if schema.compare(version) is schema.SchemaState.OUTDATED:
                    raise schema.outdated(version)
                yield cls(connection)
            finally:
                connection.terminate()
        except UNAVAILABLE as error:
            raise LedgerUnavailable(describe(error)) from error

    async def count_prunable(self, payload_days: int, row_days: int, *, include_dead: bool) -> tuple[int, int]:
        """How many payloads and rows `prune` would take."""
        statuses = _prunable(include_dead)
        [row] = await self._fetch(
            _COUNT_PRUNABLE, payload_days=payload_days, row_days=row_days, statuses=list(statuses)
        )
        return row["payloads"], row["rows"]

    async def recorded_ids(self, event_ids: Sequence[str]) -> set[str]:
        """Those of them that the ledger has, in whatever status."""
        return {row["event_id"] for row in await self._fetch(FIND, event_ids=list(event_ids))}

    # -- changing -------------------------------------------------------------------------------------

    async def select_candidates(self, selection: Selection) -> list[ReplayCandidate]:
        """For a replay: all that are selected, in whatever status, the longest due first."""
        rows = await self._fetch(_CHOOSE, **selection.values())
        return [ReplayCandidate(**{**row, "status": Status(row["status"])}) for row in rows]

    async def replay(
        self,
        chosen: Sequence[ReplayCandidate],
        selection: Selection,
        operator: str,
        *,
        give_up_seconds: float,
        repeat_completed: bool = False,
    ) -> AsyncIterator[list[str]]:
        """Make them due now, failures reset, attempt untouched; yields the ids of each batch that it changed.

        Not what is locked or has changed since it was chosen, not what is being handled right now, and not what has
        no payload any more. `selection` is what they were chosen by, for the audit.

        `repeat_completed`: also what is completed; its effects will happen a second time.
        """
        statuses = {*REPLAYABLE, *([Status.COMPLETED] if repeat_completed else [])}
        left = [each for each in chosen if each.status in statuses]
        change = Change(operator, "replay", str(selection))
        async with self._noted(change):
            while left:
                batch, left = left[:BATCH], left[BATCH:]
                rows = await self._fetch(
                    _REPLAY,
                    event_ids=[each.event_id for each in batch],
                    statuses=[each.status for each in batch],
                    attempts=[each.attempt for each in batch],
                    give_up_in=give_up_seconds,
                )
                change.changed += len(rows)
                yield [row["event_id"] for row in rows]

    async def prune(
        self, operator: str, payload_days: int, row_days: int, *, include_dead: bool
    ) -> AsyncIterator[tuple[int, int]]:
        """Delete old payloads, then old rows with theirs; yields (payloads, rows) deleted, batch by batch."""
        if row_days < ROW_DAYS_LEAST:
            raise ValueError(f"rows are kept for at least {ROW_DAYS_LEAST} days: until then they tell duplicates")
        days = f"payloads={payload_days}d rows={row_days}d" + (" dead" if include_dead else "")
        change = Change(operator, "prune", days)
        async with self._noted(change):
            for prune, kept_days, is_row in ((_PRUNE_ROWS, row_days, 1), (_PRUNE_PAYLOADS, payload_days, 0)):
                after = ""
                while True:
                    rows = await self._fetch(
                        prune, after=after, statuses=_prunable(include_dead), days=kept_days, most=BATCH
                    )
                    if not rows:
                        break
                    after = max(row["event_id"] for row in rows)
                    change.changed += len(rows)
                    yield (0, len(rows)) if is_row else (len(rows), 0)

    async def rotate_epoch(self, operator: str) -> tuple[str | None, str | None]:
        """Give the ledger a new epoch; returns the one before and the one after."""
        before = self._connection.epoch
        change = Change(operator, "rotate", f"epoch {before}")
        async with self._noted(change):
            await self._fetch(_ROTATE)
            change.changed = 1
        return before, await read_epoch(self._connection)

    @asynccontextmanager
    async def recording(
        self, operator: str, selection: str, *, give_up_seconds: float
    ) -> AsyncIterator[Callable[[Sequence[Delivery]], Awaitable[int]]]:
        """One reconciliation, noted as a whole: record with what this yields, `BATCH` events at most in a call.

        They are entered as a delivery that may not dispatch enters them: `pending`, attempt 0, due now, a microsecond
        apart, because what is due the longest is taken up first. Returns how many were new; no other row is touched.
        """
        change = Change(operator, "reconcile", selection)

        async def record(deliveries: Sequence[Delivery]) -> int:
            first = -len(deliveries) * _MICROSECOND
            new = await insert(
                self._connection,
                [
                    NewRow(each, Status.PENDING, 0, first + number * _MICROSECOND)
                    for number, each in enumerate(deliveries)
                ],
                patience_seconds=_PATIENCE_SECONDS,
                give_up_seconds=give_up_seconds,
                timeout_seconds=_RECORD_SECONDS,
            )
            change.changed += len(new)
            return len(new)

        async with self._noted(change):
            yield record

    @asynccontextmanager
    async def _noted(self, change: Change) -> AsyncIterator[None]:
        [row] = await self._fetch(
            _BEGIN_ACTION, operator=change.operator, action=change.action, selection=change.selection
        )
        try:
            yield
        except OperatorError:  # somebody else's failure: what was changed here until then is known
            await self._fetch(_END_ACTION, action_id=row["action_id"], changed=change.changed)
            raise
        await self._fetch(_END_ACTION, action_id=row["action_id"], changed=change.changed)


def _prunable(include_dead: bool) -> list[Status]:
    return [Status.COMPLETED, Status.IGNORED, *([Status.DEAD] if include_dead else [])]
