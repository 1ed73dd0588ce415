"""The name of the endpoint that first received an event; null for the endpoint without a name.

In the event's row, not beside the body: the body expires, and the name is what one filters by. A build from before this
revision writes null. A null takes no space.
"""

from firstclaim.migrations.locking import between_handlers

revision = "0012"
down_revision = "0011"


def upgrade() -> None:
    between_handlers("ALTER TABLE stripe_events ADD COLUMN endpoint text;")
