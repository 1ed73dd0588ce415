"""When a failed event is due again: exponential backoff with jitter."""

import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Backoff:
    """An exponential backoff between a first and a maximum wait."""

    first_seconds: float
    max_seconds: float

    def after(self, count: int) -> float:
        """Seconds to wait after `count` (>= 1) failures: doubled up to the maximum, then jittered down to half of it.

        Without jitter, a thousand events that failed together would be retried together.
        """
        whole = min(self.first_seconds * 2.0 ** min(count - 1, 60), self.max_seconds)
        return whole * random.uniform(0.5, 1)  # noqa: S311  (spread, not secrecy)
