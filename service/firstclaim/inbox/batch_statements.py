"""The ledger's SQL for batch handlers: what `firstclaim.inbox.statements` says of one event, for many at once.

Guarantees: as there, every change of state names status and attempt, here in pairs of event id and attempt. How many
statements a batch costs does not depend on its size.

The rows are looked up one by one by their ids, whatever the planner believes. The status is compared as
`firstclaim.inbox.statements` does, so no index of it fits. And the planner expects ten rows of any list, for which it
would read the whole of a ledger that it believes to be empty, until that is first analysed; with a LIMIT that it does
not know, it expects a tenth of them.
"""

from asyncpg import DivisionByZeroError

from firstclaim.inbox.statements import FAILURE, GIVE_UP_AT
from firstclaim.postgres.statement import statement

_CLAIMED = """claimed AS MATERIALIZED (
    SELECT * FROM unnest(CAST(:event_ids AS text[]), CAST(:attempts AS int[])) AS claimed (event_id, attempt)
     LIMIT cardinality(CAST(:event_ids AS text[]))
)"""

# The first statement of a batch handler's transaction: lock the rows whose claims still hold, in order of id. A row
# that does not come back was taken over, or is locked by another transaction: it leaves the batch. The settings are in
# a subquery, because in the list they would be made once for each row.
HOLD_ALL = statement(f"""
WITH pinned AS MATERIALIZED (
    SELECT pg_current_xact_id()::text AS xid,
           pg_backend_pid() AS pid,
           pg_postmaster_start_time() AS server,
           now() AS began,
           set_config('synchronous_commit', :synchronous_commit, true),
           set_config('idle_in_transaction_session_timeout', :timeout_ms, true),
           set_config('statement_timeout', :timeout_ms, true)
), {_CLAIMED}
SELECT xid, pid, server, began, e.event_id
  FROM pinned CROSS JOIN claimed
  JOIN firstclaim.stripe_events e ON e.event_id = claimed.event_id AND e.attempt = claimed.attempt
 WHERE e.status || '' = 'processing'
 ORDER BY e.event_id
   FOR UPDATE OF e SKIP LOCKED
""")

# The completion marks, in one statement. If the transaction id differs, the handler has ended its transaction. COMMIT
# follows in the same round trip, so the server itself must refuse it: if no row is marked, as `COMPLETE` does; if some
# are, by a division by zero (`SOME_NOT_MARKED`). Both depend on the count, so that none is evaluated by the planner.
COMPLETE_ALL = statement("""
WITH pinned AS MATERIALIZED (
    SELECT set_config('synchronous_commit', :synchronous_commit, true),
           set_config('client_min_messages', 'warning', true)
), done AS MATERIALIZED (
    SELECT * FROM unnest(CAST(:event_ids AS text[]), CAST(:attempts AS int[]), CAST(:actions AS text[]))
                  AS done (event_id, attempt, action)
     LIMIT :number
), marked AS (
    UPDATE firstclaim.stripe_events e
       SET status = 'completed', action = done.action, last_error = NULL, settled_at = clock_timestamp()
      FROM pinned CROSS JOIN done
     WHERE e.event_id = done.event_id AND e.attempt = done.attempt AND e.status || '' = 'processing'
       AND pg_current_xact_id()::text = :xid
    RETURNING e.event_id
)
SELECT FROM (SELECT count(event_id) AS number FROM marked) AS counted
 WHERE CASE number WHEN :number THEN false
                   WHEN 0 THEN CAST('the completion marks fit ' || number || ' rows' AS bool)
                   ELSE 1 / (number - number) = 0 END
""")
SOME_NOT_MARKED = DivisionByZeroError

# After a batch that failed, before its events are tried again: their leases begin anew. With an error, which says that
# each goes alone: the row keeps it until it is completed, so that no process puts the event into a batch again.
RENEW = statement(f"""
WITH {_CLAIMED}
UPDATE firstclaim.stripe_events e
   SET due_at = clock_timestamp() + make_interval(secs => :lease),
       last_error = coalesce(CAST(:error AS text), last_error)
  FROM claimed
 WHERE e.event_id = claimed.event_id AND e.attempt = claimed.attempt AND e.status || '' = 'processing'
RETURNING e.event_id, e.status
""")

# A batch handler has asked for a retry of the whole, or another system for a pause: no charge, no error, so that the
# events may enter a batch again. Past its time to give up an event is dead, because it is never charged on this way.
POSTPONE = statement(f"""
WITH {_CLAIMED}, changed AS (
    UPDATE firstclaim.stripe_events e
       SET status = CASE WHEN clock_timestamp() >= {GIVE_UP_AT} THEN 'dead' ELSE 'pending' END,
           settled_at = CASE WHEN clock_timestamp() >= {GIVE_UP_AT} THEN clock_timestamp() END,
           last_error = CASE WHEN clock_timestamp() >= {GIVE_UP_AT} THEN split_part(CAST(:error AS text), chr(10), 1)
                             ELSE last_error END,
           due_at = clock_timestamp() + make_interval(secs => :due_in)
      FROM claimed
     WHERE e.event_id = claimed.event_id AND e.attempt = claimed.attempt AND e.status || '' = 'processing'
    RETURNING e.*
), noted AS (
    INSERT INTO firstclaim.stripe_event_attempts
           (event_id, attempt, outcome, process, began_at, ended_at, error, failure_group, handler, error_class, place)
    SELECT event_id, attempt, status, claimed_by, claimed_at, clock_timestamp(), CAST(:error AS text), {FAILURE}
      FROM changed
     WHERE status = 'dead'
    ON CONFLICT DO NOTHING
)
SELECT event_id, status FROM changed
""")
