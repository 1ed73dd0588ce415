"""What an operator asks of the ledger, and changes in it.

Guarantees: nothing here dispatches: a replay makes events due, and the running services take them up. What is being
handled right now is never changed, what is unfinished never pruned. Every change is noted in `operator_actions`
before it begins (who, what, which events) and closed with the number of events that it changed; one that was
interrupted shows by having no number. Changes come in small batches, a transaction each, and skip rows that are
locked: no delivery waits for them.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from service.errors import LedgerUnavailable
from service.inbox import schema
from service.inbox.model import Status
from service.inbox.postgres import UNAVAILABLE, PinnedConnection, describe, open_connection, read_epoch
from service.inbox.statements import Statement, statement

BATCH = 500  # events in one transaction: some ten milliseconds, so that nobody waits long for a row
ROW_DAYS_LEAST = 35  # Stripe resends by hand for 30 days: until then only the row tells a duplicate
REPLAYABLE = (Status.PENDING, Status.FAILED, Status.DEAD, Status.IGNORED)  # without repeating any effect
_STATEMENT_SECONDS = 60.0  # a count over millions of rows; a batch takes milliseconds

_SELECTED = """
      (CAST(:event_ids AS text[]) IS NULL OR e.event_id = ANY(CAST(:event_ids AS text[])))
  AND (CAST(:statuses AS text[]) IS NULL OR e.status = ANY(CAST(:statuses AS text[])))
  AND (CAST(:type AS text) IS NULL OR e.type LIKE CAST(:type AS text))
  AND (CAST(:account AS text) IS NULL OR e.account = CAST(:account AS text))
  AND (CAST(:older AS float8) IS NULL
       OR e.received_at <= clock_timestamp() - make_interval(secs => CAST(:older AS float8)))
  AND (CAST(:newer AS float8) IS NULL
       OR e.received_at > clock_timestamp() - make_interval(secs => CAST(:newer AS float8)))
"""

_COLUMNS = """event_id, type, account, livemode, object_id, api_version, status, attempt, failures, abandoned, action,
       last_error, created_at, received_at, due_at, give_up_at, settled_at"""

_LIST = statement(f"SELECT {_COLUMNS} FROM stripe_events e WHERE {_SELECTED} ORDER BY received_at DESC LIMIT :most")
_COUNT = statement(f"SELECT status, count(*) AS events FROM stripe_events e WHERE {_SELECTED} GROUP BY status")
_CHOOSE = statement(f"""
SELECT event_id, status, attempt, p.event_id IS NOT NULL AS has_payload
  FROM stripe_events e LEFT JOIN stripe_event_payloads p USING (event_id)
 WHERE {_SELECTED} ORDER BY due_at
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
_PAYLOAD = statement("SELECT body FROM stripe_event_payloads WHERE event_id = :event_id")
_ACTIONS_ON = statement("""
SELECT at, operator, action, selection FROM operator_actions
 WHERE position(:event_id IN selection) > 0 ORDER BY at
""")
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
)
DELETE FROM stripe_events e USING old WHERE e.event_id = old.event_id RETURNING e.event_id
""")
_OLD = statement("""
SELECT count(*) FILTER (WHERE p.event_id IS NOT NULL
                          AND settled_at < clock_timestamp() - make_interval(days => :payload_days)) AS payloads,
       count(*) FILTER (WHERE settled_at < clock_timestamp() - make_interval(days => :row_days)) AS rows
  FROM stripe_events LEFT JOIN stripe_event_payloads p USING (event_id)
 WHERE status = ANY(:statuses)
""")
_STATS = statement("""
SELECT count(*) FILTER (WHERE status IN ('pending', 'failed') AND due_at <= now) AS due,
       CAST(max(extract(epoch FROM now - due_at)) FILTER (WHERE status IN ('pending', 'failed') AND due_at <= now)
            AS float8) AS oldest_due_seconds,
       count(*) FILTER (WHERE status = 'processing' AND due_at <= now) AS past_their_lease,
       count(*) FILTER (WHERE abandoned > 0) AS abandoned_before
  FROM stripe_events, clock_timestamp() AS now
 WHERE status IN ('pending', 'processing', 'failed')
""")


@dataclass(frozen=True, slots=True)
class Selection:
    """Which events are meant: all that is given has to hold. `type` may be `prefix.*`; ages count from the arrival."""

    event_ids: Sequence[str] | None = None
    statuses: Sequence[Status] | None = None
    type: str | None = None
    account: str | None = None
    older_than_seconds: float | None = None
    newer_than_seconds: float | None = None

    @property
    def is_empty(self) -> bool:
        """Whether it means all events that there are."""
        return self == Selection()

    def __str__(self) -> str:
        """In the words of the command line, for the audit."""
        given = {
            "status": None if self.statuses is None else ",".join(self.statuses),
            "type": self.type,
            "account": self.account,
            "older-than": None if self.older_than_seconds is None else f"{self.older_than_seconds:.0f}s",
            "newer-than": None if self.newer_than_seconds is None else f"{self.newer_than_seconds:.0f}s",
        }
        words = [f"{name}={value}" for name, value in given.items() if value is not None]
        return " ".join((*(self.event_ids or ()), *words)) or "all"

    def values(self) -> dict[str, Any]:
        """The parameters of a statement that selects by it."""
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
class Listed:
    """An event as the ledger has it."""

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


@dataclass(frozen=True, slots=True)
class Chosen:
    """An event as it was when it was chosen for a replay; what it is by then is not touched if it differs."""

    event_id: str
    status: Status
    attempt: int
    has_payload: bool


@dataclass(frozen=True, slots=True)
class Stats:
    """The ledger at a glance. Ages in seconds; `oldest_due_seconds` None: nothing is due."""

    events: dict[Status, int]
    due: int
    oldest_due_seconds: float | None
    past_their_lease: int
    abandoned_before: int


@dataclass(slots=True)
class Change:
    """One change by hand, while it goes on."""

    operator: str
    action: str
    selection: str
    changed: int = field(default=0, init=False)


class Operations:
    """On one connection of their own."""

    def __init__(self, connection: PinnedConnection) -> None:
        self._connection = connection

    @classmethod
    @asynccontextmanager
    async def on(cls, dsn: str, timeout_seconds: float) -> AsyncIterator["Operations"]:
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

    # -- asking ---------------------------------------------------------------------------------------

    async def list_events(self, selection: Selection, most: int) -> list[Listed]:
        """The newest `most` of them."""
        rows = await self._fetch(_LIST, **selection.values(), most=most)
        return [Listed(**{**row, "status": Status(row["status"])}) for row in rows]

    async def count(self, selection: Selection) -> dict[Status, int]:
        """How many there are in each status that has any."""
        rows = await self._fetch(_COUNT, **selection.values())
        return {Status(row["status"]): row["events"] for row in rows}

    async def find(self, event_id: str) -> Listed | None:
        """The event, or None: the ledger does not have it."""
        return next(iter(await self.list_events(Selection([event_id]), 1)), None)

    async def payload(self, event_id: str) -> bytes | None:
        """The very bytes that were signed; None: pruned."""
        rows = await self._fetch(_PAYLOAD, event_id=event_id)
        return rows[0]["body"] if rows else None

    async def actions_on(self, event_id: str) -> list[dict[str, Any]]:
        """What was done to the event by its id, oldest first: `at`, `operator`, `action`."""
        found = await self._fetch(_ACTIONS_ON, event_id=event_id)
        return [dict(row) for row in found if event_id in row["selection"].split(" ")]

    async def stats(self) -> Stats:
        """The ledger at a glance."""
        counts = await self.count(Selection())
        [row] = await self._fetch(_STATS)
        return Stats({each: counts.get(each, 0) for each in Status}, **row)

    async def old(self, payload_days: int, row_days: int, *, include_dead: bool) -> tuple[int, int]:
        """How many payloads and rows `prune` would take."""
        statuses = _prunable(include_dead)
        [row] = await self._fetch(_OLD, payload_days=payload_days, row_days=row_days, statuses=list(statuses))
        return row["payloads"], row["rows"]

    # -- changing -------------------------------------------------------------------------------------

    async def choose(self, selection: Selection) -> list[Chosen]:
        """For a replay: all that are selected, in whatever status, the longest due first."""
        rows = await self._fetch(_CHOOSE, **selection.values())
        return [Chosen(**{**row, "status": Status(row["status"])}) for row in rows]

    async def replay(
        self,
        chosen: Sequence[Chosen],
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

    async def _fetch(self, query: Statement, **values: object) -> list[Any]:
        return await query.fetch(self._connection, timeout_seconds=_STATEMENT_SECONDS, **values)

    @asynccontextmanager
    async def _noted(self, change: Change) -> AsyncIterator[None]:
        [row] = await self._fetch(
            _BEGIN_ACTION, operator=change.operator, action=change.action, selection=change.selection
        )
        yield
        await self._fetch(_END_ACTION, action_id=row["action_id"], changed=change.changed)


def _prunable(include_dead: bool) -> list[Status]:
    return [Status.COMPLETED, Status.IGNORED, *([Status.DEAD] if include_dead else [])]
