"""The log lines of refused requests.

Guarantees: each refused request has a line of the level `info`. What may have been Stripe's own delivery also has a
warning, at most one in `_EVERY_SECONDS` for each kind, because anybody can send such requests, and a warning is written
at once.
"""

import time
from collections.abc import Callable
from typing import Final

import structlog

from firstclaim.errors import Rejected

log = structlog.get_logger(__name__)

# After a secret was rolled, and by a clock that is wrong.
_OF_STRIPE: Final = ("signature_mismatch", "signature_stale")
_EVERY_SECONDS: Final = 10.0


class RefusalLog:
    """The lines of one endpoint in one process. `clock` is monotonic, in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._requests = dict.fromkeys(_OF_STRIPE, 0)
        self._resume_at = dict.fromkeys(_OF_STRIPE, 0.0)

    def note(self, error: Rejected, **fields: str) -> None:
        """Log a refused request, with these fields."""
        log.info("rejected", kind=error.kind, status=error.status, **fields)
        if error.kind not in self._requests:
            return
        self._requests[error.kind] += 1
        now = self._clock()
        if now >= self._resume_at[error.kind]:
            log.warning("signatures_refused", kind=error.kind, requests=self._requests[error.kind], **fields)
            self._requests[error.kind], self._resume_at[error.kind] = 0, now + _EVERY_SECONDS
