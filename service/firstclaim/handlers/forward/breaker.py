"""The circuit breaker of one target in one process: while the target fails, its events wait instead of trying it.

Guarantees: the breaker says when to try again, and decides nothing else. An event that it turns away stays in the
ledger and is tried again: it delays, and it drops nothing. After some failures in a row it is open for a pause, which
grows with each further one; then one request probes the target. Whatever that request comes to, also if it is
interrupted, the next one after it is let through or is the next probe: the breaker cannot stay open without an end. A
target that answers, even with a refusal of the event, closes it.
"""

import enum
from collections.abc import Callable
from dataclasses import dataclass

_FAILURES = 5  # in a row; fewer are what a deploy of the target or a lost connection brings
_FIRST_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 60.0
_BESIDE_A_PROBE_SECONDS = 1.0


class Result(enum.Enum):
    """What a request says of its target."""

    ANSWERED = "answered"
    FAILED = "failed"
    UNKNOWN = "unknown"  # it was interrupted


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """A request that was let through. `probe`: the breaker is open, and this one finds out."""

    probe: bool


class Breaker:
    """`clock` is monotonic, in seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._failures = 0
        self._resume_at = 0.0
        self._probe: Request | None = None

    @property
    def is_open(self) -> bool:
        """Whether the target is known to fail."""
        return self._failures >= _FAILURES

    def admit(self) -> Request | float:
        """A request that may be sent, or the seconds to wait before the next try."""
        left = self._resume_at - self._clock()
        if left > 0:
            return left
        if not self.is_open:
            return Request(probe=False)
        if self._probe is not None:
            return _BESIDE_A_PROBE_SECONDS
        self._probe = Request(probe=True)
        return self._probe

    def note(self, request: Request, result: Result, *, pause_seconds: float | None = None) -> None:
        """Note the result of a request. `pause_seconds`: what the target has asked for."""
        own = request is self._probe
        if own:
            self._probe = None
        if pause_seconds is not None:  # the target answers, and asks for a pause: nothing is tried before
            self._resume_at = max(self._resume_at, self._clock() + pause_seconds)
        if result is Result.ANSWERED:
            self._failures = 0
            if pause_seconds is None:
                self._resume_at = 0.0
        elif result is Result.FAILED and (own or not self.is_open):  # not each of those that were on their way
            self._failures += 1
            if self.is_open:
                pause = min(_FIRST_PAUSE_SECONDS * 2.0 ** (self._failures - _FAILURES), _LONGEST_PAUSE_SECONDS)
                self._resume_at = max(self._resume_at, self._clock() + pause)
