"""Changes of a table that running services write to."""

from alembic import op

_ATTEMPTS = 300  # of about half a second each: longer than any handler's deadline


def between_handlers(changes: str) -> None:
    """Run `changes`, short DDL statements on `stripe_events`, while no handler is in a transaction.

    They need a lock. If they waited for it until the longest handler has ended, every delivery would wait behind
    them. So each attempt waits only 200 ms for the lock, and is repeated.
    """
    op.execute(
        f"""
        DO $$
        BEGIN
            PERFORM set_config('lock_timeout', '200ms', true);
            FOR attempt IN 1..{_ATTEMPTS} LOOP
                BEGIN
                    {changes}
                    PERFORM set_config('lock_timeout', '0', true);
                    RETURN;
                EXCEPTION WHEN lock_not_available THEN
                    PERFORM pg_sleep(0.2 + random() / 5);
                END;
            END LOOP;
            RAISE lock_not_available USING MESSAGE = 'handlers held stripe_events at every attempt to lock it';
        END
        $$
        """
    )
