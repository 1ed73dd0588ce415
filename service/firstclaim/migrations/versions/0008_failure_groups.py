"""What an attempt failed of: the handler, the class of the error, the place in the user's code, and the group of these.

The columns are null where a build from before this revision writes a row, and of rows from before.

The payloads and the events, which 0010 to 0012 change in the same transaction, are locked together with the attempts:
while a lock on the attempts is held, no attempt that fails is recorded, so nothing may be waited for then.
"""

from firstclaim.migrations.locking import between_handlers, index_unless_large

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    between_handlers(
        """
        LOCK TABLE stripe_events, stripe_event_payloads IN ACCESS EXCLUSIVE MODE;
        ALTER TABLE stripe_event_attempts
          ADD COLUMN failure_group text COLLATE "C", ADD COLUMN handler text,
          ADD COLUMN error_class text, ADD COLUMN place text;
        """
    )
    index_unless_large(
        """
        CREATE INDEX IF NOT EXISTS stripe_event_attempts_group ON stripe_event_attempts (failure_group, ended_at)
         WHERE failure_group IS NOT NULL;
        """,
        table="stripe_event_attempts",
    )
