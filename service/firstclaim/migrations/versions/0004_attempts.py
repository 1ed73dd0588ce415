"""The process and the time of each claim, and a row for each attempt that did not succeed."""

from alembic import op

from firstclaim.migrations.locking import between_handlers

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.execute(
        """
        CREATE TABLE stripe_event_attempts (
            event_id text COLLATE "C" NOT NULL,
            attempt  integer     NOT NULL,
            outcome  text        NOT NULL,
            process  text,
            began_at timestamptz,
            ended_at timestamptz NOT NULL,
            error    text        NOT NULL,
            CONSTRAINT stripe_event_attempts_pkey PRIMARY KEY (event_id, attempt, outcome),
            CONSTRAINT stripe_event_attempts_outcome_check CHECK (outcome IN ('failed', 'dead', 'abandoned'))
        )
        """
    )
    between_handlers("ALTER TABLE stripe_events ADD COLUMN claimed_at timestamptz, ADD COLUMN claimed_by text;")
