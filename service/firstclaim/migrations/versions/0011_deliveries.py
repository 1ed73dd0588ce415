"""Headers of the delivery that recorded an event, and how often the event was delivered again.

The headers are beside the body: that row is written once. The duplicates are apart from the event's row, which a
handler may have locked. A build from before this revision writes neither.

The events, which 0012 changes in the same transaction, are locked before the payloads, as every insert does.
"""

from alembic import op

from firstclaim.migrations.locking import between_handlers

revision = "0011"
down_revision = "0010"


def upgrade() -> None:
    op.execute(
        """
        CREATE TABLE stripe_event_duplicates (
            event_id   text COLLATE "C" NOT NULL,
            duplicates bigint      NOT NULL,
            last_at    timestamptz NOT NULL,
            CONSTRAINT stripe_event_duplicates_pkey PRIMARY KEY (event_id)
        )
        """
    )
    between_handlers(
        """
        LOCK TABLE stripe_events IN ACCESS EXCLUSIVE MODE;
        ALTER TABLE stripe_event_payloads ADD COLUMN headers text;
        """
    )
