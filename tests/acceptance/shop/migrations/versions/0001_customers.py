"""Customers, and what they have paid for. The revision has the number that firstclaim's first one has, too."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table("customers", sa.Column("id", sa.Text, primary_key=True), sa.Column("email", sa.Text, nullable=True))
    op.create_table(
        "access",
        sa.Column("invoice", sa.Text, primary_key=True),
        sa.Column("customer_id", sa.Text, sa.ForeignKey("customers.id"), nullable=False),
    )


def downgrade() -> None:
    op.drop_table("access")
    op.drop_table("customers")
