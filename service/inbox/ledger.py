"""The durable record: every statement that reads or changes the state of an event.

Guarantees: no state is ever changed by id alone: `..._if_held` names and WHEREs carry status and attempt, so
whoever was taken over changes nothing. A method that returns has committed (autocommit, one statement); one
that raises `LedgerUnavailable` may have, and its caller must not promise anything. `ON CONFLICT DO UPDATE`
is never used: it queues behind a running handler's row lock, `DO NOTHING` does not.
The clock is always the database's `clock_timestamp()`; intervals are handed in, in seconds.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from sqlalchemy import Row, TextClause, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from service.inbox.event import Delivery
from service.inbox.model import Status
from service.inbox.postgres import borrow, driver, read_epoch
from service.inbox.retry import Backoff

# Insert the event and its body, or do nothing if the id is known: a row comes back only to the first.
_INSERT = text("""
WITH event AS (
    INSERT INTO stripe_events (event_id, type, account, livemode, api_version, object_id, created_at, status,
                               attempt, action, received_at, due_at, give_up_at, settled_at)
    SELECT :event_id, :type, :account, :livemode, :api_version, :object_id, :created_at, :status,
           :attempt, :action, now, now + make_interval(secs => :due_in), now + make_interval(secs => :give_up_in),
           CASE WHEN :settled THEN now END
      FROM clock_timestamp() AS now
    ON CONFLICT (event_id) DO NOTHING
    RETURNING event_id
), payload AS (
    INSERT INTO stripe_event_payloads (event_id, body) SELECT event_id, :body FROM event
    ON CONFLICT (event_id) DO NOTHING
)
SELECT true FROM event
""")

_FIND = text("SELECT status, attempt, failures, last_error FROM stripe_events WHERE event_id = :event_id")

# Take over what nobody works on. MATERIALIZED: a plain IN (SELECT ... LIMIT) claimed 200 rows for 5 under
# another plan. SKIP LOCKED: a row under a running handler's lock is held, however late it is.
_TAKE_OVER = text("""
WITH due AS MATERIALIZED (
    SELECT event_id FROM stripe_events
     WHERE event_id = ANY(:event_ids) AND status IN ('pending', 'failed')
       FOR UPDATE SKIP LOCKED
)
UPDATE stripe_events e
   SET status = 'processing', attempt = attempt + 1,
       due_at = clock_timestamp() + make_interval(secs => :lease)
  FROM due LEFT JOIN stripe_event_payloads p USING (event_id)
 WHERE e.event_id = due.event_id
RETURNING e.event_id, e.attempt, e.failures, e.abandoned, p.body
""")

# Give up on holders that vanished: their claim is past its lease and no handler's lock is on the row. It is
# due again after a backoff, or dead when it keeps killing its process.
_RETURN_ABANDONED = text("""
WITH due AS MATERIALIZED (
    SELECT event_id FROM stripe_events
     WHERE status = 'processing' AND due_at <= (SELECT clock_timestamp())
     ORDER BY due_at LIMIT :limit
       FOR UPDATE SKIP LOCKED
)
UPDATE stripe_events e
   SET abandoned = abandoned + 1,
       status = CASE WHEN abandoned + 1 >= :most THEN 'dead' ELSE 'pending' END,
       settled_at = CASE WHEN abandoned + 1 >= :most THEN clock_timestamp() END,
       last_error = 'attempt ' || attempt || ' was abandoned: its process vanished or froze',
       due_at = clock_timestamp() + make_interval(
           secs => least(:first * power(2, least(abandoned, 60)), :longest) * (0.5 + random() / 2))
  FROM due
 WHERE e.event_id = due.event_id
RETURNING e.event_id, e.status, e.abandoned
""")

# What is due, oldest first; events that were abandoned before are looked for apart. The clock in a subquery: a
# bare volatile function would be no index condition, and each look would read every row that is not due yet.
_DUE = text("""
SELECT event_id FROM stripe_events
 WHERE status IN ('pending', 'failed') AND due_at <= (SELECT clock_timestamp()) AND (abandoned > 0) = :abandoned
 ORDER BY due_at LIMIT :limit
""")

# The first statement of a handler's transaction: lock the row if the claim still holds. The lock is the
# lease from here on; the timeouts free it when this process freezes.
_HOLD = text("""
SELECT pg_current_xact_id()::text AS xid,
       pg_backend_pid() AS pid,
       set_config('synchronous_commit', 'on', true),
       set_config('idle_in_transaction_session_timeout', :timeout_ms, true),
       set_config('statement_timeout', :timeout_ms, true)
  FROM stripe_events
 WHERE event_id = :event_id AND status = 'processing' AND attempt = :attempt
   FOR UPDATE SKIP LOCKED
""")

# The last statement before COMMIT. Another transaction id: the handler ended the transaction by itself.
_COMPLETE = text("""
UPDATE stripe_events
   SET status = 'completed', action = :action, last_error = NULL, settled_at = clock_timestamp()
 WHERE event_id = :event_id AND status = 'processing' AND attempt = :attempt
   AND pg_current_xact_id()::text = :xid
RETURNING true
""")

_FAIL = text("""
UPDATE stripe_events
   SET failures = failures + 1, last_error = :error,
       status = CASE WHEN clock_timestamp() >= give_up_at THEN 'dead' ELSE 'failed' END,
       settled_at = CASE WHEN clock_timestamp() >= give_up_at THEN clock_timestamp() END,
       due_at = clock_timestamp() + make_interval(secs => :due_in)
 WHERE event_id = :event_id AND status = 'processing' AND attempt = :attempt
RETURNING status
""")

_KILL = text("""
UPDATE stripe_events
   SET status = 'dead', failures = failures + 1, last_error = :error, settled_at = clock_timestamp()
 WHERE event_id = :event_id AND status = 'processing' AND attempt = :attempt
RETURNING status
""")

_RELEASE = text("""
UPDATE stripe_events SET status = 'pending', due_at = clock_timestamp() + make_interval(secs => :due_in)
 WHERE event_id = :event_id AND status = 'processing' AND attempt = :attempt
RETURNING status
""")

_IGNORE = text("""
UPDATE stripe_events SET status = 'ignored', action = 'ignored', settled_at = clock_timestamp()
 WHERE event_id = :event_id AND status = 'processing' AND attempt = :attempt
RETURNING status
""")

# An operator's replay of what is settled or waiting; never of what is being handled right now.
_REPLAY = text("""
UPDATE stripe_events
   SET status = 'pending', failures = 0, abandoned = 0, settled_at = NULL, due_at = clock_timestamp(),
       give_up_at = clock_timestamp() + make_interval(secs => :give_up_in)
 WHERE event_id = ANY(:event_ids) AND status IN ('pending', 'failed', 'dead', 'ignored')
RETURNING event_id
""")

# A handler was given up on: end its transaction now, not when its statement happens to end. Pids are reused,
# so only if the backend is still in that very transaction.
_END = text("""
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
 WHERE pid = :pid AND backend_xid = CAST(CAST(CAST(:xid AS text) AS xid8) AS xid)
""")

_XACT_STATUS = text("SELECT pg_xact_status(CAST(CAST(:xid AS text) AS xid8))")


@dataclass(frozen=True, slots=True)
class Claim:
    """A ledger row that is ours to dispatch. `attempt` fences it, `epoch` goes into its marker."""

    event_id: str
    attempt: int
    failures: int
    abandoned: int
    epoch: str | None
    body: bytes | None = field(repr=False)


@dataclass(frozen=True, slots=True)
class Found:
    """A row that was there already."""

    status: Status
    attempt: int
    epoch: str | None


@dataclass(frozen=True, slots=True)
class Held:
    """A handler's transaction: its id and the server process that runs it."""

    xid: str
    pid: int


class Ledger:
    """The statements above on the ingest pool; `hold` and `complete_if_held` on a handler's own connection."""

    def __init__(
        self,
        engine: AsyncEngine,
        backoff: Backoff,
        *,
        timeout_seconds: float,
        lease_seconds: float,
        give_up_seconds: float,
        idle_in_transaction_seconds: float,
        abandoned_most: int,
    ) -> None:
        self._engine = engine
        self._timeout_seconds = timeout_seconds
        self._lease_seconds = lease_seconds
        self._give_up_seconds = give_up_seconds
        self._timeout_ms = str(round(idle_in_transaction_seconds * 1000))
        self._abandoned_most = abandoned_most
        self._backoff = backoff

    # -- the two ways in ------------------------------------------------------------------------------

    async def claim(self, delivery: Delivery, *, ignored: bool = False) -> Claim | Found:
        """By the lock holder: the first insert wins the right to dispatch. Raises `LedgerUnavailable`.

        `ignored`: nothing here wants the event; the row is settled as it is inserted.
        """
        if ignored:
            return await self._insert(delivery, Status.IGNORED, attempt=1, due_in=0)
        return await self._insert(delivery, Status.PROCESSING, attempt=1, due_in=self._lease_seconds)

    async def record(self, delivery: Delivery, *, due_in_seconds: float) -> Found | None:
        """By whoever may not dispatch: recorded for recovery; None: it is, `Found`: it was there already."""
        found = await self._insert(delivery, Status.PENDING, attempt=0, due_in=due_in_seconds)
        return found if isinstance(found, Found) else None

    async def _insert(self, delivery: Delivery, status: Status, *, attempt: int, due_in: float) -> Claim | Found:
        event = delivery.event
        async with borrow(self._engine, self._timeout_seconds) as connection:
            epoch = driver(connection).epoch
            inserted = await connection.execute(
                _INSERT,
                {
                    "event_id": event.id,
                    "type": event.type,
                    "account": event.account,
                    "livemode": event.livemode,
                    "api_version": event.api_version,
                    "object_id": event.object_id,
                    "created_at": event.created,
                    "status": status,
                    "attempt": attempt,
                    "action": "ignored" if status is Status.IGNORED else None,
                    "settled": status is Status.IGNORED,
                    "due_in": due_in,
                    "give_up_in": self._give_up_seconds,
                    "body": delivery.body,
                },
            )
            if inserted.first():
                return Claim(event.id, attempt, 0, 0, epoch, delivery.body)
            row = (await connection.execute(_FIND, {"event_id": event.id})).first()
        if row is None:  # pruned between the two statements: it was old and settled
            return Found(Status.COMPLETED, 0, None)
        return Found(Status(row.status), row.attempt, epoch)

    # -- taking over ----------------------------------------------------------------------------------

    async def take_over(self, event_ids: Sequence[str]) -> list[Claim]:
        """Claim those of `event_ids` that are `pending` or `failed` and that nobody has a lock on."""
        async with borrow(self._engine, self._timeout_seconds) as connection:
            rows = await connection.execute(_TAKE_OVER, {"event_ids": list(event_ids), "lease": self._lease_seconds})
            epoch = driver(connection).epoch
            return [Claim(r.event_id, r.attempt, r.failures, r.abandoned, epoch, r.body) for r in rows]

    async def return_abandoned(self, limit: int) -> list[tuple[str, Status, int]]:
        """Give up on vanished holders; returns (event id, `pending` or `dead`, times abandoned) of each."""
        parameters = {
            "limit": limit,
            "most": self._abandoned_most,
            "first": self._backoff.first_seconds,
            "longest": self._backoff.most_seconds,
        }
        async with borrow(self._engine, self._timeout_seconds) as connection:
            rows = await connection.execute(_RETURN_ABANDONED, parameters)
            return [(row.event_id, Status(row.status), row.abandoned) for row in rows]

    async def due(self, limit: int, *, abandoned: bool) -> list[str]:
        """Ids of `limit` events that are due, oldest first: those never abandoned, or those that were."""
        async with borrow(self._engine, self._timeout_seconds) as connection:
            return list(await connection.scalars(_DUE, {"limit": limit, "abandoned": abandoned}))

    async def read_epoch(self) -> str | None:
        """The epoch as the server has it now."""
        async with borrow(self._engine, self._timeout_seconds) as connection:
            return await read_epoch(driver(connection))

    async def replay(self, event_ids: Sequence[str]) -> list[str]:
        """Make events due now with their counts reset, attempt untouched; returns those that it changed."""
        parameters = {"event_ids": list(event_ids), "give_up_in": self._give_up_seconds}
        async with borrow(self._engine, self._timeout_seconds) as connection:
            return list(await connection.scalars(_REPLAY, parameters))

    # -- inside a handler's transaction ---------------------------------------------------------------

    async def hold(self, connection: AsyncConnection, claim: Claim) -> Held | None:
        """Lock the claimed row, which begins the transaction; None: the claim was taken over."""
        row = (
            await connection.execute(
                _HOLD,
                {"event_id": claim.event_id, "attempt": claim.attempt, "timeout_ms": self._timeout_ms},
            )
        ).first()
        return None if row is None else Held(row.xid, row.pid)

    async def complete_if_held(self, connection: AsyncConnection, claim: Claim, held: Held, action: str) -> bool:
        """The completion mark: last statement before COMMIT, and only in the transaction that was held."""
        parameters = {"event_id": claim.event_id, "attempt": claim.attempt, "xid": held.xid, "action": action}
        return (await connection.execute(_COMPLETE, parameters)).first() is not None

    # -- after it -------------------------------------------------------------------------------------

    async def fail_if_held(self, claim: Claim, error: str, *, due_in_seconds: float) -> Status | None:
        """This attempt failed: `failed`, or `dead` when it was tried for too long; None: no longer ours.

        Waits for a backend that is still committing this row, so it also settles an ambiguous COMMIT.
        """
        return await self._settle(_FAIL, claim, error=error, due_in=due_in_seconds)

    async def kill_if_held(self, claim: Claim, error: str) -> Status | None:
        """No retry will help: `dead`; None: no longer ours."""
        return await self._settle(_KILL, claim, error=error)

    async def release_if_held(self, claim: Claim, *, due_in_seconds: float = 0) -> Status | None:
        """Not begun, or interrupted by us: `pending`, nothing charged; None: no longer ours."""
        return await self._settle(_RELEASE, claim, due_in=due_in_seconds)

    async def ignore_if_held(self, claim: Claim) -> Status | None:
        """Nothing here wants it: `ignored`; None: no longer ours."""
        return await self._settle(_IGNORE, claim)

    async def find(self, event_id: str) -> Row[tuple[str, int, int, str | None]] | None:
        """(status, attempt, failures, last_error) of an event, or None."""
        async with borrow(self._engine, self._timeout_seconds) as connection:
            return (await connection.execute(_FIND, {"event_id": event_id})).first()

    async def end(self, held: Held) -> None:
        """Terminate the backend of a transaction that was given up on, if it is still in it."""
        async with borrow(self._engine, self._timeout_seconds) as connection:
            await connection.execute(_END, {"pid": held.pid, "xid": held.xid})

    async def committed(self, held: Held) -> bool:
        """Whether a transaction that is over was committed."""
        async with borrow(self._engine, self._timeout_seconds) as connection:
            return bool(await connection.scalar(_XACT_STATUS, {"xid": held.xid}) == "committed")

    async def _settle(self, statement: TextClause, claim: Claim, **values: object) -> Status | None:
        async with borrow(self._engine, self._timeout_seconds) as connection:
            status = await connection.scalar(
                statement, {"event_id": claim.event_id, "attempt": claim.attempt, **values}
            )
        return None if status is None else Status(status)
