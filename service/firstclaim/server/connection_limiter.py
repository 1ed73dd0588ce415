"""Limits on the connections of one process, and on the bytes that it buffers for incomplete requests.

Guarantees: at most `max_connections` connections are open, and at most `max_bytes` of incomplete requests are buffered.
When a limit is reached, the connection whose request has been incomplete for longest is evicted, which includes
connections that are idle between requests. A client at an ordinary pace completes its request within milliseconds, so
connections that are slow on purpose evict each other. A new connection is refused only if every open connection has a
complete request that is not answered yet.
"""

import resource
import time
from dataclasses import dataclass, field
from typing import Protocol

import structlog

from firstclaim.settings import Settings

log = structlog.get_logger(__name__)

_WARN_SECONDS = 10.0  # at most one log line per interval, not one per connection of a flood
_OTHER_FILES = 200  # 64 connections to Redis; the listener, the log, pipes to the supervisor, modules, DNS look-ups


class LimitedConnection(Protocol):
    """A connection that the limiter may evict."""

    def evict(self) -> None:
        """Close the connection now."""


@dataclass(slots=True)
class ConnectionLimiter:
    """The open connections of this process, and those of them whose request is incomplete, longest first."""

    max_connections: int
    max_bytes: int
    _open: set[LimitedConnection] = field(default_factory=set)
    _incomplete: dict[LimitedConnection, int] = field(default_factory=dict)  # with the bytes received so far
    _bytes: int = 0
    _warn_at: float = 0.0

    def opened(self, connection: LimitedConnection) -> bool:
        """Add a new connection, evicting another one if necessary. Returns whether there is capacity for it."""
        capacity = True
        while capacity and len(self._open) >= self.max_connections:
            capacity = self._evict_longest()
        self._open.add(connection)
        self._incomplete[connection] = 0  # also if it is refused: it is then the next one to be evicted
        return capacity

    def request_awaited(self, connection: LimitedConnection) -> None:
        """The connection waits for its next request."""
        if connection in self._open:
            self._incomplete.setdefault(connection, 0)

    def received(self, connection: LimitedConnection, count: int) -> None:
        """Count `count` more bytes of an incomplete request, and evict connections while there are too many bytes."""
        if connection in self._incomplete:
            self._incomplete[connection] += count
            self._bytes += count
            while self._bytes > self.max_bytes:
                self._evict_longest()

    def request_complete(self, connection: LimitedConnection) -> None:
        """The request is complete: the connection is not evicted before the request is answered."""
        self._bytes -= self._incomplete.pop(connection, 0)

    def closed(self, connection: LimitedConnection) -> None:
        """Remove a connection."""
        self.request_complete(connection)
        self._open.discard(connection)

    def _evict_longest(self) -> bool:
        longest = next(iter(self._incomplete), None)
        if time.monotonic() >= self._warn_at:
            self._warn_at = time.monotonic() + _WARN_SECONDS
            log.warning(
                "connection_limit_reached",
                connections=len(self._open),
                incomplete=len(self._incomplete),
                bytes=self._bytes,
            )
        if longest is None:
            return False
        self.closed(longest)
        longest.evict()
        return True


def affordable_connections(settings: Settings) -> int:
    """How many connections this process may accept: fewer than the setting if the limit on open files is too low.

    Raises the soft limit as far as needed and as the hard limit allows. The connections to the stores come first: a
    process that spends all its files on clients could record nothing.
    """
    wanted = settings.connections_most
    needed = wanted + settings.postgres_connections + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted
    soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(1, wanted - (needed - soft))
