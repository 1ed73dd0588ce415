"""Two indexes for whoever looks through the ledger by time: the page, the lists."""

from alembic import op
from sqlalchemy import text

from firstclaim.migrations.moments import between_handlers

revision = "0005"
down_revision = "0004"

_LARGE_BYTES = 64 * 1024 * 1024


def upgrade() -> None:
    # An index is made in a moment where there are few events, as in every ledger that begins with this version. Where
    # there are many, making it would lock out every delivery for as long as it takes, and CONCURRENTLY, which does
    # not, can stand in no transaction: there it is left to the operator (see the README), for nothing but the page's
    # speed rests on it.
    if op.get_bind().scalar(text("SELECT pg_relation_size('stripe_events')")) > _LARGE_BYTES:
        return
    between_handlers(
        """
        CREATE INDEX IF NOT EXISTS stripe_events_received ON stripe_events (received_at, event_id);
        CREATE INDEX IF NOT EXISTS stripe_events_unsuccessful ON stripe_events (received_at, event_id)
         WHERE status IN ('failed', 'dead');
        """
    )
