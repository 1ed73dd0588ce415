"""When each payload was recorded, and an index of it: pruning finds the oldest without looking at the others.

The default is added after the column, so that no row is rewritten: the payloads that there are have null, and are
pruned by id. A build from before this revision does not name the column, and its rows get the default, too.
"""

from firstclaim.migrations.locking import between_handlers, index_unless_large

revision = "0015"
down_revision = "0014"


def upgrade() -> None:
    between_handlers(
        """
        LOCK TABLE stripe_events IN ACCESS EXCLUSIVE MODE;
        ALTER TABLE stripe_event_payloads ADD COLUMN received_at timestamptz;
        ALTER TABLE stripe_event_payloads ALTER COLUMN received_at SET DEFAULT clock_timestamp();
        """
    )
    index_unless_large(
        """
        CREATE INDEX IF NOT EXISTS stripe_event_payloads_received ON stripe_event_payloads (received_at, event_id);
        """,
        table="stripe_event_payloads",
    )
