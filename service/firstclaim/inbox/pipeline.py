"""The only path to a handler: deliveries and recovery both use it.

Guarantees: a delivery is answered within the budget. If its work takes longer, the answer is `deferred` if the row's
COMMIT is known, and `unavailable` if not. The work runs in a tracked task of its own, never in the request's: a client
that disconnects cancels nothing, and a graceful shutdown waits for the work, then releases what is left.
"""

import asyncio
import time
from collections.abc import Coroutine, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

import structlog

from firstclaim import outcome
from firstclaim.errors import FirstclaimError, LedgerUnavailable
from firstclaim.event import Delivery, Event, parse_event
from firstclaim.inbox.backlog import Backlog
from firstclaim.inbox.claims import Claims, LockAttempt
from firstclaim.inbox.dispatch import Dispatcher
from firstclaim.inbox.existing_row import ExistingRow
from firstclaim.inbox.lanes import MAX_EVENTS, Batches, Lanes
from firstclaim.inbox.ledger import Claim, Ledger
from firstclaim.inbox.lock import LockReply
from firstclaim.inbox.routes import Routes
from firstclaim.inbox.single_flight import Flight, SingleFlight
from firstclaim.inbox.slots import Place, Slots
from firstclaim.observability import metrics, tracing
from firstclaim.observability.redaction import describe_error
from firstclaim.outcome import Kind, Outcome
from firstclaim.registry import Handler
from firstclaim.status import Status

log = structlog.get_logger(__name__)

T = TypeVar("T")

_RELEASE_SECONDS = 1.5  # for releases at the end of a drain, of the 2 s that a shutdown reserves for closing

_SHUTTING_DOWN = outcome.unavailable("Shutting down")
_NOT_IN_TIME = outcome.unavailable("Not recorded in time")
_LEDGER_UNREACHABLE = outcome.unavailable("The ledger cannot be reached")


class Pipeline:
    """Claims an event, then dispatches it: `deliver` for one delivery, `recover` for due events."""

    def __init__(
        self,
        claims: Claims,
        ledger: Ledger,
        dispatcher: Dispatcher,
        slots: Slots,
        routes: Routes,
        backlog: Backlog,
        singles: Backlog,
        batches: Batches,
        *,
        budget_seconds: float,
    ) -> None:
        self._claims = claims
        self._ledger = ledger
        self._dispatcher = dispatcher
        self._slots = slots
        self._routes = routes
        self._backlog = backlog  # of all events that this process wants
        self._singles = singles  # of those whose handlers take one at a time
        self._batches = batches
        self._budget_seconds = budget_seconds
        self._flights: SingleFlight[Claim | Outcome] = SingleFlight()
        self._tasks = batches.tasks  # of deliveries, recovery and batches: drained together
        self._draining = False

    # -- deliveries -------------------------------------------------------------------------------------

    async def deliver(self, delivery: Delivery) -> Outcome:
        """The outcome of `delivery`, within the answer's budget.

        Raises `Rejected` if its event is not recorded and its body is not valid. A recorded event is a duplicate
        whatever else its body holds, so a duplicate is never parsed.
        """
        if self._draining:
            return _SHUTTING_DOWN
        event_id = delivery.event_id
        if (leader := self._flights.current(event_id)) is not None:
            return _counted(await self._follow(delivery, leader), "process")
        flight = self._flights.begin(event_id)
        try:
            with tracing.span("lock"):
                lock = await self._claims.lock(event_id)
            if lock.reply is LockReply.RECORDED:  # most duplicates: answered in the request's own task
                result = outcome.duplicate(event_id)
                flight.end(result)
                return _counted(result, "redis")
            await self._claims.check(delivery, lock)
        except BaseException as error:
            flight.fail(error)
            raise
        return _counted(await self._answer(self._spawn(self._process(delivery, lock, flight)), flight), "ledger")

    async def _follow(self, delivery: Delivery, leader: Flight[Claim | Outcome]) -> Outcome:
        """The outcome of a further copy, while the first one (the leader) makes its claims."""
        event_id, followed = delivery.event_id, leader.follow()
        done, _ = await asyncio.wait({followed}, timeout=self._budget_seconds)
        if not done:
            return _NOT_IN_TIME
        if followed.exception() is not None:
            delivery.parse()  # the leader's body may not have been valid, and ours may be the same
            return _LEDGER_UNREACHABLE
        result = followed.result()
        if isinstance(result, Claim):
            return outcome.duplicate(event_id)
        if result.kind is Kind.UNHANDLED:
            return ExistingRow(Status.IGNORED, 1, None).answer(event_id)
        return result

    async def _answer(self, work: asyncio.Task[Outcome], flight: Flight[Claim | Outcome]) -> Outcome:
        """The outcome of `work`. If the budget ends first: whether the row is recorded by then."""
        done, _ = await asyncio.wait({work}, timeout=self._budget_seconds)
        if done and not work.cancelled():
            return work.result()
        if flight.recorded:
            return outcome.deferred("Recorded; still being processed")
        return _NOT_IN_TIME

    async def _process(self, delivery: Delivery, lock: LockAttempt, flight: Flight[Claim | Outcome]) -> Outcome:
        event, handler = delivery.event, self._routes.find(delivery.event)
        unwanted = None if isinstance(handler, Handler) else handler
        slots = self._slots_of(handler)
        place = self._reserve(event, slots) if unwanted is None and lock.reply is LockReply.HELD else None
        marked = slots is self._slots  # a batch handler's lanes write the markers
        try:
            with tracing.span("claim"):
                claim = await self._claims.claim(
                    delivery, lock, unwanted=unwanted, has_place=place is not None, marked=marked
                )
        except BaseException as error:  # noqa: BLE001  (a cancellation is raised again)
            flight.fail(error)
            _give_back(place)
            return _unavailable(error, event.id, event.type, "delivery_broke")
        if not isinstance(claim, Claim):
            flight.end(claim)
            _give_back(place)
            if place is None and unwanted is None and lock.reply is LockReply.HELD:
                slots.overflowed()
            return claim
        (flight.end if marked else flight.announce)(claim)
        try:
            return await self._dispatch(claim, event, handler, place or Place(slots, for_delivery=True))
        except Exception as error:  # noqa: BLE001
            return _unavailable(error, event.id, event.type, "delivery_broke")
        finally:
            if not marked:  # until the marker is written, the copies that come to this process are answered here
                flight.end(claim)

    def _slots_of(self, handler: Handler | str) -> Slots:
        """Where the places of this handler's events are counted."""
        if isinstance(handler, Handler) and handler.batch:
            return self._batches.lanes(handler).places
        return self._slots

    def _reserve(self, event: Event, slots: Slots) -> Place | None:
        """A place for a handler. None if none is free, or if a thread of this event still runs past its deadline."""
        return None if event.id in self._slots.hung else slots.reserve()

    # -- recovery ---------------------------------------------------------------------------------------

    async def return_abandoned(self, limit: int) -> None:
        """Make the events of vanished processes due again. Raises `LedgerUnavailable`."""
        for event in await self._ledger.return_abandoned(limit):
            log.warning("abandoned", **asdict(event))
            metrics.abandoned.inc()

    async def give_up_unwanted(self, limit: int) -> None:
        """Make events `dead` that no build has taken a day after their time to give up. Raises `LedgerUnavailable`."""
        for event in await self._backlog.give_up_unwanted(limit):
            log.warning("unwanted", event_id=event.event_id, type=event.queue[0])

    async def recover(self) -> bool:
        """Claim due events, as many as `Slots.claimable` says, and dispatch them.

        At most one of them is an event that was abandoned before. Returns whether due events are left. Raises
        `LedgerUnavailable`.
        """
        if self._claims.redis_unreachable or self._draining:
            return False
        more = [await self._recover_batched(lanes) for lanes in self._batches]
        claimable = self._slots.claimable
        if not claimable:
            return True
        hung = list(self._slots.hung)
        due = await self._singles.look(claimable, left_out=hung)
        previously_abandoned: list[str] = []
        if self._slots.previously_abandoned_free:
            previously_abandoned = await self._backlog.look(1, abandoned=True, left_out=hung)
        count = min(claimable, self._slots.claimable)  # deliveries may have taken places during the looks
        chosen = [*previously_abandoned[:1], *self._singles.choose(due, count)][:count]
        places = [Place(self._slots, for_delivery=False) for _ in chosen]
        # In a task of its own, so that claims which are made while recovery is cancelled here are dispatched or
        # released. Otherwise they would count as abandoned when their lease is over.
        await asyncio.shield(self._spawn(self._take_up(chosen, places, self._singles, self._backlog)))
        self._slots.backlog = len(due) > count
        return self._slots.backlog or any(more)

    async def _recover_batched(self, lanes: Lanes) -> bool:
        """The same for the events of a batch handler: its lanes have places of their own."""
        claimable = min(lanes.places.claimable, MAX_EVENTS)
        if not claimable:
            return False  # its places wake recovery
        due = await lanes.backlog.look(claimable, left_out=list(self._slots.hung))
        count = min(claimable, lanes.places.claimable)
        chosen = lanes.backlog.choose(due, count)
        places = [Place(lanes.places, for_delivery=False) for _ in chosen]
        await asyncio.shield(self._spawn(self._take_up(chosen, places, lanes.backlog)))
        lanes.places.backlog = len(due) > count
        return lanes.places.backlog

    async def _take_up(self, event_ids: Sequence[str], places: list[Place], *backlogs: Backlog) -> None:
        """Claim these events and dispatch them. Those that cannot be claimed are left out for a lock's TTL."""
        try:
            claims, held_by_others = await self._claims.recover(event_ids)
            for backlog in backlogs:
                backlog.leave_out(held_by_others)
            for claim in claims:
                self._spawn(self._recovered(claim, places.pop()))
        finally:
            for place in places:
                place.release()

    async def _recovered(self, claim: Claim, place: Place) -> Outcome:
        with tracing.span("recovered", event_id=claim.event_id, attempt=claim.attempt):
            try:
                result = await self._dispatch_recovered(claim, place)
            except Exception as error:  # noqa: BLE001
                result = _unavailable(error, claim.event_id, claim.type, "recovery_broke")
            else:
                log.info(
                    "recovered",
                    event_id=claim.event_id,
                    type=claim.type,
                    attempt=claim.attempt,
                    outcome=result.kind,
                )
            metrics.recovered[result.kind].inc()
            tracing.note(outcome=result.kind)
            return result

    async def _dispatch_recovered(self, claim: Claim, place: Place) -> Outcome:
        if claim.body is None:
            return await self._kill(claim, place, "its payload has expired: it cannot be dispatched")
        try:
            event = parse_event(claim.body)
        except FirstclaimError as error:  # accepted by a build with other rules
            return await self._kill(claim, place, f"its payload cannot be read: {error}")
        return await self._dispatch(claim, event, self._routes.find(event), place)

    async def _dispatch(self, claim: Claim, event: Event, handler: Handler | str, place: Place) -> Outcome:
        if isinstance(handler, str):  # only if the row has another type or mode than its payload
            return await self._kill(claim, place, f"its payload is not the event of its row: {handler}")
        if handler.batch:
            return await self._batches.lanes(handler).run(claim, event, place)
        return await self._dispatcher.run(claim, event, handler, place)

    async def _kill(self, claim: Claim, place: Place, error: str) -> Outcome:
        try:
            await self._ledger.kill_if_held(claim, error)
        finally:
            place.release()
        return outcome.dead(claim.event_id, claim.attempt)

    # -- shutdown ---------------------------------------------------------------------------------------

    async def drain(self, seconds: float) -> None:
        """Accept no new work, wait up to `seconds` for running work, then release the rest without a charge."""
        self._draining = True
        deadline = time.monotonic() + seconds
        while self._tasks:  # repeatedly: a task in which recovery claims events starts further tasks
            await asyncio.wait(self._tasks, timeout=max(0, deadline - time.monotonic()))
            if time.monotonic() >= deadline:
                break
        left = list(self._tasks)
        for task in left:
            task.cancel()
        if left:
            log.info("releasing", events=len(left))
            await asyncio.wait(left, timeout=_RELEASE_SECONDS)
        await self._dispatcher.close()

    @property
    def unstarted(self) -> list[Claim]:
        """The claims whose attempt has not begun."""
        return [*self._dispatcher.unstarted, *self._batches.unstarted]

    async def release_unstarted(self, claims: Sequence[Claim]) -> None:
        """Release claims that `unstarted` returned, without a charge. Recovery gets those that cannot be released."""
        await self._dispatcher.release_unstarted(claims)

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _unavailable(error: BaseException, event_id: str, event_type: str, log_event: str) -> Outcome:
    """The outcome after `error`: nothing is promised, so Stripe retries. A cancellation is raised again."""
    if isinstance(error, LedgerUnavailable):
        log.warning("ledger_unavailable", event_id=event_id, type=event_type, error=str(error))
        return _LEDGER_UNREACHABLE
    if not isinstance(error, Exception):
        raise error
    log.error(log_event, event_id=event_id, type=event_type, error=describe_error(error))
    return outcome.unavailable("Internal error")


def _give_back(place: Place | None) -> None:
    if place is not None:
        place.release()


def _counted(result: Outcome, stopped_by: metrics.StoppedBy) -> Outcome:
    """Count `result` if it is a duplicate, and return it."""
    if result.kind is Kind.DUPLICATE:
        metrics.duplicates[stopped_by].inc()
    return result
