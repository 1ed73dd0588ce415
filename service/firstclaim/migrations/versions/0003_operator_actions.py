"""The audit of operators' changes: who, when, what, and on which events."""

from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.execute(
        """
        CREATE TABLE operator_actions (
            action_id  bigint GENERATED ALWAYS AS IDENTITY CONSTRAINT operator_actions_pkey PRIMARY KEY,
            at         timestamptz NOT NULL,
            operator   text        NOT NULL,
            action     text        NOT NULL,
            selection  text        NOT NULL,
            changed    bigint
        )
        """
    )
