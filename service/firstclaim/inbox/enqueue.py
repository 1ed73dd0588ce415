"""Writing follow-ups in the transaction of the handler that has enqueued them.

Guarantees: they are committed with the handler's effects and its completion mark, or not at all. One that exists
already is left alone, so a handler that runs again writes none twice.
"""

from collections.abc import Sequence

from firstclaim.follow_up import FollowUp
from firstclaim.inbox.claim import HandlerTransaction
from firstclaim.observability import tracing
from firstclaim.postgres.handler_connections import HandlerConnection
from firstclaim.postgres.statement import statement

# Write the follow-ups of a handler, after its own SQL and before the completion mark. If the transaction id differs,
# the handler has ended its transaction: then nothing is written, as nothing is marked. The row that they come from is
# locked by this transaction, and gives them what they share with it; one of several handlers gets its body too. One
# that exists was written by an earlier run of the same handler, and is left alone, whatever its status.
ENQUEUE = statement("""
WITH enqueued AS MATERIALIZED (
    SELECT f.*, greatest(now, coalesce(f.due_at, now + make_interval(secs => f.due_in))) AS due, now
      FROM unnest(
          CAST(:event_ids AS text[]), CAST(:parent_ids AS text[]), CAST(:types AS text[]), CAST(:bodies AS bytea[]),
          CAST(:due_ins AS float8[]), CAST(:due_ats AS timestamptz[])
      ) AS f (event_id, parent_id, type, body, due_in, due_at), clock_timestamp() AS now
     WHERE pg_current_xact_id()::text = :xid
), event AS (
    INSERT INTO firstclaim.stripe_events
           (event_id, parent_id, type, account, livemode, api_version, object_id, created_at, status,
            attempt, received_at, due_at, give_up_at, endpoint)
    SELECT f.event_id, f.parent_id, f.type, e.account, e.livemode, e.api_version, e.object_id, e.created_at, 'pending',
           0, f.now, f.due, f.due + make_interval(secs => :give_up_in), e.endpoint
      FROM enqueued f JOIN firstclaim.stripe_events e ON e.event_id = f.parent_id
     ORDER BY f.event_id COLLATE "C"
    ON CONFLICT (event_id) DO NOTHING
    RETURNING event_id
)
INSERT INTO firstclaim.stripe_event_payloads (event_id, body, traceparent)
SELECT event.event_id, coalesce(f.body, p.body), :traceparent
  FROM event JOIN enqueued f USING (event_id)
  LEFT JOIN firstclaim.stripe_event_payloads p ON p.event_id = f.parent_id AND f.body IS NULL
ON CONFLICT (event_id) DO NOTHING
""")


async def enqueue(
    connection: HandlerConnection,
    transaction: HandlerTransaction,
    follow_ups: Sequence[FollowUp],
    *,
    give_up_seconds: float,
) -> None:
    """Write `follow_ups` in `transaction`, and only there. Raises what asyncpg raises, and `LedgerUnavailable`."""
    await ENQUEUE.fetch(
        connection.driver,
        event_ids=[each.id for each in follow_ups],
        parent_ids=[each.parent_id for each in follow_ups],
        types=[each.type for each in follow_ups],
        bodies=[each.body for each in follow_ups],
        due_ins=[each.due_in_seconds for each in follow_ups],
        due_ats=[each.due_at for each in follow_ups],
        give_up_in=give_up_seconds,
        traceparent=tracing.traceparent(),
        xid=transaction.xid,
    )
