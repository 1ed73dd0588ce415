"""Nothing: it made the table of the load test's handler, which `firstclaim.migrations.handler_tables` makes now."""

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Kept, because ledgers are at this revision."""
