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
        # Each has its own: a client that hangs up cancels the one that its delivery waits for.
        self._followers: list[asyncio.Future[T]] = []

    @property
    def recorded(self) -> bool:
        """Whether it has a result."""
        return bool(self._results)

    def announce(self, result: T) -> None:
        """Give this result to the followers, and to those that come before the flight ends."""
        if not self.recorded and not self._over:
            self._results.append(result)
            for follower in self._followers:
                if not follower.done():
                    follower.set_result(result)

    def end(self, result: T) -> None:
        """Give the followers this result."""
        self.announce(result)
        self._leave()

    def fail(self, error: BaseException) -> None:
        """Raise `LedgerUnavailable` to the followers: nothing is promised."""
        if not self.recorded and not self._over:
            for follower in self._followers:
                _raise_to(follower, LedgerUnavailable(str(error) or type(error).__name__))
        self._leave()

    async def follow(self, seconds: float) -> T:
        """The result, for a follower. Raises `TimeoutError` after `seconds`.

        A future and a timer of its own, because most duplicates of a burst are followers: `asyncio.wait` takes twice as
        long.
        """
        for result in self._results:
            return result
        loop = asyncio.get_running_loop()
        followed: asyncio.Future[T] = loop.create_future()
        self._followers.append(followed)
        timer = loop.call_later(seconds, _raise_to, followed, TimeoutError())
        try:
            return await followed
        finally:
            timer.cancel()

    def _leave(self) -> None:
        if not self._over:
            self._over = True
            self._flights.remove(self._event_id)


def _raise_to(follower: asyncio.Future[T], error: Exception) -> None:
    if not follower.done():
        follower.set_exception(error)
        follower.exception()  # marks it as retrieved, because the follower may be cancelled before it looks


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
