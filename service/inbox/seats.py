"""The pooled connections that handlers work on, kept between events.

Guarantees: one handler at a time has a connection, and gets it in no transaction and under the ledger's latest epoch.
SQLAlchemy's way out of its pool and back took longer than a transaction's own two statements; so the pool's connection
stays here. The object around it is each handler's own, and what a handler sets on that ends with it.
"""

from typing import Any

from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from sqlalchemy.pool import PoolProxiedConnection

from service.inbox.postgres import Epoch, discard, driver, is_current


class Seats:
    """The free connections of one pool."""

    def __init__(self, engine: AsyncEngine, epoch: Epoch) -> None:
        self._engine = engine
        self._epoch = epoch
        self._free: list[PoolProxiedConnection] = []

    async def take(self) -> AsyncConnection:
        """A connection in no transaction, given up by `give_back` or `discard`; raises what `UNAVAILABLE` lists."""
        while self._free:
            connection = self._around(self._free.pop())
            if is_current(driver(connection), self._epoch):
                return connection
            await discard(connection)
        return await self._engine.connect()

    async def give_back(self, connection: AsyncConnection) -> None:
        """For the next one to take; or closed, if this one left anything on it."""
        sync = connection.sync_connection
        if sync is None or sync.closed or sync.invalidated:
            return
        if driver(connection).handling is not None or "isolation_level" in sync.get_execution_options():
            await connection.close()
            return
        pooled: Any = sync.connection
        pooled._counter += 1  # noqa: SLF001  (SQLAlchemy counts its users: now the close below leaves it with us)
        sync.close()
        self._free.append(pooled)

    async def close(self) -> None:
        """Give all of them back to the pool."""
        while self._free:
            await self._around(self._free.pop()).close()

    def _around(self, pooled: PoolProxiedConnection) -> AsyncConnection:
        engine = self._engine
        return AsyncConnection(engine, sync_connection=Connection(engine.sync_engine, connection=pooled))
