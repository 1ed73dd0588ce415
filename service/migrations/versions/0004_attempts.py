"""Who claimed an event and when, and a row for each attempt that did not succeed."""

from alembic import op

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
    # It takes a moment, but would wait for every handler that is running, and every delivery would wait behind it.
    op.execute(
        """
        DO $$
        BEGIN
            PERFORM set_config('lock_timeout', '200ms', true);
            FOR round IN 1..300 LOOP
                BEGIN
                    ALTER TABLE stripe_events ADD COLUMN claimed_at timestamptz, ADD COLUMN claimed_by text;
                    PERFORM set_config('lock_timeout', '0', true);
                    RETURN;
                EXCEPTION WHEN lock_not_available THEN
                    PERFORM pg_sleep(0.2 + random() / 5);
                END;
            END LOOP;
            RAISE lock_not_available USING MESSAGE = 'no moment was found between the handlers on stripe_events';
        END
        $$
        """
    )
