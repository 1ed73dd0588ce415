"""A pool of connections for short pieces of work: claims, reads, state changes."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg

from firstclaim.errors import LedgerUnavailable
from firstclaim.postgres.connection import UNAVAILABLE, PinnedConnection, describe
from firstclaim.postgres.places import Places


class Pool:
    """Connections in `places`, opened as they are needed.

    SQLAlchemy's pool takes longer than a short statement, and asyncpg's resets a connection at each return; this one
    does neither. A connection that the server has ended is replaced once the driver has noticed; a statement sent a
    moment before that fails.
    """

    def __init__(self, places: Places) -> None:
        self._places = places
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
                # No await in between: else the driver cancels what the server does, and that may be the wait of a
                # COMMIT for the standby.
                connection.terminate()
                self._places.doubt()
                raise
            except asyncio.CancelledError:
                connection.retire()
                raise
            except asyncpg.PostgresError as error:
                self._places.note_error(connection, error)
                raise
            finally:
                self._put(connection)
        except UNAVAILABLE as error:
            raise LedgerUnavailable(describe(error)) from error

    def discard_free(self) -> None:
        """Close the free connections: one was lost, and the others may be lost without the driver having noticed."""
        for connection in self._free:
            connection.terminate()

    async def close(self) -> None:
        """Close the free connections, without waiting for a frozen server. One in use is closed when it returns."""
        self._closed = True
        free, self._free = self._free, []
        await asyncio.gather(*(connection.close() for connection in free))

    async def _get(self) -> PinnedConnection:
        await self._places.take()
        while self._free:
            connection = self._free.pop()
            if self._places.is_current(connection):
                return connection
            connection.retire()
            self._places.leave(connection)
            await self._places.take()
        return await self._places.open()

    def _put(self, connection: PinnedConnection) -> None:
        if not connection.is_closed() and (self._closed or connection.is_in_transaction()):
            connection.retire()
        if connection.is_closed():
            self._places.leave(connection)
        else:
            self._free.append(connection)
            self._places.release()
