"""Releasing claims without a charge, however long Postgres is unreachable.

Guarantees: a release that fails is tried again until it succeeds, or the shutdown ends. Until then the claim is in
`waiting`.
"""

import asyncio
import contextlib
from collections.abc import Collection, Iterable

from firstclaim.errors import LedgerUnavailable
from firstclaim.inbox.claim import Claim
from firstclaim.inbox.claims import Claims
from firstclaim.inbox.ledger import Ledger

_RETRY_SECONDS = 1.0  # well below a lease: an event that is released in time is not charged


class Releases:
    """The releases of one process."""

    def __init__(self, ledger: Ledger, claims: Claims) -> None:
        self._ledger = ledger
        self._claims = claims
        self._retries: dict[asyncio.Task[None], Claim] = {}

    @property
    def waiting(self) -> Collection[Claim]:
        """The claims that could not be released yet."""
        return self._retries.values()

    async def release(self, claim: Claim, *, due_in_seconds: float = 0) -> None:
        """Release without a charge. If Postgres is unreachable, repeat it until it succeeds."""
        try:
            await self._release_once(claim, due_in_seconds)
        except LedgerUnavailable:
            retry = asyncio.create_task(self._release_repeatedly(claim, due_in_seconds))
            self._retries[retry] = claim
            retry.add_done_callback(self._retries.pop)

    async def release_once(self, claims: Iterable[Claim]) -> None:
        """Try once for each, at the end of the process. Recovery gets those that cannot be released."""
        await asyncio.gather(*(self._release_once(claim, 0) for claim in claims), return_exceptions=True)

    async def close(self) -> None:
        """Stop repeating releases. Events that could not be released count as abandoned once their lease is over."""
        for retry in self._retries:
            retry.cancel()
        if self._retries:
            await asyncio.wait(self._retries)

    async def _release_once(self, claim: Claim, due_in_seconds: float) -> None:
        await self._ledger.release_if_held(claim, due_in_seconds=due_in_seconds)
        await self._claims.forget(claim)

    async def _release_repeatedly(self, claim: Claim, due_in_seconds: float) -> None:
        while True:
            await asyncio.sleep(_RETRY_SECONDS)
            with contextlib.suppress(LedgerUnavailable):
                return await self._release_once(claim, due_in_seconds)
