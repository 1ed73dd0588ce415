"""A pool of connections for short pieces of work: claims, reads, state changes."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, nullcontext
from functools import partial

from firstclaim.errors import LedgerUnavailable
from firstclaim.postgres.connection import UNAVAILABLE, PinnedConnection, describe, is_current, open_connection
from firstclaim.postgres.epoch import Epoch
from firstclaim.schema_name import DEFAULT_SCHEMA


class Pool:
    """At most `size` connections, opened as they are needed.

    SQLAlchemy's pool takes longer than a short statement, and asyncpg's resets a connection at each return; this one
    does neither. A connection that the server has ended is replaced once the driver has noticed; a statement sent a
    moment before that fails.

    `timeout_seconds` is for connecting. `queue_seconds` is how long a caller waits for a connection that is in use:
    such a queue is no sign that Postgres is unreachable. `pins`, `schema`: see `open_connection`.
    """

    def __init__(
        self,
        dsn: str,
        *,
        size: int,
        timeout_seconds: float,
        queue_seconds: float,
        epoch: Epoch,
        pins: Mapping[str, str] | None = None,
        schema: str = DEFAULT_SCHEMA,
    ) -> None:
        self._open = partial(open_connection, dsn, timeout_seconds, epoch, pins, schema)
        self._queue_seconds = queue_seconds
        self._epoch = epoch
        self._capacity = asyncio.Semaphore(size)
        self._free: list[PinnedConnection] = []
        self._closed = False

    @asynccontextmanager
    async def acquire(self, timeout_seconds: float) -> AsyncIterator[PinnedConnection]:
        """A connection for one piece of work, which may take `timeout_seconds`.

        Raises `LedgerUnavailable` for each error of Postgres, the network and the queue. It does not repeat their
        messages, which may hold a value.
        """
        try:
            connection = await self._get()
            try:
                async with asyncio.timeout(timeout_seconds):
                    yield connection
            except TimeoutError:
                connection.terminate()
                raise
            except asyncio.CancelledError:
                connection.retire()
                raise
            finally:
                self._put(connection)
        except UNAVAILABLE as error:
            raise LedgerUnavailable(describe(error)) from error

    def discard_free(self) -> None:
        """Close the free connections: one was lost, and the others may be lost without the driver having noticed."""
        while self._free:
            self._free.pop().terminate()

    async def close(self) -> None:
        """Close the free connections, without waiting for a frozen server. One in use is closed when it returns."""
        self._closed = True
        free, self._free = self._free, []
        await asyncio.gather(*(connection.close() for connection in free))

    async def _get(self) -> PinnedConnection:
        async with asyncio.timeout(self._queue_seconds) if self._capacity.locked() else nullcontext():
            await self._capacity.acquire()
        try:
            while self._free:
                connection = self._free.pop()
                if is_current(connection, self._epoch):
                    return connection
                connection.retire()
            return await self._open()
        except BaseException:
            self._capacity.release()
            raise

    def _put(self, connection: PinnedConnection) -> None:
        if not connection.is_closed():
            if self._closed or connection.is_in_transaction():
                connection.retire()
            else:
                self._free.append(connection)
        self._capacity.release()
