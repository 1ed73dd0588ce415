"""Concurrent deliveries of one event in this process: the first makes the claims, the others wait for its result.

Guarantees: of each event, at most one delivery in this process is between lock and row: the leader. Each follower gets
the leader's result or its failure, because a flight that has begun always ends. The next delivery then begins another.
"""

import asyncio
from typing import Generic, TypeVar

from firstclaim.errors import LedgerUnavailable

T = TypeVar("T")


class Flight(Generic[T]):
    """The claims of one delivery, from the lock attempt to the committed row. Only the first result counts."""

    def __init__(self, flights: "SingleFlight[T]", event_id: str) -> None:
        self._flights = flights
        self._event_id = event_id
        self._over = False
        self._results: list[T] = []  # one, once it is known
        self._followed: asyncio.Future[T] | None = None  # made by the first follower: most flights have none

    @property
    def recorded(self) -> bool:
        """Whether it has a result."""
        return bool(self._results)

    def announce(self, result: T) -> None:
        """Give the followers this result, and those that come until the flight ends."""
        if not self.recorded and not self._over:
            self._results.append(result)
            if self._followed is not None:
                self._followed.set_result(result)

    def end(self, result: T) -> None:
        """Give the followers this result."""
        self.announce(result)
        self._leave()

    def fail(self, error: BaseException) -> None:
        """Raise `LedgerUnavailable` to the followers: nothing is promised."""
        if not self.recorded and not self._over and self._followed is not None:
            self._followed.set_exception(LedgerUnavailable(str(error) or type(error).__name__))
            self._followed.exception()  # marks it as retrieved, because a follower may have left
        self._leave()

    def follow(self) -> asyncio.Future[T]:
        """The result, for a follower. Never cancel it: other followers wait for it too."""
        if self._followed is None:
            self._followed = asyncio.get_running_loop().create_future()
            for result in self._results:
                self._followed.set_result(result)
        return self._followed

    def _leave(self) -> None:
        if not self._over:
            self._over = True
            self._flights.remove(self._event_id)


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
