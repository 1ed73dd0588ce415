"""Requests that were refused because of their signature, counted where they are: in this process.

Guarantees: refusing costs no statement. The counters are read now and then, and what is read is added to the ledger's
row for all processes. A process that is killed loses what it has counted since the last look, at most.

Anybody can send a request with a wrong signature. So a few among many accepted ones are not reported. Many are those
that are a share of what came since the last report, or of the last minute alone: what was accepted in the hour before a
secret was rolled says nothing about it. A few are many too if they came to an endpoint of which nothing was verified.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from firstclaim.errors import RejectedKind
from firstclaim.observability import metrics

# Stripe's own deliveries are refused in these two ways: after a secret was rolled, or by a clock that is wrong. The
# others are requests that Stripe never sends.
_KINDS: Final[tuple[RejectedKind, ...]] = ("signature_mismatch", "signature_stale")
_LEAST: Final = 3
_SHARE: Final = 0.1  # of all that were accepted or refused
_RECENT_SECONDS: Final = 60.0
_FORGET_SECONDS: Final = 3600.0  # a few refusals a day are no incident


@dataclass(frozen=True, slots=True)
class _Counts:
    refused: Mapping[RejectedKind, int]
    accepted: int
    endpoints: Mapping[str, Mapping[str, int]]


@dataclass(frozen=True, slots=True)
class Refused:
    """Refusals to report: how many of each kind, and the endpoints that they came to (`-`: the one without a name)."""

    by_kind: Mapping[str, int]
    endpoints: frozenset[str] = frozenset()


class Refusals:
    """The refusals of this process that have not been reported."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._read = _counts()
        self._since = clock()
        self._looks: deque[tuple[float, _Counts]] = deque([(self._since, self._read)])

    def take(self) -> Refused:
        """The refusals to report, which are then removed here; none if they are too few so far."""
        at, now = self._clock(), _counts()
        while self._looks and self._looks[0][0] < at - _RECENT_SECONDS:
            self._looks.popleft()
        recent = self._looks[0][1] if self._looks else now  # what was counted a minute ago
        enough = _are_many(self._read, now) or _are_many(recent, now)
        new = {kind: now.refused[kind] - self._read.refused[kind] for kind in _KINDS}
        refused = Refused(
            {kind: number for kind, number in new.items() if number},
            frozenset(each for each in now.endpoints if _increase(self._read, now, each, "signature_refused")),
        )
        if enough:
            self._read, self._since = now, at
            self._looks.clear()
        elif at - self._since >= _FORGET_SECONDS:
            self._read, self._since = recent, at  # not what is of the last minute
        self._looks.append((at, now))
        return refused if enough else Refused({})


def _are_many(before: _Counts, now: _Counts) -> bool:
    """Whether the refusals in between are worth a report: a share of all requests, or all those of an endpoint."""
    refused = sum(now.refused[kind] - before.refused[kind] for kind in _KINDS)
    if refused < _LEAST:
        return False
    return refused >= _SHARE * (refused + now.accepted - before.accepted) or any(
        _increase(before, now, each, "signature_refused") >= _LEAST and not _increase(before, now, each, "verified")
        for each in now.endpoints
    )


def _increase(before: _Counts, now: _Counts, endpoint: str, result: metrics.Verification) -> int:
    return now.endpoints[endpoint][result] - before.endpoints.get(endpoint, {}).get(result, 0)


def _counts() -> _Counts:
    """What this process has counted, also where several write to one folder."""
    return _Counts(
        {kind: metrics.own(metrics.rejected[kind]) for kind in _KINDS},
        sum(metrics.own(each) for each in metrics.deliveries.values()),
        metrics.endpoint_totals(this_process=True),
    )
