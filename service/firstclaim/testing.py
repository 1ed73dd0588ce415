"""For tests of your handlers: events from the shipped templates, and a transaction that is never committed.

Guarantees: `deliver` calls a handler as the service does, with the same connection, context, rules and deadline. What
the handler writes can be read until the block of `transaction` ends, and is then rolled back. What it enqueues is in
`follow_ups`, and `run` calls a task for it. No ledger, no Redis and no signature are involved: what they guarantee is
tested in this project, not in yours.

The pytest fixtures of the same purpose are in `firstclaim.pytest_plugin`.
"""

import os
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from pydantic import SecretStr
from sqlalchemy import CursorResult, Executable
from sqlalchemy.orm import Session

from firstclaim.embedded.data_folder import servers
from firstclaim.errors import LedgerUnavailable
from firstclaim.event import Event
from firstclaim.follow_up import FollowUp
from firstclaim.loop_thread import LoopThread, entered, loop_thread
from firstclaim.migrations import schema
from firstclaim.postgres.epoch import Epoch
from firstclaim.postgres.handler_connections import HandlerConnections
from firstclaim.postgres.places import Places
from firstclaim.postgres.probe import Probe
from firstclaim.rolled_back import (
    POSTGRES_SECONDS,
    XID,
    BatchFunction,
    HandlerFunction,
    TaskFunction,
    Transaction,
)
from firstclaim.sending.make_event import make_event
from firstclaim.settings import Settings
from firstclaim.urls.postgres import postgres_dsn

__all__ = [
    "FollowUp",
    "SyncTransaction",
    "Transaction",
    "embedded_postgres",
    "make_event",
    "sync_transaction",
    "transaction",
]


@asynccontextmanager
async def transaction(database_url: str) -> AsyncIterator[Transaction]:
    """A transaction in this database while the block runs; nothing of it is committed.

    Raises `LedgerUnavailable` or what asyncpg raises if the database cannot be reached.
    """
    dsn = postgres_dsn(database_url)
    probe = Probe(dsn, timeout_seconds=POSTGRES_SECONDS)
    epoch = Epoch(fresh_seconds=0)
    connections = HandlerConnections(Places(dsn, probe, size=1, timeout_seconds=POSTGRES_SECONDS, epoch=epoch))
    try:
        connection = await connections.acquire()
    except BaseException:
        await probe.close()
        raise
    driver = connection.driver
    try:
        await driver.execute("BEGIN")
        xid = await driver.fetchval(XID)
        await connections.release(connection)
        yield Transaction(connections, driver, xid)
    finally:
        driver.retire()  # then the server rolls back
        await probe.close()


# -- the same for sync tests --------------------------------------------------------------------------


class SyncTransaction:
    """`Transaction` for sync tests. Async handlers run too, on the event loop of another thread."""

    def __init__(self, loop: LoopThread, work: Transaction) -> None:
        self._loop = loop
        self._transaction = work

    def deliver(
        self,
        handler: HandlerFunction,
        event: Event,
        *,
        attempt: int = 1,
        fresh: dict[str, Any] | None = None,
        deadline_seconds: float | None = None,
    ) -> str:
        """As `Transaction.deliver`."""
        return self._loop.run(
            self._transaction.deliver(handler, event, attempt=attempt, fresh=fresh, deadline_seconds=deadline_seconds)
        )

    def deliver_batch(
        self,
        handler: BatchFunction,
        events: Sequence[Event],
        *,
        attempt: int = 1,
        deadline_seconds: float | None = None,
    ) -> list[str]:
        """As `Transaction.deliver_batch`."""
        return self._loop.run(
            self._transaction.deliver_batch(handler, events, attempt=attempt, deadline_seconds=deadline_seconds)
        )

    @property
    def follow_ups(self) -> list[FollowUp]:
        """As `Transaction.follow_ups`."""
        return self._transaction.follow_ups

    def run(
        self,
        task: TaskFunction,
        follow_up: FollowUp | None = None,
        *,
        attempt: int = 1,
        deadline_seconds: float | None = None,
    ) -> str:
        """As `Transaction.run`."""
        return self._loop.run(
            self._transaction.run(task, follow_up, attempt=attempt, deadline_seconds=deadline_seconds)
        )

    def fetch(self, sql: str, *values: Any) -> list[Any]:
        """Run one statement on the driver and return its rows. Parameters are written `$1`, `$2`, ..."""
        return self._loop.run(self._transaction.fetch(sql, *values))

    def execute(self, statement: Executable, parameters: Any = None) -> CursorResult[Any]:
        """Run one SQLAlchemy statement, as `Context.execute` does. Its rows are buffered."""

        async def execute() -> CursorResult[Any]:
            async with self._transaction.connect() as connection:
                return await connection.execute(statement, parameters)

        return self._loop.run(execute())

    @contextmanager
    def session(self, **options: Any) -> Iterator[Session]:
        """A session of SQLAlchemy's ORM in the transaction while the block runs, as `Context.sync_session`."""
        run = self._loop.run
        with (
            entered(self._loop, self._transaction.use()) as connection,
            run(connection.sync_session(run, **options)) as session,
        ):
            yield session


@contextmanager
def sync_transaction(database_url: str) -> Iterator[SyncTransaction]:
    """As `transaction`, for sync tests."""
    with loop_thread() as loop, entered(loop, transaction(database_url)) as opened:
        yield SyncTransaction(loop, opened)


# -- a database ---------------------------------------------------------------------------------------


@contextmanager
def embedded_postgres() -> Iterator[str]:
    """The address of a PostgreSQL of this process's own while the block runs; it has firstclaim's tables.

    It takes some seconds to start: once per test session is enough. Needs the extra `firstclaim[embedded]`, else
    raises `ConfigurationError`.
    """
    with tempfile.TemporaryDirectory(prefix="firstclaim-test-", ignore_cleanup_errors=True) as folder:
        # Not from the environment, which may name a database that tests must not touch.
        settings = Settings.model_construct(
            data_dir=Path(os.path.realpath(folder)) / "data",
            redis_url=SecretStr("redis://127.0.0.1"),  # set, so that no Valkey is started
            stripe_webhook_secrets=(SecretStr("whsec_test"),),
        )
        with servers(settings) as ready, loop_thread() as loop:
            if ready.database_url is None:
                raise LedgerUnavailable("the embedded server has no address")
            url = ready.database_url.get_secret_value()
            loop.run(schema.migrate(postgres_dsn(url), POSTGRES_SECONDS))
            yield url
