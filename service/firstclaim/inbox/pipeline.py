"""The one path: a delivery and recovery both come through here, and nothing else dispatches.

Guarantees: an answer within the budget, and an honest one: past it, `deferred` only if the row's COMMIT is
known. The work lives in a tracked task of its own, never in the request's: a client that hangs up cancels
nothing, and a graceful stop waits for it, then releases what is left.
"""

import asyncio
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import structlog

from firstclaim import outcome
from firstclaim.errors import FirstclaimError, LedgerUnavailable
from firstclaim.event import Delivery, Event, parse_event
from firstclaim.inbox.claims import Claims, LockAttempt, shared
from firstclaim.inbox.dispatch import Dispatcher
from firstclaim.inbox.ledger import Claim
from firstclaim.inbox.lock import LockReply
from firstclaim.observability import metrics, tracing
from firstclaim.observability.redaction import describe_error
from firstclaim.outcome import Kind, Outcome
from firstclaim.registry import Registry

log = structlog.get_logger(__name__)

T = TypeVar("T")


@dataclass(slots=True)
class _Progress:
    recorded: bool = False


class Pipeline:
    """Claims, then dispatches; `deliver` for one delivery, `recover` for what is due."""

    def __init__(
        self,
        claims: Claims,
        dispatcher: Dispatcher,
        registry: Registry,
        *,
        livemode: Literal["any", "live", "test"],
        budget_seconds: float,
    ) -> None:
        self._claims = claims
        self._dispatcher = dispatcher
        self._registry = registry
        self._livemode = livemode
        self._budget_seconds = budget_seconds
        self._tasks: set[asyncio.Task[Any]] = set()
        self._stopping = False

    async def deliver(self, delivery: Delivery) -> Outcome:
        """What came of `delivery`, within the answer's budget; never raises."""
        if self._stopping:
            return outcome.unavailable("Shutting down")
        event_id = delivery.event.id
        if (first := self._claims.in_flight(event_id)) is not None:
            return _told(await self._share(event_id, first), "process")
        with tracing.span("lock"):
            asked = await self._claims.ask(event_id)
        if asked.reply is LockReply.RECORDED:
            return _told(outcome.duplicate(event_id), "redis")
        progress = _Progress()
        task = self._spawn(self._process(delivery, asked, progress))
        done, _ = await asyncio.wait({task}, timeout=self._budget_seconds)
        if done and not task.cancelled():
            return _told(task.result(), "ledger")
        if progress.recorded:
            return outcome.deferred("Recorded; still at work on it")
        return outcome.unavailable("Not recorded in time")

    async def _share(self, event_id: str, first: asyncio.Future[Claim | Outcome]) -> Outcome:
        """What came of the copy that is at its claims right now, if its row is committed within the budget."""
        done, _ = await asyncio.wait({first}, timeout=self._budget_seconds)
        if not done:
            return outcome.unavailable("Not recorded in time")
        if first.exception() is not None:
            return outcome.unavailable("The ledger cannot be reached")
        return shared(event_id, first.result())

    async def return_abandoned(self, most: int) -> None:
        """Make events due again whose holder vanished. Raises `LedgerUnavailable`."""
        for event_id, status, times in await self._claims.ledger.return_abandoned(most):
            log.warning("abandoned", event_id=event_id, status=status, times=times)
            metrics.abandoned.inc()

    async def recover(self, *, thorough: bool = True) -> bool:
        """Claim due events, no more than free handler slots, and set them to work.

        `thorough`: also one that was abandoned before, whatever else is due; that look reads the whole backlog.
        Returns whether there may be more of them. Raises `LedgerUnavailable`.
        """
        if self._claims.lock.away or self._stopping:
            return False
        ledger, slots = self._claims.ledger, self._dispatcher.free_slots
        if not slots:
            return True
        due = await ledger.due(slots, abandoned=False)
        full = len(due) == slots
        if thorough and self._dispatcher.previously_abandoned_slot_free:
            suspects = await ledger.due(1, abandoned=True)
            due = suspects + due[: slots - len(suspects)]
        # In a task of its own: stopped in between, what was just claimed would count as abandoned, a lease later.
        claimed = await asyncio.shield(self._spawn(self._take_up(due)))
        # None of a full house of them: others hold their locks, and asking again at once would only spin.
        return full and claimed > 0

    async def room(self) -> None:
        """Wait until there is room for a fair number of due events."""
        await self._dispatcher.room()

    async def drain(self, seconds: float) -> None:
        """Take nothing new, give running work `seconds` to end, then release the rest uncharged."""
        self._stopping = True
        deadline = time.monotonic() + seconds
        while self._tasks:  # again and again: recovery may be claiming in one of them, and have more to do then
            await asyncio.wait(self._tasks, timeout=max(0, deadline - time.monotonic()))
            if time.monotonic() >= deadline:
                break
        left = list(self._tasks)
        for task in left:
            task.cancel()
        if left:
            log.info("releasing", events=len(left))
            await asyncio.wait(left, timeout=5)

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _process(self, delivery: Delivery, asked: LockAttempt, progress: _Progress) -> Outcome:
        """A delivery's way through; whatever breaks on it, the answer promises nothing that is not so."""
        event = delivery.event
        try:
            with tracing.span("claim"):
                won = await self._claims.win(delivery, asked, ignored=self._why_ignored(event))
            progress.recorded = True
            return await self._dispatch(won, event) if isinstance(won, Claim) else won
        except LedgerUnavailable as error:
            log.warning("ledger_unavailable", event_id=event.id, error=str(error))
            return outcome.unavailable("The ledger cannot be reached")
        except Exception as error:  # a fault of ours: Stripe and recovery will both try again
            log.exception("delivery_broke", event_id=event.id, error=describe_error(error))
            return outcome.unavailable("Internal error")

    async def _take_up(self, event_ids: Sequence[str]) -> int:
        """Claim these and set them to work; returns how many were to be had."""
        claims = await self._claims.recover(event_ids)
        for claim in claims:
            self._spawn(self._recovered(claim))
        return len(claims)

    async def _recovered(self, claim: Claim) -> Outcome:
        """A claim that recovery won, dispatched like a delivery's."""
        with tracing.span("recovered", event_id=claim.event_id, attempt=claim.attempt):
            result = await self._settle_recovered(claim)
            metrics.recovered[result.kind].inc()
            tracing.note(outcome=result.kind)
            return result

    async def _settle_recovered(self, claim: Claim) -> Outcome:
        try:
            result = await self._dispatch_recovered(claim)
        except LedgerUnavailable as error:
            log.warning("ledger_unavailable", event_id=claim.event_id, error=str(error))
            return outcome.unavailable("The ledger cannot be reached")
        except Exception as error:
            log.exception("recovery_broke", event_id=claim.event_id, error=describe_error(error))
            return outcome.unavailable("Internal error")
        log.info("recovered", event_id=claim.event_id, attempt=claim.attempt, outcome=result.kind)
        return result

    async def _dispatch_recovered(self, claim: Claim) -> Outcome:
        if claim.body is None:
            await self._claims.ledger.kill_if_held(claim, "its payload has expired: it cannot be dispatched")
            return outcome.dead(claim.event_id, claim.attempt)
        try:
            event = parse_event(claim.body)
        except FirstclaimError as error:  # accepted by an earlier build, which knew better
            await self._claims.ledger.kill_if_held(claim, f"its payload cannot be read: {error}")
            return outcome.dead(claim.event_id, claim.attempt)
        if (reason := self._why_ignored(event)) is not None:
            await self._claims.ledger.ignore_if_held(claim)
            return outcome.unhandled(reason, claim.attempt)
        return await self._dispatch(claim, event)

    async def _dispatch(self, claim: Claim, event: Event) -> Outcome:
        handler = self._registry.find(event.type)
        if handler is None:
            raise LookupError(event.type)
        return await self._dispatcher.run(claim, event, handler)

    def _why_ignored(self, event: Event) -> str | None:
        """Why nothing here wants the event; None: there is a handler for it."""
        if self._livemode != "any" and event.livemode is not (self._livemode == "live"):
            mode = "live" if event.livemode else "test"
            return f"Event {event.id} is a {mode} mode event; this service takes {self._livemode} mode only"
        if self._registry.find(event.type) is None:
            return f"Event type {event.type} not handled"
        return None


def _told(result: Outcome, stopped_by: metrics.StoppedBy) -> Outcome:
    """`result`, counted if it is a duplicate."""
    if result.kind is Kind.DUPLICATE:
        metrics.duplicates[stopped_by].inc()
    return result
