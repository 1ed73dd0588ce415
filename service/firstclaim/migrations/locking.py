"""Changes of a table that running services write to.

Alembic is imported by what runs in a revision: the rest is imported by every process, and needs none of it.
"""

from sqlalchemy import text

# For one statement that runs while no handler is in a transaction. Waiting for a lock until the longest handler has
# ended, it would let every delivery wait behind it. So each attempt waits only 200 ms for the lock, and is repeated.
_BETWEEN_HANDLERS = """
DO $$
BEGIN
    PERFORM set_config('lock_timeout', '200ms', true);
    FOR attempt IN 1..{attempts} LOOP
        BEGIN
            {changes}
            PERFORM set_config('lock_timeout', '0', true);
            RETURN;
        EXCEPTION WHEN lock_not_available THEN
            PERFORM pg_sleep(0.2 + random() / 5);
        END;
    END LOOP;
    RAISE lock_not_available USING MESSAGE = 'a table of the ledger was locked by others at every attempt';
END
$$
"""
_LARGE_BYTES = 64 * 1024 * 1024
_ATTEMPTS = 300  # of about half a second each: longer than any handler's deadline


def attempted_between_handlers(changes: str) -> str:
    """The statement that runs `changes`, short DDL statements, while no handler is in a transaction."""
    return _BETWEEN_HANDLERS.format(attempts=_ATTEMPTS, changes=changes)


def between_handlers(changes: str) -> None:
    """Run `changes`, short DDL statements on a table of the ledger, in a revision, while nobody holds it for long."""
    from alembic import op

    op.execute(attempted_between_handlers(changes))


def index_unless_large(indexes: str, table: str = "stripe_events") -> None:
    """Create indexes on `table` if it is small, as it is in every ledger that begins with their revision.

    On many events every delivery would wait until an index is made. CONCURRENTLY does not block deliveries, but cannot
    run in a transaction. So on a large ledger they are left to the operator, with the statements in
    docs/how-to/large-ledger.md.

    The events are locked first, whatever table the indexes are on, because 0012 changes them in the same transaction:
    a handler would wait for the index's lock with its completion mark, and the migration for that handler.
    """
    from alembic import op

    if op.get_bind().scalar(text("SELECT pg_relation_size(CAST(:t AS regclass))"), {"t": table}) <= _LARGE_BYTES:
        between_handlers("LOCK TABLE stripe_events IN ACCESS EXCLUSIVE MODE;" + indexes)
