"""The places of a pool: how many backends it has on the server at most, also while Postgres is stalled.

Guarantees: a place is free only when a server that answers no longer shows the backend that had it. A connection that
is terminated on our side may leave a backend that waits for a lock, for the standby, or is frozen: if its place were
free after some time, each timeout would add a backend to a server that is already in trouble. A connect keeps its place
until its result is known.

While commits hang, nobody waits for a place of a pool that commits: see `Probe`.
"""

import asyncio
from collections.abc import Mapping

import asyncpg

from firstclaim.errors import LedgerUnavailable
from firstclaim.postgres.connection import PinnedConnection, connect_unpinned, prepare
from firstclaim.postgres.epoch import Epoch
from firstclaim.postgres.probe import Probe
from firstclaim.schema_name import DEFAULT_SCHEMA

_HOPELESS = "Postgres is silent, or does not confirm commits"


class Places:
    """`size` places, and the connections that are opened in them.

    `timeout_seconds` is for connecting. `queue_seconds` is how long a caller waits for a place, by default as long:
    such a queue is no sign that Postgres is unreachable. `commits`: whether its callers commit; those that only read go
    on while commits hang, and what they do puts nothing in doubt. The others: see `open_connection`.
    """

    def __init__(
        self,
        dsn: str,
        probe: Probe,
        *,
        size: int,
        timeout_seconds: float,
        queue_seconds: float | None = None,
        epoch: Epoch,
        pins: Mapping[str, str] | None = None,
        schema: str = DEFAULT_SCHEMA,
        commits: bool = True,
    ) -> None:
        self._dsn = dsn
        self._probe = probe
        self._size = size
        self.timeout_seconds = timeout_seconds
        self._queue_seconds = timeout_seconds if queue_seconds is None else queue_seconds
        self.epoch = epoch
        self._pins = pins
        self._schema = schema
        self._commits = commits
        self._free = asyncio.Semaphore(size)
        self._left = 0  # places whose connection is closed, and whose backend may still be there
        self._waiting: set[asyncio.Timeout] = set()
        probe.add_listener(self._tell)

    async def take(self) -> None:
        """Take a place, until `release` or `leave`. Raises `LedgerUnavailable`, at once if waiting is hopeless."""
        if self._free.locked() or (self._commits and self._probe.doubted):
            await self._wait()
        else:
            await self._free.acquire()

    async def open(self) -> PinnedConnection:
        """Open a connection in a place that was taken; if that fails, the place is given up.

        Raises what `UNAVAILABLE` lists, and `LedgerUnavailable`.
        """
        try:
            connection = await connect_unpinned(self._dsn, self.timeout_seconds, self._schema)
        except (TimeoutError, asyncio.CancelledError) as error:  # given up by us: its backend may yet begin
            self._left += 1
            self._probe.leave_unnamed(self._left_is_gone)
            if isinstance(error, TimeoutError):
                self.doubt()
            raise
        except BaseException:  # refused, or ended by the server
            self.release()
            raise
        try:
            await prepare(connection, self.timeout_seconds, self.epoch, self._pins)
            self._probe.server_started_at = connection.server_started_at
        except BaseException as error:
            self.leave(connection)
            if isinstance(error, TimeoutError):
                self.doubt()
            raise
        return connection

    def is_current(self, connection: PinnedConnection) -> bool:
        """Whether the connection is open, to the server that took the last connection, and under the latest epoch.

        After a failover, those to the old server are silent, each for its timeout, or read-only. A server that
        restarted has closed the socket. The epoch that a connection has read goes into the markers of what it commits:
        after a rotation, markers of the old epoch would never count.
        """
        return (
            not connection.is_closed()
            and connection.server_started_at == self._probe.server_started_at
            and connection.epoch == self.epoch.latest
        )

    def note_error(self, connection: PinnedConnection, error: BaseException) -> None:
        """Note an error of one of our statements, after which the connection may have to be closed.

        A server that has become read-only is the primary no more: all connections to it are given up.
        """
        if isinstance(error, asyncpg.ReadOnlySQLTransactionError):
            if self._probe.server_started_at == connection.server_started_at:
                self._probe.server_started_at = None
            connection.terminate()

    def release(self) -> None:
        """The place is free: its connection is idle, or was never opened."""
        self._free.release()

    def leave(self, connection: PinnedConnection) -> None:
        """The connection is closed, whoever closed it: the place is free when its backend is known to be gone."""
        self._left += 1
        if connection.backend is None:  # a pooler bounds its backends itself
            self._left_is_gone()
        else:
            self._probe.leave(connection.backend, self._left_is_gone)

    def doubt(self) -> None:
        """The server was silent: it is doubtful whether commits are confirmed."""
        if self._commits:
            self._probe.doubt()

    def _left_is_gone(self) -> None:
        self._left -= 1
        self._free.release()

    @property
    def _is_hopeless(self) -> bool:
        """Whether commits hang, or no place can be free before the server answers."""
        return (self._commits and self._probe.commits_hang) or (self._left == self._size and self._probe.unreachable)

    def _tell(self) -> None:
        if self._is_hopeless:
            for limit in self._waiting:
                if not limit.expired():  # its caller gives up by itself, and has not had its turn yet
                    limit.reschedule(0)

    async def _wait(self) -> None:
        if self._is_hopeless:
            raise LedgerUnavailable(_HOPELESS)
        try:
            async with asyncio.timeout(self._queue_seconds) as limit:
                self._waiting.add(limit)
                try:
                    if self._commits:
                        await self._probe.resolved()
                    await self._free.acquire()
                finally:
                    self._waiting.discard(limit)
        except TimeoutError as error:
            raise LedgerUnavailable(_HOPELESS if self._is_hopeless else "no connection is free") from error
