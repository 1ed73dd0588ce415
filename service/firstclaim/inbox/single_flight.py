"""Concurrent deliveries of one event in this process: the first makes the claims, the others wait for its result.

Guarantees: of each event, at most one delivery in this process is between lock and row: the leader. Each follower gets
the leader's result or its failure, because a flight that has begun always ends. The next delivery then begins another.
"""

import asyncio
from typing import Generic, TypeVar

from firstclaim.errors import LedgerUnavailable

T = TypeVar("T")


class Flight(Generic[T]):
    """The claims of one delivery, from the lock attempt to the committed row. Only the first end counts."""

    def __init__(self, flights: "SingleFlight[T]", event_id: str) -> None:
        self._flights = flights
        self._event_id = event_id
        self._ended = False
        self._followed: asyncio.Future[T] | None = None  # made by the first follower: most flights have none
        self.recorded = False  # it has ended with a result

    def end(self, result: T) -> None:
        """Give the followers this result."""
        if self._leave():
            self.recorded = True
            if self._followed is not None:
                self._followed.set_result(result)

    def fail(self, error: BaseException) -> None:
        """Raise `LedgerUnavailable` to the followers: nothing is promised."""
        if self._leave() and self._followed is not None:
            self._followed.set_exception(LedgerUnavailable(str(error) or type(error).__name__))
            self._followed.exception()  # marks it as retrieved, because a follower may have left

    def follow(self) -> asyncio.Future[T]:
        """The result, for a follower. Never cancel it: other followers wait for it too."""
        if self._followed is None:
            self._followed = asyncio.get_running_loop().create_future()
        return self._followed

    def _leave(self) -> bool:
        first, self._ended = not self._ended, True
        if first:
            self._flights.remove(self._event_id)
        return first


class SingleFlight(Generic[T]):
    """The flights of this process, by event id."""

    def __init__(self) -> None:
        self._flights: dict[str, Flight[T]] = {}

    def begin(self, event_id: str) -> Flight[T]:
        """Begin a flight as its leader. The caller must end it, whatever happens."""
        flight = self._flights[event_id] = Flight(self, event_id)
        return flight

    def current(self, event_id: str) -> Flight[T] | None:
        """The leader's flight, or None if there is no leader."""
        return self._flights.get(event_id)

    def remove(self, event_id: str) -> None:
        """Remove a flight that has ended: the next delivery is a leader."""
        self._flights.pop(event_id, None)
