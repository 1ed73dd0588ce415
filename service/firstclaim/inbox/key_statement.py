"""The statements of events with a key: one locks an event's row and its key, one reads which of them still wait."""

from firstclaim.inbox.statements import HOLD
from firstclaim.postgres.statement import Statement, statement

# `HOLD` for an event with a key: if its row is held, also try the advisory lock of the key, for this transaction. It
# is tried and not waited for, because a wait would occupy the slot and the connection; `has_key` says whether we have
# it. It ends with the transaction, after the effects are visible, however the transaction ends. MATERIALIZED: a claim
# that was taken over must not take the lock.
HOLD_FOR_KEY = Statement(
    f"""
WITH held AS MATERIALIZED ({HOLD.sql})
SELECT held.*, pg_try_advisory_xact_lock(CAST(${len(HOLD.names) + 1} AS bigint)) AS has_key FROM held
""",
    (*HOLD.names, "key"),
)

# Of events whose key is free now, those that may be tried: at once if they wait for nothing else, which then is for
# `:seconds` at most. What has failed meanwhile, in another process, waits for its backoff, like any other event.
READY = statement("""
SELECT event_id, type FROM firstclaim.stripe_events
 WHERE event_id = ANY(:event_ids) AND status || '' IN ('pending', 'failed')
   AND due_at <= clock_timestamp() + make_interval(secs => CASE status WHEN 'pending' THEN :seconds ELSE 0 END)
""")
