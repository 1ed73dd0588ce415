"""Two indexes for searches of the ledger by time: the admin page and the lists."""

from firstclaim.migrations.locking import index_unless_large

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    index_unless_large(
        """
        CREATE INDEX IF NOT EXISTS stripe_events_received ON stripe_events (received_at, event_id);
        CREATE INDEX IF NOT EXISTS stripe_events_unsuccessful ON stripe_events (received_at, event_id)
         WHERE status IN ('failed', 'dead');
        """
    )
