"""The requests of the last minutes, from counters that only rise.

Guarantees: the numbers are those of all workers of this replica, as the counters are, and never those of another
replica. A request belongs to the window if it was counted after the oldest sample, so the window is up to one interval
longer than `WINDOW_SECONDS`. Samples are taken in a thread: with many workers, adding up their files takes a while.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from firstclaim.observability import metrics
from firstclaim.outcome import Kind

WINDOW_SECONDS: Final = 600.0
_INTERVAL_SECONDS: Final = 5.0
# Refused before it could be a delivery of Stripe's: what scanners of the internet send.
_NO_DELIVERY: Final = frozenset(("path", "malformed", "upgrade", "pipelined", "head_too_large", "head_too_slow"))


@dataclass(frozen=True, slots=True)
class LastRefusal:
    """The last refusal of a kind, or 503: how long ago, to one interval, and the requests since that were not refused.

    They were accepted, or verified and not recorded.
    """

    seconds_ago: float
    accepted_since: int
    unrecorded_since: int = 0

    @property
    def verified_since(self) -> int:
        """How many requests were not refused since."""
        return self.accepted_since + self.unrecorded_since


@dataclass(frozen=True, slots=True)
class Requests:
    """The requests in the last `seconds`: accepted, and refused by kind, with the last of each kind.

    `unrecorded` are the verified ones that were answered 503, `unavailable`: neither accepted nor refused. The last of
    them is `last_unrecorded`, None if there is none. `unverified`: of each endpoint (`-`: without a name), how many
    were refused for their signature since its last verified one, at most `WINDOW_SECONDS` back.
    """

    seconds: float
    accepted: int
    refused: Mapping[str, int]
    last: Mapping[str, LastRefusal] = field(default_factory=dict)
    unrecorded: int = 0
    last_unrecorded: LastRefusal | None = None
    unverified: Mapping[str, int] = field(default_factory=dict)

    @property
    def all(self) -> int:
        """All requests."""
        return self.verified + sum(self.refused.values())

    @property
    def verified(self) -> int:
        """Those that were not refused."""
        return self.accepted + self.unrecorded


@dataclass(frozen=True, slots=True)
class _Sample:
    at: float
    accepted: int
    unrecorded: int
    refused: Mapping[str, int]
    endpoints: Mapping[str, Mapping[str, int]]

    def of(self, endpoint: str, result: metrics.Verification) -> int:
        return self.endpoints.get(endpoint, {}).get(result, 0)

    @property
    def verified(self) -> int:
        return self.accepted + self.unrecorded

    def number(self, kind: str | None) -> int:
        """The refused ones of a kind; None: the unrecorded ones."""
        return self.unrecorded if kind is None else self.refused.get(kind, 0)


class RecentRequests:
    """The window in one process. `now` is a monotonic clock, in seconds."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._samples: deque[_Sample] = deque(maxlen=round(WINDOW_SECONDS / _INTERVAL_SECONDS) + 1)

    async def run(self) -> None:
        """Take samples until it is cancelled."""
        while True:
            await asyncio.to_thread(self.sample)
            await asyncio.sleep(_INTERVAL_SECONDS)

    def sample(self) -> None:
        """Take one sample."""
        self._samples.append(self._read())

    def read(self) -> Requests | None:
        """The requests since the last one that was not refused, if all later ones were; else of the whole window.

        So a secret that was rolled a minute ago shows as "all of the last requests", whatever came before. None if
        there is no sample.
        """
        samples = list(self._samples)
        if not samples:
            return None
        current = self._read()
        start = samples[0]
        # The first sample after the last request that was not refused.
        same = next((each for each in samples if each.verified == current.verified), None)
        if same is not None and current.refused != same.refused:
            start = same
        increases = {kind: number - start.refused.get(kind, 0) for kind, number in current.refused.items()}
        refused = {kind: number for kind, number in increases.items() if number > 0}
        samples = [*samples, current]

        def last(kind: str | None) -> LastRefusal:
            first = next(each for each in samples if each.number(kind) == current.number(kind))
            accepted, unrecorded = current.accepted - first.accepted, current.unrecorded - first.unrecorded
            return LastRefusal(current.at - first.at, accepted, unrecorded)

        def since_verified(endpoint: str) -> int:
            verified = current.of(endpoint, "verified")
            first = next(each for each in samples if each.of(endpoint, "verified") == verified)
            return current.of(endpoint, "signature_refused") - first.of(endpoint, "signature_refused")

        unrecorded = current.unrecorded - start.unrecorded
        return Requests(
            current.at - start.at,
            current.accepted - start.accepted,
            refused,
            {kind: last(kind) for kind in refused},
            unrecorded,
            last(None) if unrecorded else None,
            {each: number for each in current.endpoints if (number := since_verified(each))},
        )

    def _read(self) -> _Sample:
        rejected = metrics.totals("firstclaim_rejected_requests")
        refused = {kind: number for kind, number in rejected.items() if kind not in _NO_DELIVERY}
        delivered = metrics.totals("firstclaim_deliveries")
        unrecorded = delivered.get(Kind.UNAVAILABLE, 0)
        return _Sample(
            self._now(), sum(delivered.values()) - unrecorded, unrecorded, refused, metrics.endpoint_totals()
        )
