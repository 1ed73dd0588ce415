"""The ledger's SQL, a line of purpose each.

Guarantees: every change of state names status and attempt in its WHERE. `ON CONFLICT DO UPDATE` is never used:
it queues behind a running handler's row lock, `DO NOTHING` does not. The ledger's clock is always
`clock_timestamp()`.
"""

from dataclasses import dataclass
from typing import Any

import asyncpg
from sqlalchemy import text
from sqlalchemy.dialects.postgresql.asyncpg import PGDialect_asyncpg


@dataclass(frozen=True, slots=True)
class Statement:
    """SQL as the driver takes it, and the names of its parameters in their order."""

    sql: str
    names: tuple[str, ...]

    async def fetch(
        self, connection: asyncpg.Connection, *, timeout_seconds: float | None = None, **values: object
    ) -> list[Any]:
        """Its rows; raises what asyncpg raises, and TimeoutError."""
        return await connection.fetch(self.sql, *[values[name] for name in self.names], timeout=timeout_seconds)


def statement(sql: str) -> Statement:
    """Compile `sql` with its `:named` parameters, once: built per call, it cost more than the database's work."""
    compiled = text(sql).compile(dialect=PGDialect_asyncpg())  # type: ignore[no-untyped-call]
    return Statement(str(compiled), tuple(compiled.positiontup or ()))


# Insert the events of many deliveries and their bodies, or do nothing where the id is known: an id comes back only
# to the first. Sorted, for two processes that insert the same ids in opposite order deadlock. A row that another
# transaction has changed and not committed is waited for, but not for long: its batch mates wait too.
INSERT = statement("""
WITH patience AS MATERIALIZED (
    SELECT set_config('lock_timeout', :patience_ms, true)
), delivered AS MATERIALIZED (
    SELECT d.*
      FROM patience CROSS JOIN unnest(
          CAST(:event_ids AS text[]), CAST(:types AS text[]), CAST(:accounts AS text[]), CAST(:livemodes AS bool[]),
          CAST(:api_versions AS text[]), CAST(:object_ids AS text[]), CAST(:created_ats AS timestamptz[]),
          CAST(:statuses AS text[]), CAST(:attempts AS int[]), CAST(:due_ins AS float8[]), CAST(:bodies AS bytea[])
      ) AS d (event_id, type, account, livemode, api_version, object_id, created_at, status, attempt, due_in, body)
     ORDER BY d.event_id COLLATE "C"
), event AS (
    INSERT INTO stripe_events (event_id, type, account, livemode, api_version, object_id, created_at, status,
                               attempt, action, received_at, due_at, give_up_at, settled_at, claimed_at, claimed_by)
    SELECT event_id, type, account, livemode, api_version, object_id, created_at, status,
           attempt, CASE status WHEN 'ignored' THEN status END,
           now, now + make_interval(secs => due_in), now + make_interval(secs => :give_up_in),
           CASE status WHEN 'ignored' THEN now END,
           CASE status WHEN 'processing' THEN now END, CASE status WHEN 'processing' THEN :process END
      FROM delivered, clock_timestamp() AS now
    ON CONFLICT (event_id) DO NOTHING
    RETURNING event_id
), payload AS (
    INSERT INTO stripe_event_payloads (event_id, body) SELECT event_id, body FROM event JOIN delivered USING (event_id)
    ON CONFLICT (event_id) DO NOTHING
)
SELECT event_id FROM event
""")

FIND = statement("""
SELECT event_id, status, attempt FROM stripe_events WHERE event_id = ANY(:event_ids)
""")

# Take over what nobody works on. MATERIALIZED: a plain IN (SELECT ... LIMIT) claimed 200 rows for 5 under
# another plan. SKIP LOCKED: a row under a running handler's lock is held, however late it is.
TAKE_OVER = statement("""
WITH due AS MATERIALIZED (
    SELECT event_id FROM stripe_events
     WHERE event_id = ANY(:event_ids) AND status IN ('pending', 'failed')
       FOR UPDATE SKIP LOCKED
)
UPDATE stripe_events e
   SET status = 'processing', attempt = attempt + 1, claimed_at = clock_timestamp(), claimed_by = :process,
       due_at = clock_timestamp() + make_interval(secs => :lease)
  FROM due LEFT JOIN stripe_event_payloads p USING (event_id)
 WHERE e.event_id = due.event_id
RETURNING e.event_id, e.attempt, e.failures, e.abandoned, p.body
""")

# Give up on holders that vanished: their claim is past its lease and no handler's lock is on the row. It is
# due again after a backoff, or dead when it keeps killing its process.
RETURN_ABANDONED = statement("""
WITH due AS MATERIALIZED (
    SELECT event_id FROM stripe_events
     WHERE status = 'processing' AND due_at <= (SELECT clock_timestamp())
     ORDER BY due_at LIMIT :limit
       FOR UPDATE SKIP LOCKED
), returned AS (
    UPDATE stripe_events e
       SET abandoned = abandoned + 1,
           status = CASE WHEN abandoned + 1 >= :most THEN 'dead' ELSE 'pending' END,
           settled_at = CASE WHEN abandoned + 1 >= :most THEN clock_timestamp() END,
           last_error = 'attempt ' || attempt || ' was abandoned: its process vanished or froze',
           due_at = clock_timestamp() + make_interval(
               secs => least(:first * power(2, least(abandoned, 60)), :longest) * (0.5 + random() / 2))
      FROM due
     WHERE e.event_id = due.event_id
    RETURNING e.*
), noted AS (
    INSERT INTO stripe_event_attempts (event_id, attempt, outcome, process, began_at, ended_at, error)
    SELECT event_id, attempt, 'abandoned', claimed_by, claimed_at, clock_timestamp(), last_error FROM returned
    ON CONFLICT DO NOTHING
)
SELECT event_id, status, abandoned FROM returned
""")

# What is due, oldest first; events that were abandoned before are looked for apart. The clock in a subquery: a
# bare volatile function would be no index condition, and each look would read every row that is not due yet.
DUE = statement("""
SELECT event_id FROM stripe_events
 WHERE status IN ('pending', 'failed') AND due_at <= (SELECT clock_timestamp()) AND (abandoned > 0) = :abandoned
 ORDER BY due_at LIMIT :limit
""")

# The first statement of a handler's transaction: lock the row if the claim still holds. The lock is the
# lease from here on; the timeouts free it when this process freezes.
HOLD = statement("""
SELECT pg_current_xact_id()::text AS xid,
       pg_backend_pid() AS pid,
       pg_postmaster_start_time() AS server,
       now() AS began,
       set_config('synchronous_commit', 'on', true),
       set_config('idle_in_transaction_session_timeout', :timeout_ms, true),
       set_config('statement_timeout', :timeout_ms, true)
  FROM stripe_events
 WHERE event_id = :event_id AND status = 'processing' AND attempt = :attempt
   FOR UPDATE SKIP LOCKED
""")

# The last statement before COMMIT. Another transaction id: the handler ended the transaction by itself.
COMPLETE = statement("""
UPDATE stripe_events
   SET status = 'completed', action = :action, last_error = NULL, settled_at = clock_timestamp()
 WHERE event_id = :event_id AND status = 'processing' AND attempt = :attempt
   AND pg_current_xact_id()::text = :xid
RETURNING true
""")


def _noting(change: str) -> str:
    """`change` is a failed attempt: note it in the same statement, so that there is never the one without the other."""
    return f"""
WITH changed AS ({change}RETURNING *
), noted AS (
    INSERT INTO stripe_event_attempts (event_id, attempt, outcome, process, began_at, ended_at, error)
    SELECT event_id, attempt, status, claimed_by, claimed_at, clock_timestamp(), last_error FROM changed
    ON CONFLICT DO NOTHING
)
SELECT status FROM changed
"""


FAIL = statement(
    _noting("""
UPDATE stripe_events
   SET failures = failures + 1, last_error = :error,
       status = CASE WHEN clock_timestamp() >= give_up_at THEN 'dead' ELSE 'failed' END,
       settled_at = CASE WHEN clock_timestamp() >= give_up_at THEN clock_timestamp() END,
       due_at = clock_timestamp() + make_interval(secs => :due_in)
 WHERE event_id = :event_id AND status = 'processing' AND attempt = :attempt
""")
)

KILL = statement(
    _noting("""
UPDATE stripe_events
   SET status = 'dead', failures = failures + 1, last_error = :error, settled_at = clock_timestamp()
 WHERE event_id = :event_id AND status = 'processing' AND attempt = :attempt
""")
)

RELEASE = statement("""
UPDATE stripe_events SET status = 'pending', due_at = clock_timestamp() + make_interval(secs => :due_in)
 WHERE event_id = :event_id AND status = 'processing' AND attempt = :attempt
RETURNING status
""")

IGNORE = statement("""
UPDATE stripe_events SET status = 'ignored', action = 'ignored', settled_at = clock_timestamp()
 WHERE event_id = :event_id AND status = 'processing' AND attempt = :attempt
RETURNING status
""")

# We were given up on, and are alive: a handler's row lock goes with its transaction, a moment before our word of how
# it ended, and past the lease its row looks abandoned then. Nobody has begun since, or the attempt were another.
TAKE_BACK = statement("""
WITH taken AS (
    UPDATE stripe_events
       SET status = 'processing', abandoned = :abandoned, settled_at = NULL,
           due_at = clock_timestamp() + make_interval(secs => :lease)
     WHERE event_id = :event_id AND status IN ('pending', 'dead') AND attempt = :attempt AND abandoned > :abandoned
    RETURNING event_id, attempt
), unnoted AS (
    DELETE FROM stripe_event_attempts a USING taken
     WHERE a.event_id = taken.event_id AND a.attempt = taken.attempt AND a.outcome = 'abandoned'
)
SELECT true FROM taken
""")

# A handler was given up on: end its transaction now, not when its statement happens to end. Pids are reused,
# so only if the backend is still in that very transaction.
END = statement("""
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
 WHERE pid = :pid AND backend_xid = CAST(CAST(CAST(:xid AS text) AS xid8) AS xid)
""")

# Of this server, unless it was started or has crashed since: a crash forgets the ids of transactions that had nothing
# on disk, and gives them out again, and what another has committed under the same id is no sign of ours. Started anew,
# it has another start time; where it lost a process (kill -9, out of memory) and recovered in place it has not, but
# recovery resets its statistics.
XACT_STATUS = statement("""
SELECT CASE WHEN pg_postmaster_start_time() = :server AND stats_reset < :began
            THEN pg_xact_status(CAST(CAST(:xid AS text) AS xid8)) END
  FROM pg_stat_bgwriter
""")
