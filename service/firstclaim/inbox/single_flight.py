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
        self.result: asyncio.Future[T] = asyncio.get_running_loop().create_future()

    def end(self, result: T) -> None:
        """Give the followers this result."""
        if self._leave():
            self.result.set_result(result)

    def fail(self, error: BaseException) -> None:
        """Raise `LedgerUnavailable` to the followers: nothing is promised."""
        if self._leave():
            self.result.set_exception(LedgerUnavailable(str(error) or type(error).__name__))
            self.result.exception()  # marks it as retrieved, because there may be no follower

    def _leave(self) -> bool:
        self._flights.remove(self._event_id)
        return not self.result.done()


class SingleFlight(Generic[T]):
    """The flights of this process, by event id."""

    def __init__(self) -> None:
        self._flights: dict[str, Flight[T]] = {}

    def begin(self, event_id: str) -> Flight[T]:
        """Begin a flight as its leader. The caller must end it, whatever happens."""
        flight = self._flights[event_id] = Flight(self, event_id)
        return flight

    def current(self, event_id: str) -> "asyncio.Future[T] | None":
        """The leader's result, or None if there is no leader. Never cancel it: other followers wait for it too."""
        flight = self._flights.get(event_id)
        return None if flight is None else flight.result

    def remove(self, event_id: str) -> None:
        """Remove a flight that has ended: the next delivery is a leader."""
        self._flights.pop(event_id, None)
