"""Alembic's entry: runs on the connection it is handed (`service.inbox.schema`), never opens one."""

from alembic import context

from service.handlers.invoices import metadata as invoices
from service.inbox.model import metadata as ledger

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=[ledger, invoices],
    transactional_ddl=True,
)
context.run_migrations()
