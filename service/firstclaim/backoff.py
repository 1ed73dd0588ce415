"""When a failed event is due again: exponential backoff with jitter."""

import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Backoff:
    """First and longest wait, in seconds."""

    first_seconds: float
    most_seconds: float

    def after(self, count: int) -> float:
        """Seconds to wait after `count` (>= 1) failures: doubling, capped, jittered between half and whole.

        The jitter keeps a thousand events that failed together from coming back together.
        """
        whole = min(self.first_seconds * 2.0 ** min(count - 1, 60), self.most_seconds)
        return whole * random.uniform(0.5, 1)  # noqa: S311  (spread, not secrecy)
