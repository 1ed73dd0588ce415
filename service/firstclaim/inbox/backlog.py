"""Which of the due events a round of recovery tries to claim.

Guarantees: the head of the queue blocks nobody. Half of the candidates are the oldest, the others a random sample of
the rest, so that processes that look at the same rows rarely try the same ones. What could not be claimed, because
another transaction has locked its row or another delivery its lock, is left out for as long as a lock lives.
"""

import random
import time
from collections.abc import Iterable, Sequence

# A look reads more than it takes: enough for a sample that eight processes do not share.
_CANDIDATES_PER_SLOT = 16
_MIN_CANDIDATES = 64
_MAX_LEFT_OUT = 1000  # ids in the query; beyond it the oldest are tried again


class Backlog:
    """The choices of one process."""

    def __init__(self, *, leave_out_seconds: float) -> None:
        self._leave_out_seconds = leave_out_seconds
        self._left_out: dict[str, float] = {}  # event id: until when, by the monotonic clock

    @staticmethod
    def look(count: int) -> int:
        """How many due events to read in order to take `count` of them."""
        return max(_CANDIDATES_PER_SLOT * count, _MIN_CANDIDATES)

    @property
    def left_out(self) -> list[str]:
        """The ids that a look leaves out."""
        now = time.monotonic()
        self._left_out = {event_id: until for event_id, until in self._left_out.items() if until > now}
        return list(self._left_out)

    def leave_out(self, event_ids: Iterable[str]) -> None:
        """These could not be claimed."""
        until = time.monotonic() + self._leave_out_seconds
        for event_id in event_ids:
            self._left_out.pop(event_id, None)
            self._left_out[event_id] = until
        while len(self._left_out) > _MAX_LEFT_OUT:
            del self._left_out[next(iter(self._left_out))]

    @staticmethod
    def choose(due: Sequence[str], count: int) -> list[str]:
        """`count` of the due events, which are sorted from the oldest on."""
        oldest = (count + 1) // 2
        rest = due[oldest:]
        return [*due[:oldest], *random.sample(rest, min(count - min(oldest, len(due)), len(rest)))]
