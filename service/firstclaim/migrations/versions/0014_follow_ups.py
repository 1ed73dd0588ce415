"""Follow-ups: rows that handlers write, for tasks and for one of several handlers of an event.

They are rows of the same table, whose types no event of Stripe's has (`task:...`, `handler:...`). A build from before
this revision has no handler for these types and leaves them alone, unless it has a handler for `*`.
"""

from firstclaim.migrations.locking import between_handlers, index_unless_large

revision = "0014"
down_revision = "0013"


def upgrade() -> None:
    between_handlers('ALTER TABLE stripe_events ADD COLUMN parent_id text COLLATE "C";')
    index_unless_large(
        "CREATE INDEX IF NOT EXISTS stripe_events_parent ON stripe_events (parent_id) WHERE parent_id IS NOT NULL;"
    )
