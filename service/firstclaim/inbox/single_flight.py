"""Concurrent deliveries of one event in this process: the first makes the claims, the others wait for its result.

Guarantees: per event at most one delivery of a process is between lock and row. A follower gets the leader's result or
its failure, never silence: a flight that has begun always ends, and the next delivery begins one of its own.
"""

import asyncio
from typing import Generic, TypeVar

from firstclaim.errors import LedgerUnavailable

T = TypeVar("T")


class Flight(Generic[T]):
    """The claims of one delivery, from the lock attempt to the committed row. It ends once: later calls do nothing."""

    def __init__(self, flights: "SingleFlight[T]", event_id: str) -> None:
        self._flights = flights
        self._event_id = event_id
        self.result: asyncio.Future[T] = asyncio.get_running_loop().create_future()

    def end(self, result: T) -> None:
        """Give the followers this result."""
        if self._leave():
            self.result.set_result(result)

    def fail(self, error: BaseException) -> None:
        """Tell the followers that nothing is promised: they see a `LedgerUnavailable`."""
        if self._leave():
            self.result.set_exception(LedgerUnavailable(str(error) or type(error).__name__))
            self.result.exception()  # retrieved: often there is no follower

    def _leave(self) -> bool:
        self._flights.remove(self._event_id)
        return not self.result.done()


class SingleFlight(Generic[T]):
    """The flights of this process, by event id."""

    def __init__(self) -> None:
        self._flights: dict[str, Flight[T]] = {}

    def begin(self, event_id: str) -> Flight[T]:
        """Lead: the caller ends the flight, whatever happens."""
        flight = self._flights[event_id] = Flight(self, event_id)
        return flight

    def current(self, event_id: str) -> "asyncio.Future[T] | None":
        """The result to wait for, or None: nobody leads. Never cancel it: others wait for it too."""
        flight = self._flights.get(event_id)
        return None if flight is None else flight.result

    def remove(self, event_id: str) -> None:
        """End of a flight: the next delivery leads."""
        self._flights.pop(event_id, None)
