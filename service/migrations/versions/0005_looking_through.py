"""Two indexes for whoever looks through the ledger by time: the page, the lists."""

from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    # An index is made in a moment where there are few events, as in every ledger that begins with this version. Where
    # there are many, making it would lock out every delivery for as long as it takes, and CONCURRENTLY, which does
    # not, can stand in no transaction: there it is left to the operator (see the README), for nothing but the page's
    # speed rests on it. Whatever is made here waits for handlers as 0004 does, so that no delivery waits behind it.
    op.execute(
        """
        DO $$
        BEGIN
            IF pg_relation_size('stripe_events') > 64 * 1024 * 1024 THEN
                RETURN;
            END IF;
            PERFORM set_config('lock_timeout', '200ms', true);
            FOR round IN 1..300 LOOP
                BEGIN
                    CREATE INDEX IF NOT EXISTS stripe_events_received ON stripe_events (received_at, event_id);
                    CREATE INDEX IF NOT EXISTS stripe_events_unsuccessful ON stripe_events (received_at, event_id)
                     WHERE status IN ('failed', 'dead');
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
