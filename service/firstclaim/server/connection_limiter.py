"""Who is at the door of one process, and what happens when it is full.

Guarantees: no more than `connections_most` sockets are open, and no more than `bytes_most` of requests that
have not arrived whole are held. When either is reached, the socket whose request has been arriving for longest
makes room (one that is idle between requests too): whoever sends at an ordinary pace is here and gone in
milliseconds, so sockets opened to be slow push out each other. Only when every socket's request is here and
being worked on is the newcomer the one who has to come again.
"""

import resource
import time
from dataclasses import dataclass, field
from typing import Protocol

import structlog

from firstclaim.settings import Settings

log = structlog.get_logger(__name__)

_WARN_SECONDS = 10.0  # a line for the operator, not one for every socket of a flood
_OTHER_FILES = 200  # 64 connections to Redis; the listener, the log, pipes to the supervisor, modules, name look-ups


class LimitedConnection(Protocol):
    """One connection."""

    def evict(self) -> None:
        """Leave now: the place is needed."""


@dataclass(slots=True)
class ConnectionLimiter:
    """The sockets of this process; of those whose request has not arrived whole, the one that waits longest first."""

    connections_most: int
    bytes_most: int
    _present: set[LimitedConnection] = field(default_factory=set)
    _arriving: dict[LimitedConnection, int] = field(default_factory=dict)  # with the bytes that came of it
    _bytes: int = 0
    _warn_at: float = 0.0

    def arrive(self, guest: LimitedConnection) -> bool:
        """A new socket; whether it may stay, another having made room for it if need be."""
        room = True
        while room and len(self._present) >= self.connections_most:
            room = self._make_room()
        self._present.add(guest)
        self._arriving[guest] = 0  # also if it has to go: its place is the first to be given away
        return room

    def expect(self, guest: LimitedConnection) -> None:
        """A next request of it has yet to arrive."""
        if guest in self._present:
            self._arriving.setdefault(guest, 0)

    def bring(self, guest: LimitedConnection, count: int) -> None:
        """More bytes of its request came; whoever waits longest goes if they are too many."""
        if guest in self._arriving:
            self._arriving[guest] += count
            self._bytes += count
            while self._bytes > self.bytes_most:
                self._make_room()

    def complete(self, guest: LimitedConnection) -> None:
        """Its request is here: it is not sent away before that is answered."""
        self._bytes -= self._arriving.pop(guest, 0)

    def leave(self, guest: LimitedConnection) -> None:
        """It has gone."""
        self.complete(guest)
        self._present.discard(guest)

    def _make_room(self) -> bool:
        longest = next(iter(self._arriving), None)
        if time.monotonic() >= self._warn_at:
            self._warn_at = time.monotonic() + _WARN_SECONDS
            log.warning("lobby_full", sockets=len(self._present), arriving=len(self._arriving), bytes=self._bytes)
        if longest is None:
            return False
        self.leave(longest)
        longest.evict()
        return True


def affordable_connections(settings: Settings) -> int:
    """How many sockets this process may have: fewer than the setting says where its limit on open files is lower.

    Raises the soft limit as far as that takes and the hard one lets it. What the stores need comes first: a process
    whose every file is a socket of somebody else's can record nothing.
    """
    wanted = settings.connections_most
    needed = wanted + settings.postgres_connections + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted
    soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(1, wanted - (needed - soft))
