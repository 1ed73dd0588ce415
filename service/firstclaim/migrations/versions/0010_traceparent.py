"""The trace of the delivery that recorded an event, for recovery's spans to link to.

Beside the body: its row is written once, where that of the event is written again with each change of its state. Null
where a delivery is not traced: this takes no space.

The events, which 0012 changes in the same transaction, are locked first, as every insert does: while a lock on the
payloads is held, no event is recorded, so nothing may be waited for then.
"""

from firstclaim.migrations.locking import between_handlers

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    between_handlers(
        """
        LOCK TABLE stripe_events IN ACCESS EXCLUSIVE MODE;
        ALTER TABLE stripe_event_payloads ADD COLUMN traceparent text;
        """
    )
