"""What an operator changes in the ledger.

Guarantees: nothing here dispatches. A replay makes events due, and the running services take them up. An event that is
being handled is never changed. Every change is recorded in `operator_actions`
before it begins (who, what, which events), and completed with the number of events that it changed. An interrupted
change has no number. Changes are made in small batches, one transaction each, and skip rows that are locked, so that
no delivery waits for them.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from firstclaim.errors import LedgerUnavailable, OperatorError
from firstclaim.event import Delivery
from firstclaim.inbox.new_row import NewRow, insert
from firstclaim.migrations import schema
from firstclaim.operations.audit import replay_selection
from firstclaim.operations.queries import STATEMENT_SECONDS, Queries
from firstclaim.operations.selection import SELECTED, Selection
from firstclaim.postgres.advice import explain
from firstclaim.postgres.connection import UNAVAILABLE, open_connection
from firstclaim.postgres.epoch import read_epoch
from firstclaim.postgres.statement import statement
from firstclaim.schema_name import DEFAULT_SCHEMA
from firstclaim.status import Status

# The server ends a statement at the limit too. After a command that gave up, or was killed, it would go on, with its
# locks, for as long as it takes. (Seen: a prune that had given up kept a migration from its lock.)
_PINS = {"statement_timeout": f"{STATEMENT_SECONDS:.0f}s"}
BATCH = 500  # events in one transaction: about ten milliseconds, so that no row is locked for long
_RECORD_SECONDS = 60.0  # for a batch with its bodies over a slow connection
_PATIENCE_SECONDS = 5.0  # a concurrent delivery of the same event commits in milliseconds
_MICROSECOND = 1e-6
REPLAYABLE = (Status.PENDING, Status.FAILED, Status.DEAD, Status.IGNORED)  # a replay of these repeats no effect

_SELECT_CANDIDATES = statement(f"""
SELECT event_id, status, attempt, p.event_id IS NOT NULL AS has_payload, type, livemode
  FROM firstclaim.stripe_events e LEFT JOIN firstclaim.stripe_event_payloads p USING (event_id)
 WHERE {SELECTED} ORDER BY due_at
""")
# No promise rests on this read, so it does not wait for replication.
_RECORDED = statement("SELECT event_id FROM firstclaim.stripe_events WHERE event_id = ANY(:event_ids)")
# An event is replayed only if its status and its attempt are those that were selected: if they changed, its effects may
# have happened. It needs its payload, because an event without one cannot be dispatched. The payload is locked too,
# because a concurrent prune could delete it.
_REPLAY = statement("""
WITH chosen AS MATERIALIZED (
    SELECT e.event_id
      FROM firstclaim.stripe_events e
      JOIN unnest(CAST(:event_ids AS text[]), CAST(:statuses AS text[]), CAST(:attempts AS int[]))
           AS c (event_id, status, attempt) ON e.event_id = c.event_id
      JOIN firstclaim.stripe_event_payloads p ON p.event_id = e.event_id
     WHERE e.status = c.status AND e.attempt = c.attempt
       FOR UPDATE OF e, p SKIP LOCKED
)
UPDATE firstclaim.stripe_events e
   SET status = 'pending', failures = 0, abandoned = 0, settled_at = NULL, due_at = clock_timestamp(),
       give_up_at = clock_timestamp() + make_interval(secs => :give_up_in)
  FROM chosen WHERE e.event_id = chosen.event_id
RETURNING e.event_id
""")
# A payload that was pruned, put back. It counts as recorded now, so that the next prune does not take it away again.
_RESTORE = statement("""
INSERT INTO firstclaim.stripe_event_payloads (event_id, body, traceparent, headers)
SELECT event_id, :body, :traceparent, :headers FROM firstclaim.stripe_events WHERE event_id = :event_id FOR UPDATE
ON CONFLICT (event_id) DO NOTHING RETURNING event_id
""")
_ROTATE = statement("UPDATE firstclaim.ledger_epoch SET id = gen_random_uuid(), rotated_at = clock_timestamp()")
_BEGIN_ACTION = statement("""
INSERT INTO firstclaim.operator_actions (at, operator, action, selection)
VALUES (clock_timestamp(), :operator, :action, :selection) RETURNING action_id
""")
_END_ACTION = statement("UPDATE firstclaim.operator_actions SET changed = :changed WHERE action_id = :action_id")


@dataclass(frozen=True, slots=True)
class ReplayCandidate:
    """An event as it was when it was selected for a replay. It is not replayed if it has changed since."""

    event_id: str
    status: Status
    attempt: int
    has_payload: bool
    type: str = ""
    livemode: bool = False


@dataclass(slots=True)
class OperatorAction:
    """A change by an operator, while it is being made."""

    operator: str
    action: str
    selection: str
    changed: int = field(default=0, init=False)


class Commands(Queries):
    """Queries and changes on one connection."""

    @classmethod
    @asynccontextmanager
    async def connect(
        cls, dsn: str, timeout_seconds: float, schema_name: str = DEFAULT_SCHEMA
    ) -> AsyncIterator["Commands"]:
        """A connection for the duration of the block. An error of Postgres in the block becomes a `LedgerUnavailable`.

        Raises `SchemaOutdated` before anything is changed.
        """
        try:
            connection = await open_connection(dsn, timeout_seconds, pins=_PINS, schema=schema_name)
            try:
                async with asyncio.timeout(timeout_seconds):
                    version = await schema.read_version(connection)
                if schema.compare(version) is schema.SchemaState.OUTDATED:
                    raise schema.outdated(version)
                yield cls(connection)
            finally:
                connection.terminate()
        except UNAVAILABLE as error:
            raise LedgerUnavailable(explain(error)) from error

    async def recorded_ids(self, event_ids: Sequence[str]) -> set[str]:
        """Those of the ids that the ledger has, in any status."""
        return {row["event_id"] for row in await self.fetch(_RECORDED, event_ids=list(event_ids))}

    # -- changing -------------------------------------------------------------------------------------

    async def select_candidates(self, selection: Selection) -> list[ReplayCandidate]:
        """The selected events, in any status; the event that has been due longest is first."""
        rows = await self.fetch(_SELECT_CANDIDATES, **selection.parameters())
        return [ReplayCandidate(**{**row, "status": Status(row["status"])}) for row in rows]

    async def replay(
        self,
        candidates: Sequence[ReplayCandidate],
        filters: str,
        operator: str,
        *,
        give_up_seconds: float,
        repeat_completed: bool = False,
        began: Callable[[int], object] = lambda _: None,
    ) -> AsyncIterator[list[str]]:
        """Make the events due now, reset their failures, keep their attempt; yields the ids that each batch changed.

        Skips events that are locked, that have changed since they were selected, that are being handled, or whose
        payload has been pruned. `filters` are what they were selected by beside their ids, for the audit; `began` is
        called with the id of its row.

        `repeat_completed`: also replay completed events. Their effects will happen a second time.
        """
        statuses = {*REPLAYABLE, *([Status.COMPLETED] if repeat_completed else [])}
        remaining = [each for each in candidates if each.status in statuses]
        action = OperatorAction(operator, "replay", replay_selection([each.event_id for each in remaining], filters))
        async with self.audited(action) as action_id:
            began(action_id)
            while remaining:
                batch, remaining = remaining[:BATCH], remaining[BATCH:]
                rows = await self.fetch(
                    _REPLAY,
                    event_ids=[each.event_id for each in batch],
                    statuses=[each.status for each in batch],
                    attempts=[each.attempt for each in batch],
                    give_up_in=give_up_seconds,
                )
                action.changed += len(rows)
                yield [row["event_id"] for row in rows]

    async def restore_payload(
        self, operator: str, event_id: str, body: bytes, *, traceparent: str | None, headers: str | None
    ) -> bool:
        """Put the payload of an event back that was pruned; whether it had none and there is such an event."""
        action = OperatorAction(operator, "restore", event_id)
        async with self.audited(action):
            rows = await self.fetch(_RESTORE, event_id=event_id, body=body, traceparent=traceparent, headers=headers)
            action.changed = len(rows)
        return bool(rows)

    async def rotate_epoch(self, operator: str) -> tuple[str | None, str | None]:
        """Give the ledger a new epoch; returns the previous one and the new one."""
        before = self._connection.epoch
        action = OperatorAction(operator, "rotate", f"epoch {before}")
        async with self.audited(action):
            await self.fetch(_ROTATE)
            action.changed = 1
        return before, await read_epoch(self._connection)

    @asynccontextmanager
    async def recording(
        self, operator: str, selection: str, *, wants: Callable[[str, bool], bool], give_up_seconds: float
    ) -> AsyncIterator[Callable[[Sequence[Delivery]], Awaitable[set[str]]]]:
        """One reconciliation, audited as one action; yields the function that records at most `BATCH` events per call.

        They are recorded as a delivery that may not dispatch records them: `pending`, attempt 0, due now. They are due
        a microsecond apart, because recovery takes up first what has been due longest. What this build does not want,
        by type and mode, is recorded as `ignored`. The function returns the ids that were new; no other row is changed.
        """
        action = OperatorAction(operator, "reconcile", selection)

        def row(delivery: Delivery, due_in_seconds: float) -> NewRow:
            if wants(delivery.event.type, delivery.event.livemode):
                return NewRow(delivery, Status.PENDING, 0, due_in_seconds)
            return NewRow(delivery, Status.IGNORED, 1, 0)

        async def record(deliveries: Sequence[Delivery]) -> set[str]:
            first = -len(deliveries) * _MICROSECOND
            rows = [row(each, first + number * _MICROSECOND) for number, each in enumerate(deliveries)]
            async with asyncio.timeout(_RECORD_SECONDS):
                new = await insert(
                    self._connection, rows, patience_seconds=_PATIENCE_SECONDS, give_up_seconds=give_up_seconds
                )
            action.changed += len(new)
            return new

        async with self.audited(action):
            yield record

    @asynccontextmanager
    async def audited(self, action: OperatorAction) -> AsyncIterator[int]:
        """Record that the action begins, and at the end of the block how much it has changed; yields its id."""
        [row] = await self.fetch(
            _BEGIN_ACTION, operator=action.operator, action=action.action, selection=action.selection
        )
        try:
            yield row["action_id"]
        except OperatorError:  # not a failure of the ledger: the number changed until then is known
            await self.fetch(_END_ACTION, action_id=row["action_id"], changed=action.changed)
            raise
        await self.fetch(_END_ACTION, action_id=row["action_id"], changed=action.changed)
