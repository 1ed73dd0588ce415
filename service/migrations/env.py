"""Alembic's entry: runs on the connection it is handed (`service.inbox.schema`), never opens one."""

from alembic import context

from service.handlers.invoices import metadata as invoices
from service.handlers.load_probe import metadata as load_probe
from service.inbox.model import metadata as ledger

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=[ledger, invoices, load_probe],
    transactional_ddl=True,
)
context.run_migrations()
