"""One timer for the steps of an attempt, which follow one another and have a time limit each.

Guarantees: a step that exceeds its limit is ended by the function that was given for it, once. A step that has ended is
not. A timer of its own for each step would cost as much as a statement does: here the timer of a step that ended early
is kept for the next ones, and set again only if it fires too early, or if a later step has to end sooner.
"""

import asyncio
from collections.abc import Callable
from types import TracebackType


class StepTimer:
    """The timer of one attempt; `close` it at the end. All times are in seconds."""

    __slots__ = ("_end", "_ends_at", "_expired", "_handle", "_loop")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._handle: asyncio.TimerHandle | None = None
        self._ends_at = 0.0
        self._end: Callable[[], object] | None = None
        self._expired = False

    def start(self, seconds: float, end: Callable[[], object]) -> None:
        """A step starts, until `stop`: call `end` if it takes longer than `seconds`."""
        self._end, self._expired = end, False
        self._ends_at = self._loop.time() + seconds
        if self._handle is None or self._handle.when() > self._ends_at:
            self._set()

    def stop(self) -> None:
        """The step has ended."""
        self._end = None

    def limit(self, seconds: float, end: Callable[[], object]) -> "StepTimer":
        """For a `with` block that is a step: raises TimeoutError if it took longer, whatever its result."""
        self.start(seconds, end)
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, _type: type[BaseException] | None, error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self.stop()
        if self._expired and not isinstance(error, asyncio.CancelledError):
            raise TimeoutError from error

    def close(self) -> None:
        """No step follows."""
        self._end = None
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _set(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
        self._handle = self._loop.call_at(self._ends_at, self._fire)

    def _fire(self) -> None:
        self._handle = None
        if (end := self._end) is None:
            return
        if self._loop.time() < self._ends_at:
            self._set()
        else:
            self._end, self._expired = None, True
            end()
