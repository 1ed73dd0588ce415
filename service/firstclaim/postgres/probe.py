"""What a silent Postgres means: whether it confirms commits, and which of our backends it still has.

Guarantees: one connection of the process asks, and only while there is something to ask. While commits hang (the
synchronous standby is gone, a disk stalls) it waits in a COMMIT of its own, and all others fail at once. Without it,
every caller would wait for its own timeout, and leave a backend that waits in the server.

Nothing that waits for the standby is ended: its row would be visible without being replicated. The probe itself is
replaced only if it is silent and a server that answers shows that it does not wait for the standby. A backend that was
left is ended only if it is idle, that is, if the server has not noticed that its client is gone. After a failover,
another server is asked, on which the pid may be somebody else's: the start must agree, or our name if it is not known.

A server that takes no connections is tried again after a moment. One that is silent gets twice the time at each try,
up to `_MAX_PATIENCE_SECONDS`: a frozen server answers the try that waits, and each that was given up is one more
backend that it starts when it goes on.
"""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime

import asyncpg
import structlog

from firstclaim.postgres.connection import Backend, PinnedConnection, connect_unpinned, describe, pin

log = structlog.get_logger(__name__)

# Others wait this long for the probe: a single frozen backend is distinguished from a stall in a hundredth of that.
_LATE_SECONDS = 0.25
_FIRST_PAUSE_SECONDS = 0.01
_MAX_PAUSE_SECONDS = 10.0
_REFUSED_PAUSE_SECONDS = 0.25
_MAX_PATIENCE_SECONDS = 30.0
_IDLE_SECONDS = 1.0  # a backend whose client is gone notices it far earlier, unless the network hides it

# Like a read that an answer rests on: its COMMIT waits for the standby.
_COMMIT = "SELECT pg_logical_emit_message(true, 'firstclaim', '')"
_LOOK = """
SELECT left_behind.number, activity.wait_event = 'SyncRep' AS waits_for_standby,
       CASE WHEN left_behind.is_late AND activity.state LIKE 'idle%' THEN pg_terminate_backend(activity.pid) END
  FROM unnest($1::int[], $2::timestamptz[], $3::bool[]) WITH ORDINALITY
       AS left_behind (pid, started_at, is_late, number)
  JOIN pg_stat_activity AS activity
    ON activity.pid = left_behind.pid
   AND CASE WHEN left_behind.started_at IS NULL THEN activity.application_name = current_setting('application_name')
            ELSE activity.backend_start = left_behind.started_at END
"""


@dataclass(frozen=True, slots=True)
class _Left:
    """A backend whose connection is closed; `on_gone` is called once it is known to be gone."""

    backend: Backend
    on_gone: Callable[[], None]
    at: float


class Probe:
    """The probe of one process, for all its pools. `timeout_seconds`: for connecting, and for a look."""

    def __init__(self, dsn: str, *, timeout_seconds: float) -> None:
        self._dsn = dsn
        self._timeout_seconds = timeout_seconds
        self._patience_seconds = timeout_seconds  # for connecting
        self._commit_patience_seconds = timeout_seconds
        self._pause_seconds = _FIRST_PAUSE_SECONDS
        self._left: list[_Left] = []
        self._unnamed: list[Callable[[], None]] = []
        self._listeners: list[Callable[[], None]] = []
        self._resolved = asyncio.Event()
        self._resolved.set()
        self._wake = asyncio.Event()
        self._commit: asyncio.Task[None] | None = None
        self._connection: PinnedConnection | None = None  # on which the commit waits
        self._began_at = 0.0
        self._late: asyncio.TimerHandle | None = None
        self._asking: asyncio.Task[None] | None = None
        self._closed = False
        self.unreachable = False
        self.commits_hang = False
        self.server_started_at: datetime | None = None  # of the server that took the last connection

    def add_listener(self, listener: Callable[[], None]) -> None:
        """`listener` is called when commits are found to hang, or the server is found to be unreachable."""
        self._listeners.append(listener)

    @property
    def doubted(self) -> bool:
        """Whether it is being asked if commits are confirmed."""
        return not self._resolved.is_set()

    async def resolved(self) -> None:
        """Wait until commits are confirmed."""
        await self._resolved.wait()

    def doubt(self) -> None:
        """The server was silent for as long as it may be."""
        if self._resolved.is_set() and not self._closed:
            self._resolved.clear()
            self._late = asyncio.get_running_loop().call_later(_LATE_SECONDS, self._note_hang)
            self._ask_soon()

    def leave(self, backend: Backend, on_gone: Callable[[], None]) -> None:
        """The connection to `backend` is closed: call `on_gone` when a server that answers no longer shows it."""
        self._left.append(_Left(backend, on_gone, time.monotonic()))
        self._ask_soon()

    def leave_unnamed(self, on_gone: Callable[[], None]) -> None:
        """A connect was given up: call `on_gone` when a connection that was begun later is answered.

        The server takes connections in their order. What it has begun for ours ends when it finds it closed.
        """
        self._unnamed.append(on_gone)
        self._ask_soon()

    async def close(self) -> None:
        """Ask no more."""
        self._closed = True
        if self._late is not None:
            self._late.cancel()
        for task in (self._asking, self._commit):
            if task is not None:
                task.cancel()
                await asyncio.wait({task})

    def _ask_soon(self) -> None:
        self._pause_seconds = _FIRST_PAUSE_SECONDS
        self._wake.set()
        if not self._closed and (self._asking is None or self._asking.done()):
            self._asking = asyncio.create_task(self._ask_all(), name="probe")

    async def _ask_all(self) -> None:
        """Ask until nothing is left to ask."""
        while self._left or self._unnamed or self.doubted:
            self._wake.clear()
            try:
                await self._ask()
            except asyncpg.TooManyConnectionsError:  # it answers: whether commits do, callers find out by themselves
                self._resolve()
                pause = _REFUSED_PAUSE_SECONDS
            except Exception as error:  # noqa: BLE001  (nothing else would free the places)
                pause = self._note_unreachable(error)
            else:
                pause, self._pause_seconds = self._pause_seconds, min(2 * self._pause_seconds, _MAX_PAUSE_SECONDS)
            await self._sleep(pause)

    async def _ask(self) -> None:
        unnamed = len(self._unnamed)
        connection = await connect_unpinned(self._dsn, self._patience_seconds)
        try:
            async with asyncio.timeout(self._timeout_seconds):
                waiting = await self._look(connection)
                self.unreachable, self._patience_seconds = False, self._timeout_seconds
                for on_gone in self._unnamed[:unnamed]:
                    on_gone()
                del self._unnamed[:unnamed]
                if begins := self.doubted and not self._waits(waiting):
                    await pin(connection)
                    self.server_started_at = connection.server_started_at
        except BaseException:
            connection.terminate()
            self._leave_own(connection)
            raise
        if begins:
            self._begin(connection)
        else:
            connection.terminate()

    async def _look(self, connection: PinnedConnection) -> set[Backend]:
        """Free the places of backends that are gone; returns those that wait for the standby."""
        left = list(self._left)
        backends = [each.backend for each in left]
        late_at = time.monotonic() - _IDLE_SECONDS
        is_late = [each.at < late_at for each in left]
        if self._connection is not None and self._connection.backend is not None:
            backends.append(self._connection.backend)
            is_late.append(False)
        pids, starts = [each.pid for each in backends], [each.started_at for each in backends]
        rows = await connection.fetch(_LOOK, pids, starts, is_late)
        shown = {backends[row["number"] - 1]: row["waits_for_standby"] for row in rows}
        for each in left:
            if each.backend not in shown:
                self._left.remove(each)
                each.on_gone()
        return {backend for backend, waits in shown.items() if waits}

    def _waits(self, waiting: set[Backend]) -> bool:
        """Whether the probe is to be waited for: it waits for the standby, or has not been silent for long."""
        if self._connection is None:
            return False
        is_late = time.monotonic() - self._began_at > self._commit_patience_seconds
        return self._connection.backend in waiting or not is_late

    def _begin(self, connection: PinnedConnection) -> None:
        """Send the commit that all others wait for; a silent one is replaced."""
        if (silent := self._connection) is not None:
            self._commit_patience_seconds = min(2 * self._commit_patience_seconds, _MAX_PATIENCE_SECONDS)
            silent.terminate()
            self._leave_own(silent)
        self._connection = connection
        self._began_at = time.monotonic()
        self._commit = asyncio.create_task(self._run_commit(connection), name="probe_commit")

    async def _run_commit(self, connection: PinnedConnection) -> None:
        try:
            warnings = connection.warnings
            await connection.execute(_COMMIT)
            confirmed = connection.warnings == warnings  # with one, its wait for the standby was cancelled
        except Exception:  # noqa: BLE001  (lost, or replaced)
            confirmed = False
        finally:
            connection.terminate()
            if self._connection is connection:
                self._connection = None
                self._wake.set()
        if confirmed:
            self._resolve()

    def _resolve(self) -> None:
        if self._late is not None:
            self._late.cancel()
        if self.commits_hang:
            log.info("commits_confirmed")
        self.commits_hang = False
        self._commit_patience_seconds = self._timeout_seconds
        self._pause_seconds = _FIRST_PAUSE_SECONDS
        self._resolved.set()

    def _leave_own(self, connection: PinnedConnection) -> None:
        """It has no place; it is looked at until it is gone all the same, to end it if it is idle."""
        if connection.backend is not None:
            self._left.append(_Left(connection.backend, lambda: None, time.monotonic()))

    def _note_hang(self) -> None:
        """Commits hang, or whether they do cannot be asked: nobody waits any longer."""
        if not self.commits_hang:
            log.warning("commits_hang")
            self.commits_hang = True
            self._tell()

    def _note_unreachable(self, error: Exception) -> float:
        """The server takes no connection, or is silent; returns how long to wait before the next try."""
        log.debug("postgres_unreachable", error=describe(error))
        self.unreachable = True
        self._tell()
        if self.doubted:
            self._note_hang()
        if isinstance(error, TimeoutError):
            self._patience_seconds = min(2 * self._patience_seconds, _MAX_PATIENCE_SECONDS)
            return 0
        return _REFUSED_PAUSE_SECONDS

    def _tell(self) -> None:
        for listener in self._listeners:
            listener()

    async def _sleep(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake.wait()
