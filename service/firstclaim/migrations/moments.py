"""Changing a table that live services write to."""

from alembic import op

_TRIES = 300  # of some half a second: longer than any handler's deadline


def between_handlers(changes: str) -> None:
    """Run `changes`, statements of DDL on `stripe_events` that take a moment, when no handler is in its transaction.

    Waiting for the lock they need would have every delivery wait behind it, until the longest handler has ended. So
    it is waited for only a moment at a time, again and again.
    """
    op.execute(
        f"""
        DO $$
        BEGIN
            PERFORM set_config('lock_timeout', '200ms', true);
            FOR try IN 1..{_TRIES} LOOP
                BEGIN
                    {changes}
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
