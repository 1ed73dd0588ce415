"""Indexes for recovery: what waits by type and mode, what is processing, and what nobody has taken.

`stripe_events_due` stays for builds from before this revision.
"""

from firstclaim.migrations.locking import index_unless_large

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    index_unless_large(
        """
        CREATE INDEX IF NOT EXISTS stripe_events_waiting ON stripe_events (type, livemode, due_at)
         WHERE status IN ('pending', 'failed') AND abandoned = 0;
        CREATE INDEX IF NOT EXISTS stripe_events_waiting_abandoned ON stripe_events (type, livemode, due_at)
         WHERE status IN ('pending', 'failed') AND abandoned > 0;
        CREATE INDEX IF NOT EXISTS stripe_events_processing ON stripe_events (due_at)
         WHERE status = 'processing';
        CREATE INDEX IF NOT EXISTS stripe_events_give_up ON stripe_events (give_up_at)
         WHERE status IN ('pending', 'failed');
        """
    )
