"""The types of events whose dispatch an operator has paused. A build from before this revision does not read it."""

from alembic import op

revision = "0013"
down_revision = "0012"


def upgrade() -> None:
    op.execute(
        """
        CREATE TABLE operator_pauses (
            pattern   text COLLATE "C" NOT NULL,
            operator  text        NOT NULL,
            paused_at timestamptz NOT NULL,
            CONSTRAINT operator_pauses_pkey PRIMARY KEY (pattern)
        )
        """
    )
