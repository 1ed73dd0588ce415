"""The ledger's SQL, with a line of purpose for each statement.

Guarantees: every change of state names status and attempt in its WHERE. `ON CONFLICT DO UPDATE` is never used here:
it queues behind a running handler's row lock, `DO NOTHING` does not. The ledger's clock is always
`clock_timestamp()`. Every table is named with its schema: some of these statements run on a handler's connection, whose
`search_path` the handler may have changed.

A row that is found by its id has its status compared as `status || ''`, which fits no index. For the plain condition
the planner may read a whole index of the rows of that status, because it believes it to be small: with all versions
that are dead, and that a long snapshot (`pg_dump`) keeps. With some 20,000 of them a claim took a second.
"""

from asyncpg import InvalidTextRepresentationError, NoActiveSQLTransactionError

from firstclaim.postgres.epoch import EpochStatement
from firstclaim.postgres.statement import statement

# The condition by whether the event was abandoned before. Each has an index of its own.
ABANDONED_BEFORE = {False: "abandoned = 0", True: "abandoned > 0"}

# Insert the events of many deliveries and their bodies, or do nothing where the id is known. An id is returned only to
# the statement that inserted it. Sorted, because two processes that insert the same ids in opposite order deadlock. The
# insert waits for a row that another transaction has changed and not committed, but not for long, because the rest of
# its batch waits too.
INSERT = statement("""
WITH patience AS MATERIALIZED (
    SELECT set_config('lock_timeout', :patience_ms, true)
), delivered AS MATERIALIZED (
    SELECT d.*
      FROM patience CROSS JOIN unnest(
          CAST(:event_ids AS text[]), CAST(:types AS text[]), CAST(:accounts AS text[]), CAST(:livemodes AS bool[]),
          CAST(:api_versions AS text[]), CAST(:object_ids AS text[]), CAST(:created_ats AS timestamptz[]),
          CAST(:statuses AS text[]), CAST(:attempts AS int[]), CAST(:due_ins AS float8[]), CAST(:bodies AS bytea[]),
          CAST(:traceparents AS text[]), CAST(:headers AS text[]), CAST(:endpoints AS text[])
      ) AS d (event_id, type, account, livemode, api_version, object_id, created_at, status, attempt, due_in, body,
              traceparent, headers, endpoint)
     ORDER BY d.event_id COLLATE "C"
), event AS (
    INSERT INTO firstclaim.stripe_events
           (event_id, type, account, livemode, api_version, object_id, created_at, status,
            attempt, action, received_at, due_at, give_up_at, settled_at, claimed_at, claimed_by, endpoint)
    SELECT event_id, type, account, livemode, api_version, object_id, created_at, status,
           attempt, CASE status WHEN 'ignored' THEN status END,
           now, now + make_interval(secs => due_in), now + make_interval(secs => :give_up_in),
           CASE status WHEN 'ignored' THEN now END,
           CASE status WHEN 'processing' THEN now END, CASE status WHEN 'processing' THEN :process END,
           endpoint
      FROM delivered, clock_timestamp() AS now
    ON CONFLICT (event_id) DO NOTHING
    RETURNING event_id
), payload AS (
    INSERT INTO firstclaim.stripe_event_payloads (event_id, body, traceparent, headers)
    SELECT event_id, body, traceparent, headers FROM event JOIN delivered USING (event_id)
    ON CONFLICT (event_id) DO NOTHING
)
SELECT event_id FROM event
""")

# Rows for an answer. A row may be visible and not replicated, if its COMMIT's wait for the synchronous standby was cut
# short. The message that this read writes to the log gives it a COMMIT of its own, which waits until the standby has
# everything that was read. A message that is not transactional (`false`) would not wait.
FIND = statement("""
SELECT event_id, status, attempt, pg_logical_emit_message(true, 'firstclaim', '')
  FROM firstclaim.stripe_events WHERE event_id = ANY(:event_ids)
""")

# The beginning of the error of an event whose batch has failed. Its own next failure, or its success, replaces it.
GOES_ALONE = "its batch has failed, so it goes alone"

# Take over unfinished events that no handler is working on; with :ignored also events that a build without a handler
# has recorded, whose time to give up then starts again. MATERIALIZED: a plain IN (SELECT ... LIMIT) claimed 200 rows
# instead of 5 under another plan. SKIP LOCKED: a row that a running handler has locked is held, however late it is.
TAKE_OVER = statement(f"""
WITH due AS MATERIALIZED (
    SELECT event_id FROM firstclaim.stripe_events
     WHERE event_id = ANY(:event_ids) AND (status || '' IN ('pending', 'failed') OR (:ignored AND status = 'ignored'))
       FOR UPDATE SKIP LOCKED
)
UPDATE firstclaim.stripe_events e
   SET status = 'processing', attempt = attempt + 1, claimed_at = clock_timestamp(), claimed_by = :process,
       due_at = clock_timestamp() + make_interval(secs => :lease), action = NULL, settled_at = NULL,
       give_up_at = CASE status WHEN 'ignored' THEN clock_timestamp() + make_interval(secs => :give_up_in)
                                ELSE give_up_at END
  FROM due LEFT JOIN firstclaim.stripe_event_payloads p USING (event_id)
 WHERE e.event_id = due.event_id
RETURNING e.event_id, e.type, e.attempt, e.failures, e.abandoned, p.body, e.last_error IS NOT NULL AS erred,
          coalesce(starts_with(e.last_error, '{GOES_ALONE}'), false) AS alone, p.traceparent, e.endpoint
""")

# Return events whose process vanished: the claim is past its lease, and no handler has locked the row. The event is due
# again after a backoff, or dead if it was abandoned too often, because it may be the cause.
_ABANDONED = """abandoned = abandoned + 1,
           status = CASE WHEN abandoned + 1 >= :most THEN 'dead' ELSE 'pending' END,
           settled_at = CASE WHEN abandoned + 1 >= :most THEN clock_timestamp() END,
           due_at = clock_timestamp() + make_interval(
               secs => least(:first * power(2, least(abandoned, 60)), :longest) * (0.5 + random() / 2))"""
RETURN_ABANDONED = statement(f"""
WITH due AS MATERIALIZED (
    SELECT event_id FROM firstclaim.stripe_events
     WHERE status = 'processing' AND due_at <= (SELECT clock_timestamp())
     ORDER BY due_at LIMIT :limit
       FOR UPDATE SKIP LOCKED
), returned AS (
    UPDATE firstclaim.stripe_events e
       SET {_ABANDONED},
           last_error = 'attempt ' || attempt || ' was abandoned: its process vanished or froze'
      FROM due
     WHERE e.event_id = due.event_id
    RETURNING e.*
), noted AS (
    INSERT INTO firstclaim.stripe_event_attempts (event_id, attempt, outcome, process, began_at, ended_at, error)
    SELECT event_id, attempt, 'abandoned', claimed_by, claimed_at, clock_timestamp(), last_error FROM returned
    ON CONFLICT DO NOTHING
)
SELECT event_id, type, attempt, claimed_by AS process, status, abandoned AS times FROM returned
""")

# The types and modes of all pending and failed events: one index descent for each, however many rows they have.
_QUEUES = {
    abandoned: f"""
WITH RECURSIVE waiting AS (
    (SELECT type, livemode FROM firstclaim.stripe_events
      WHERE status IN ('pending', 'failed') AND {condition}
      ORDER BY type, livemode LIMIT 1)
    UNION ALL
    SELECT following.* FROM waiting, LATERAL (
        SELECT type, livemode FROM firstclaim.stripe_events
         WHERE status IN ('pending', 'failed') AND {condition}
           AND (type, livemode) > (waiting.type, waiting.livemode)
         ORDER BY type, livemode LIMIT 1) AS following
)
SELECT type, livemode FROM waiting
"""
    for abandoned, condition in ABANDONED_BEFORE.items()
}
QUEUES = {abandoned: statement(sql) for abandoned, sql in _QUEUES.items()}

# All that a round of recovery has to know where there is nothing to do, which is the rule: the epoch, whether claims
# are past their lease, what waits, and what is paused. The clock is in a subquery: see DUE.
SURVEY = EpochStatement(f"""
       EXISTS (SELECT FROM firstclaim.stripe_events
                WHERE status = 'processing' AND due_at <= (SELECT clock_timestamp())) AS overdue,
       (SELECT coalesce(json_agg(json_build_array(type, livemode)), '[]') FROM ({_QUEUES[False]}) AS queue)::text
           AS waiting,
       (SELECT coalesce(json_agg(json_build_array(type, livemode)), '[]') FROM ({_QUEUES[True]}) AS queue)::text
           AS abandoned,
       ARRAY(SELECT pattern FROM firstclaim.operator_pauses) AS paused""")

# The due events of these types, oldest first, each type from its start on; events that were abandoned before are read
# separately. One scan with a filter on the types would read past all rows of the other types. The clock is in a
# subquery: a volatile function by itself cannot be an index condition, and every row that is not due yet would be read.
DUE = {
    abandoned: statement(f"""
SELECT due.*
  FROM unnest(CAST(:types AS text[]), CAST(:livemodes AS bool[]), CAST(:starts AS timestamptz[]))
       AS wanted (type, livemode, start), LATERAL (
      SELECT event_id, type, livemode, due_at FROM firstclaim.stripe_events e
       WHERE e.type = wanted.type AND e.livemode = wanted.livemode
         AND due_at >= coalesce(wanted.start, '-infinity')
         AND status IN ('pending', 'failed') AND {condition}
         AND due_at <= (SELECT clock_timestamp()) AND event_id <> ALL(CAST(:left_out AS text[]))
       ORDER BY due_at LIMIT :limit) AS due
 ORDER BY due_at LIMIT :limit
""")
    for abandoned, condition in ABANDONED_BEFORE.items()
}

# Give up events of types that this process does not want, if nobody has taken them a day after their time to give up:
# no running build has a handler for them.
GIVE_UP = statement("""
WITH due AS MATERIALIZED (
    SELECT event_id
      FROM firstclaim.stripe_events
      JOIN unnest(CAST(:types AS text[]), CAST(:livemodes AS bool[])) AS unwanted (type, livemode)
     USING (type, livemode)
     WHERE status IN ('pending', 'failed') AND give_up_at <= (SELECT clock_timestamp()) - interval '1 day'
     ORDER BY give_up_at LIMIT :limit
       FOR UPDATE OF stripe_events SKIP LOCKED
), given_up AS (
    UPDATE firstclaim.stripe_events e
       SET status = 'dead', settled_at = clock_timestamp(),
           last_error = 'no running build has a handler for ' || type || ': replay it once one has'
      FROM due
     WHERE e.event_id = due.event_id
    RETURNING e.event_id, e.type, e.livemode, e.due_at, e.attempt, e.last_error
), noted AS (
    INSERT INTO firstclaim.stripe_event_attempts (event_id, attempt, outcome, ended_at, error)
    SELECT event_id, attempt, 'dead', clock_timestamp(), last_error FROM given_up
    ON CONFLICT DO NOTHING
)
SELECT event_id, type, livemode, due_at FROM given_up
""")

# The first statement of a handler's transaction: lock the row if the claim still holds. From here on the row lock is
# the lease; the timeouts free it if this process freezes.
HOLD = statement("""
SELECT pg_current_xact_id()::text AS xid,
       pg_backend_pid() AS pid,
       pg_postmaster_start_time() AS server,
       now() AS began,
       set_config('synchronous_commit', :synchronous_commit, true),
       set_config('idle_in_transaction_session_timeout', :timeout_ms, true),
       set_config('statement_timeout', :timeout_ms, true)
  FROM firstclaim.stripe_events
 WHERE event_id = :event_id AND status || '' = 'processing' AND attempt = :attempt
   FOR UPDATE SKIP LOCKED
""")

# The completion mark, the last statement before COMMIT. If the transaction id differs, the handler has ended its
# transaction. Whatever the handler has set, its COMMIT is as durable as `HOLD` has asked for, and the server warns if
# its wait for the standby is cancelled. COMMIT follows in the same round trip, so the server itself must refuse it if
# no row is marked: then the cast fails, and aborts the transaction. It depends on the count, so that it is not
# evaluated when the statement is planned. (`NOT_MARKED`: this error, and the driver's that there is no transaction any
# more.)
COMPLETE = statement("""
WITH marked AS (
    UPDATE firstclaim.stripe_events
       SET status = 'completed', action = :action, last_error = NULL, settled_at = clock_timestamp()
     WHERE event_id = :event_id AND status || '' = 'processing' AND attempt = :attempt
       AND pg_current_xact_id()::text = :xid
    RETURNING set_config('synchronous_commit', :synchronous_commit, true)
              || set_config('client_min_messages', 'warning', true) AS pinned
)
SELECT FROM (SELECT count(pinned) AS number FROM marked) AS counted
 WHERE CASE number WHEN 1 THEN false ELSE CAST('the completion mark fits ' || number || ' rows' AS bool) END
""")
NOT_MARKED = (InvalidTextRepresentationError, NoActiveSQLTransactionError)


# If the report has several lines (`failure_report`), the event keeps the first, and the attempt all of them.
_FIRST_LINE = "split_part(CAST(:error AS text), chr(10), 1)"


# The cause of a failed attempt (`Failure`). A retry that the handler asked for has no group, unless the event is dead
# now.
FAILURE = """
           CASE WHEN status = 'dead' OR NOT CAST(:requested AS bool) THEN CAST(:failure_group AS text) END,
           CAST(:handler AS text), CAST(:error_class AS text), CAST(:place AS text)"""


def _with_attempt(change: str, outcome: str = "status") -> str:
    """`change`, and a row for the attempt that did not succeed, in one statement: never one without the other."""
    return f"""
WITH changed AS ({change}RETURNING *
), noted AS (
    INSERT INTO firstclaim.stripe_event_attempts
           (event_id, attempt, outcome, process, began_at, ended_at, error, failure_group, handler, error_class, place)
    SELECT event_id, attempt, {outcome}, claimed_by, claimed_at, clock_timestamp(), CAST(:error AS text), {FAILURE}
      FROM changed
    ON CONFLICT DO NOTHING
)
SELECT status FROM changed
"""


# A row is recorded with the time to give up of the settings. A handler with a time of its own corrects it at the first
# failure, by the difference: the row then says when it is given up, whoever looks.
GIVE_UP_AT = "give_up_at + CASE failures WHEN 0 THEN make_interval(secs => :give_up_later) ELSE interval '0' END"

FAIL = statement(
    _with_attempt(f"""
UPDATE firstclaim.stripe_events
   SET failures = failures + 1, last_error = {_FIRST_LINE},
       give_up_at = {GIVE_UP_AT},
       status = CASE WHEN clock_timestamp() >= {GIVE_UP_AT} THEN 'dead' ELSE 'failed' END,
       settled_at = CASE WHEN clock_timestamp() >= {GIVE_UP_AT} THEN clock_timestamp() END,
       due_at = clock_timestamp() + make_interval(secs => :due_in)
 WHERE event_id = :event_id AND status || '' = 'processing' AND attempt = :attempt
""")
)

KILL = statement(
    _with_attempt(f"""
UPDATE firstclaim.stripe_events
   SET status = 'dead', failures = failures + 1, last_error = {_FIRST_LINE}, settled_at = clock_timestamp()
 WHERE event_id = :event_id AND status || '' = 'processing' AND attempt = :attempt
""")
)

# An attempt that cannot be ended counts as abandoned, like one whose process vanished.
ABANDON = statement(
    _with_attempt(
        f"""
UPDATE firstclaim.stripe_events SET {_ABANDONED}, last_error = {_FIRST_LINE}
 WHERE event_id = :event_id AND status || '' = 'processing' AND attempt = :attempt
""",
        "'abandoned'",
    )
)

RELEASE = statement("""
UPDATE firstclaim.stripe_events SET status = 'pending', due_at = clock_timestamp() + make_interval(secs => :due_in)
 WHERE event_id = :event_id AND status || '' = 'processing' AND attempt = :attempt
RETURNING status
""")

# Take back our event that was returned as abandoned although this process is alive. A handler's row lock ends with its
# transaction, a moment before we record the result: past the lease, the row looks abandoned in that moment. If another
# attempt had begun since, the attempt number would differ.
TAKE_BACK = statement("""
WITH taken AS (
    UPDATE firstclaim.stripe_events
       SET status = 'processing', abandoned = :abandoned, settled_at = NULL,
           due_at = clock_timestamp() + make_interval(secs => :lease)
     WHERE event_id = :event_id AND status IN ('pending', 'dead') AND attempt = :attempt AND abandoned > :abandoned
    RETURNING event_id, attempt
), unnoted AS (
    DELETE FROM firstclaim.stripe_event_attempts a USING taken
     WHERE a.event_id = taken.event_id AND a.attempt = taken.attempt AND a.outcome = 'abandoned'
)
SELECT true FROM taken
""")

# End the transaction of an attempt that is over, without waiting for its statement. Pids are reused, so the backend
# must still be in the same transaction. A backend that waits for the standby has committed, and is left alone: if it
# were terminated, its COMMIT would not be replicated.
END = statement("""
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
 WHERE pid = :pid AND backend_xid = CAST(CAST(CAST(:xid AS text) AS xid8) AS xid)
   AND wait_event IS DISTINCT FROM 'SyncRep'
""")

# The state of a transaction, unless the server was started or has crashed since. A crash forgets the ids of
# transactions that had nothing on disk and assigns them again: another transaction's commit under the same id says
# nothing about ours. A restart changes the start time. A server that lost a process (kill -9, out of memory) and
# recovered in place keeps its start time, but recovery resets its statistics.
XACT_STATUS = statement("""
SELECT CASE WHEN pg_postmaster_start_time() = :server AND stats_reset < :began
            THEN pg_xact_status(CAST(CAST(:xid AS text) AS xid8)) END
  FROM pg_stat_bgwriter
""")

# Those of these transactions that their handlers have ended: the backend is no longer in the transaction, and either
# the transaction is committed, or the backend is idle or in another transaction. A transaction that an error has
# aborted, or whose backend is gone, was not ended by its handler. While an aborted transaction rejects a statement, its
# backend is neither idle nor in another transaction: the next look decides. `backend_xid` alone is not enough, because
# an error clears it too. A backend with this pid that started later than the transaction is another one.
ENDED_BY_HANDLER = statement("""
SELECT watched.number
  FROM unnest(CAST(:xids AS text[]), CAST(:pids AS int[]),
              CAST(:servers AS timestamptz[]), CAST(:begans AS timestamptz[])) WITH ORDINALITY
       AS watched (xid, pid, server, began, number)
  LEFT JOIN pg_stat_activity AS activity ON activity.pid = watched.pid AND activity.backend_start < watched.began
 CROSS JOIN pg_stat_bgwriter AS crash
 WHERE activity.backend_xid IS DISTINCT FROM CAST(CAST(watched.xid AS xid8) AS xid)
   AND (activity.state = 'idle' OR activity.xact_start <> watched.began
        OR CASE WHEN pg_postmaster_start_time() = watched.server AND crash.stats_reset < watched.began
                THEN pg_xact_status(CAST(watched.xid AS xid8)) = 'committed' END)
""")
