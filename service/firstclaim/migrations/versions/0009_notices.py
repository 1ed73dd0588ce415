"""Notices to operators, gathered and not sent yet; and an index by which dead events are found.

A build from before this revision writes neither. The events that it makes dead are found all the same.
"""

from alembic import op

from firstclaim.migrations.locking import index_unless_large

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    op.execute(
        """
        CREATE TABLE operator_notices (
            topic     text        NOT NULL,
            subject   text COLLATE "C" NOT NULL,
            events    bigint      NOT NULL DEFAULT '0',
            first_at  timestamptz,
            last_at   timestamptz,
            detail    jsonb       NOT NULL,
            notice_id uuid,
            content   jsonb,
            tries     integer     NOT NULL DEFAULT 0,
            due_at    timestamptz NOT NULL,
            CONSTRAINT operator_notices_pkey PRIMARY KEY (topic, subject),
            CONSTRAINT operator_notices_composed_check CHECK ((notice_id IS NULL) = (content IS NULL))
        )
        """
    )
    index_unless_large(
        """
        CREATE INDEX IF NOT EXISTS stripe_event_attempts_final ON stripe_event_attempts (ended_at)
         WHERE outcome IN ('dead', 'abandoned');
        """,
        table="stripe_event_attempts",
    )
