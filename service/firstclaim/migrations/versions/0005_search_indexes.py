"""Two indexes for searches of the ledger by time: the admin page and the lists."""

from alembic import op
from sqlalchemy import text

from firstclaim.migrations.locking import between_handlers

revision = "0005"
down_revision = "0004"

_LARGE_BYTES = 64 * 1024 * 1024


def upgrade() -> None:
    # On few events an index takes a moment, as in every ledger that begins with this version. On many events every
    # delivery would wait until it is made. CONCURRENTLY does not block deliveries, but cannot run in a transaction. So
    # a large ledger is left to the operator (see the README): only the speed of the page depends on these indexes.
    if op.get_bind().scalar(text("SELECT pg_relation_size('stripe_events')")) > _LARGE_BYTES:
        return
    between_handlers(
        """
        CREATE INDEX IF NOT EXISTS stripe_events_received ON stripe_events (received_at, event_id);
        CREATE INDEX IF NOT EXISTS stripe_events_unsuccessful ON stripe_events (received_at, event_id)
         WHERE status IN ('failed', 'dead');
        """
    )
