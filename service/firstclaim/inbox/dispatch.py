"""Dispatch: a slot for a claimed event, one attempt at it, and the ledger brought in line with how that ended.

Guarantees: every way an attempt can end is accounted for, guarded by its attempt number, and once; a handler
that committed by itself is found out however the attempt ended, and never retried by itself; a claim that
gets no slot in half its lease, or that we interrupt, is released uncharged.
"""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from firstclaim import outcome
from firstclaim.backoff import Backoff
from firstclaim.errors import LedgerUnavailable, Permanent, Retry
from firstclaim.event import Event
from firstclaim.inbox.attempt import Attempt, CommitUnknown, TakenOver, TransactionEnded
from firstclaim.inbox.claims import Claims
from firstclaim.inbox.ledger import Claim, Ledger
from firstclaim.observability import tracing
from firstclaim.observability.redaction import describe_error, redacted_error
from firstclaim.outcome import Outcome
from firstclaim.postgres.handler_connections import HandlerConnections
from firstclaim.registry import Handler
from firstclaim.status import Status

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class DispatchLimits:
    """Seconds and counts; each argues for itself in `firstclaim.settings`."""

    slots: int
    deadline_seconds: float
    lease_seconds: float
    postgres_timeout_seconds: float


class Dispatcher:
    """Runs handlers, `limits.slots` at once, each on a seat of its own."""

    def __init__(
        self, seats: HandlerConnections, ledger: Ledger, claims: Claims, backoff: Backoff, limits: DispatchLimits
    ) -> None:
        self._seats = seats
        self._ledger = ledger
        self._claims = claims
        self._backoff = backoff
        self._limits = limits
        self._slots = asyncio.Semaphore(limits.slots)
        # An event that was abandoned before may kill the process again: one of those at a time, so that it
        # drags as few neighbours along as can be.
        self._suspects = asyncio.Semaphore(1)
        self._waiting = 0
        self._running = 0
        self._roomy = asyncio.Event()
        self._roomy.set()

    @property
    def free_slots(self) -> int:
        """How many handlers could start right now, those already waiting for a slot counted off."""
        return max(0, self._limits.slots - self._running - self._waiting)

    @property
    def previously_abandoned_slot_free(self) -> bool:
        """Whether an event that was abandoned before could start right now."""
        return not self._suspects.locked()

    async def room(self) -> None:
        """Wait until half of the slots are free: recovery then fetches its next batch, not single events."""
        await self._roomy.wait()

    async def run(self, claim: Claim, event: Event, handler: Handler) -> Outcome:
        """Dispatch a claimed event; raises `LedgerUnavailable` when what became of it cannot be told."""
        attempt = Attempt(
            self._seats,
            self._ledger,
            claim,
            event,
            handler,
            self._limits.deadline_seconds,
            self._limits.postgres_timeout_seconds,
        )
        try:
            leave = await self._enter(claim)
            if leave is None:  # a full house: whoever has a free slot next takes it
                await self._release(claim)
                return outcome.deferred("Recorded; dispatched when a handler slot is free", claim.attempt)
            try:
                with tracing.span("attempt", attempt=claim.attempt):
                    ended = await attempt.run()
                    if isinstance(ended, Exception):
                        tracing.note(error=type(ended).__name__)
            finally:
                # A handler that ignores its end keeps its slot until it really ends.
                if attempt.work is None or attempt.work.done():
                    leave()
                else:
                    attempt.work.add_done_callback(lambda _: leave())
            return await self._settle(attempt, ended)
        except LedgerUnavailable:
            if attempt.held is None:
                # No connection to begin with (a server that takes no more of them, say). Left claimed it would
                # count as abandoned, and be dead after eight times; but not at once again, either.
                with contextlib.suppress(LedgerUnavailable):
                    await self._release(claim, due_in_seconds=self._backoff.first_seconds)
            raise
        except asyncio.CancelledError:
            if await self._committed_all_the_same(attempt):
                await self._ledger.kill_if_held(claim, str(TransactionEnded()))
            else:
                await self._release(claim)
            raise

    async def _enter(self, claim: Claim) -> Callable[[], None] | None:
        """Wait for a slot, half the lease at most; returns what frees it again, or None."""
        gates = [self._suspects, self._slots] if claim.abandoned else [self._slots]
        entered: list[asyncio.Semaphore] = []
        full = any(gate.locked() for gate in gates)
        self._count(waiting=1)
        try:
            async with asyncio.timeout(self._limits.lease_seconds / 2) if full else contextlib.nullcontext():
                for gate in gates:
                    await gate.acquire()
                    entered.append(gate)
        except BaseException as error:
            for gate in entered:
                gate.release()
            if isinstance(error, TimeoutError):
                return None
            raise
        finally:
            self._count(waiting=-1)
        self._count(running=1)

        def release() -> None:
            self._count(running=-1)
            for gate in entered:
                gate.release()

        return release

    def _count(self, *, waiting: int = 0, running: int = 0) -> None:
        self._waiting += waiting
        self._running += running
        if self.free_slots * 2 >= self._limits.slots:
            self._roomy.set()
        else:
            self._roomy.clear()

    async def _release(self, claim: Claim, *, due_in_seconds: float = 0) -> None:
        await self._ledger.release_if_held(claim, due_in_seconds=due_in_seconds)
        await self._claims.forget(claim)

    async def _settle(self, attempt: Attempt, ended: str | Exception) -> Outcome:
        """Bring the ledger in line with how the attempt ended: its action, or why it failed."""
        claim = attempt.claim
        if isinstance(ended, str):
            return outcome.processed(ended, claim.attempt)
        if isinstance(ended, TakenOver):
            return outcome.duplicate(claim.event_id)
        if isinstance(ended, CommitUnknown):
            return await self._settle_unknown(claim, ended)
        log.warning("handler_failed", event_id=claim.event_id, attempt=claim.attempt, error=describe_error(ended))
        if await self._committed_all_the_same(attempt):
            await self._ledger.kill_if_held(claim, str(TransactionEnded()))
            return outcome.failed(claim.attempt)
        return await self._fail(claim, ended)

    async def _committed_all_the_same(self, attempt: Attempt) -> bool:
        """An attempt that did not succeed, of which something is committed, or may be: a retry would double it."""
        if attempt.ended_by_handler:
            return True
        return attempt.held is not None and await self._ledger.committed(attempt.held)

    async def _fail(self, claim: Claim, error: Exception) -> Outcome:
        text = redacted_error(error)
        if isinstance(error, Permanent):
            await self._ledger.kill_if_held(claim, text)
            return outcome.dead(claim.event_id, claim.attempt)
        wait = error.after if isinstance(error, Retry) else None
        if wait is None:
            wait = self._backoff.after(claim.failures + 1)
        if await self._ledger.fail_if_held(claim, text, due_in_seconds=wait) is Status.FAILED:
            await self._claims.forget(claim)
        return outcome.failed(claim.attempt)

    async def _settle_unknown(self, claim: Claim, error: CommitUnknown) -> Outcome:
        """The connection was lost during COMMIT. The guarded update waits for the old backend, a read would not."""
        self._ledger.connect_anew()
        wait = self._backoff.after(claim.failures + 1)
        if await self._ledger.fail_if_held(claim, str(error), due_in_seconds=wait) is not None:
            await self._claims.forget(claim)
            return outcome.failed(claim.attempt)
        found = await self._ledger.find(claim.event_id)
        if found is None:  # the ledger was set back under us: nothing may be promised for what it does not have
            raise LedgerUnavailable("the row is gone")
        if (found.status, found.attempt) == (Status.COMPLETED, claim.attempt):
            return outcome.processed(error.action, claim.attempt)
        return outcome.duplicate(claim.event_id)
