"""Alembic's entry point. It runs on the connection that `firstclaim.migrations.schema` passes, and opens none."""

from alembic import context

from firstclaim.inbox.model import metadata
from firstclaim.migrations.adoption import VERSION_TABLE

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    transactional_ddl=True,
    version_table=VERSION_TABLE,
)
context.run_migrations()
