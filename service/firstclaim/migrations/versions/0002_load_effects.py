"""The table of the load test's handler: append-only, without a constraint that could hide a duplicate effect."""

from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.execute(
        """
        CREATE TABLE load_effects (
            event_id    text COLLATE "C" NOT NULL,
            attempt     integer     NOT NULL,
            xid         text        NOT NULL,
            recorded_at timestamptz NOT NULL
        )
        """
    )
