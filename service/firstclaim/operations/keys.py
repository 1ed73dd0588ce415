"""Whether an event of the same key is being handled now, in whichever process.

Guarantees: it looks at the locks of Postgres and takes none, so it keeps no handler waiting.
"""

from firstclaim.handler_options import Key, key_of, lock_number
from firstclaim.inbox.task_event import parse_row
from firstclaim.operations.queries import EventRow
from firstclaim.operations.search import LedgerSearch
from firstclaim.postgres.statement import statement

# The two halves of the number, as the server shows them; 1: it is one number of 64 bits, and not two of 32.
_IS_HELD = statement("""
SELECT EXISTS (
       SELECT FROM pg_locks
        WHERE locktype = 'advisory' AND granted AND objsubid = 1
          AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
          AND classid::bigint = (CAST(:number AS bigint) >> 32) & 4294967295
          AND objid::bigint = CAST(:number AS bigint) & 4294967295) AS held
""")


async def key_is_held(ledger: LedgerSearch, event: EventRow, key: Key) -> bool | None:
    """Whether an event of the same key is being handled; None: this event has no key, or it cannot be read.

    `key`: of the event's handler. Its value comes from the payload, and is not returned.
    """
    if (body := await ledger.payload(event.event_id)) is None:
        return None
    try:
        value = key_of(key, parse_row(event.event_id, event.type, body, event.endpoint))
    except Exception:  # noqa: BLE001  (a user's function may raise anything; the timeline has the failure)
        return None
    if value is None:
        return None
    [row] = await ledger.fetch(_IS_HELD, number=lock_number(ledger.schema, value))
    return bool(row["held"])
