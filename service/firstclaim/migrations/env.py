"""Alembic's entry point. It runs on the connection that `firstclaim.migrations.schema` passes, and opens none."""

from alembic import context

from firstclaim.handlers.invoices import metadata as invoices
from firstclaim.handlers.load_probe import metadata as load_probe
from firstclaim.inbox.model import metadata as ledger

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=[ledger, invoices, load_probe],
    transactional_ddl=True,
)
context.run_migrations()
