"""The only path to a handler: deliveries and recovery both use it.

Guarantees: a delivery is answered within the budget. If its work takes longer, the answer is `deferred` if the row's
COMMIT is known, and `unavailable` if not. The work runs in a tracked task of its own, never in the request's: a client
that disconnects cancels nothing, and a graceful shutdown waits for the work, then releases what is left.
"""

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import asdict

import structlog

from firstclaim import outcome
from firstclaim.errors import FirstclaimError, LedgerUnavailable
from firstclaim.event import Delivery, Event
from firstclaim.inbox.backlog import Backlog
from firstclaim.inbox.claim import Claim
from firstclaim.inbox.claims import NO_PLACE, Claims, LockAttempt, Refused
from firstclaim.inbox.dispatch import Dispatcher
from firstclaim.inbox.due import Survey
from firstclaim.inbox.duplicates import Duplicates
from firstclaim.inbox.existing_row import ExistingRow
from firstclaim.inbox.lanes import MAX_EVENTS, Batches, Lanes
from firstclaim.inbox.ledger import Ledger
from firstclaim.inbox.limits import Limits
from firstclaim.inbox.lock import LockReply
from firstclaim.inbox.pauses import Pauses
from firstclaim.inbox.routes import Routes
from firstclaim.inbox.single_flight import Flight, SingleFlight
from firstclaim.inbox.slots import Place, Slots
from firstclaim.inbox.task_event import parse_row
from firstclaim.inbox.unfinished_work import LEDGER_UNREACHABLE, unavailable
from firstclaim.inbox.work import Work
from firstclaim.observability import metrics, tracing
from firstclaim.outcome import Kind, Outcome
from firstclaim.registry import Handler
from firstclaim.status import Status

log = structlog.get_logger(__name__)

_SHUTTING_DOWN = outcome.unavailable("Shutting down")
_RELEASED = outcome.deferred("Recorded; another process dispatches it: this one shuts down")
_NOT_IN_TIME = outcome.unavailable("Not recorded in time")


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
        previously_abandoned: Backlog,
        batches: Batches,
        limits: Limits,
        work: Work,
        duplicates: Duplicates,
        pauses: Pauses,
        *,
        budget_seconds: float,
    ) -> None:
        self._claims = claims
        self._ledger = ledger
        self._dispatcher = dispatcher
        self._slots = slots
        self._routes = routes
        self._backlog = backlog  # of all events that this process wants
        self._singles = singles  # of those whose handlers take one at a time, and have no limits
        self._abandoned = previously_abandoned  # of those whose handlers have no limits, and that were abandoned before
        self._batches = batches
        self._limits = limits
        self._work = work
        self._duplicates = duplicates
        self._pauses = pauses
        self._budget_seconds = budget_seconds
        self._flights: SingleFlight[Claim | Outcome] = SingleFlight()

    # -- deliveries -------------------------------------------------------------------------------------

    async def deliver(self, delivery: Delivery) -> Outcome:
        """The outcome of `delivery`, within the answer's budget.

        Raises `Rejected` if its event is not recorded and its body is not valid. A recorded event is a duplicate
        whatever else its body holds, so a duplicate is never parsed.
        """
        if self._work.draining:
            return _SHUTTING_DOWN
        event_id = delivery.event_id
        if (leader := self._flights.current(event_id)) is not None:
            return self._counted(event_id, await self._follow(delivery, leader), "process")
        flight = self._flights.begin(event_id)
        try:
            with tracing.span("lock"):
                lock = await self._claims.lock(event_id)
            if lock.reply is LockReply.RECORDED:  # most duplicates: answered in the request's own task
                result = outcome.duplicate(event_id)
                flight.end(result)
                return self._counted(event_id, result, "redis")
            await self._claims.check(delivery, lock)
        except BaseException as error:
            flight.fail(error)
            raise
        work = self._work.spawn(self._process(delivery, lock, flight))
        return self._counted(event_id, await self._answer(work, flight), "ledger")

    async def _follow(self, delivery: Delivery, leader: Flight[Claim | Outcome]) -> Outcome:
        """The outcome of a further copy, while the first one (the leader) makes its claims."""
        try:
            result = await leader.follow(self._budget_seconds)
        except TimeoutError:
            return _NOT_IN_TIME
        except LedgerUnavailable:
            delivery.parse()  # the leader's body may not have been valid, and ours may be the same
            return LEDGER_UNREACHABLE
        if isinstance(result, Claim):
            return outcome.duplicate(delivery.event_id)
        if result.kind is Kind.UNHANDLED:
            return ExistingRow(Status.IGNORED, 1, None).answer(delivery.event_id)
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
        slots, limited = self._slots_of(handler), self._limits.of(handler)
        paused = self._pauses.cover(event.type)
        place: Place | None = None
        refused: Refused | None = None
        marked = slots is self._slots  # a batch handler's lanes write the markers
        try:
            if unwanted is None and lock.reply is LockReply.HELD and not paused:
                reserved = await self._limits.reserve(limited, event) if limited else self._reserve(event, slots)
                place, refused = (None, reserved) if isinstance(reserved, Refused) else (reserved, None)
            with tracing.span("claim"), self._work.claiming():
                claim = await self._claims.claim(
                    delivery, lock, unwanted=unwanted, refused=refused, paused=paused, marked=marked
                )
        except BaseException as error:  # noqa: BLE001  (a cancellation is raised again)
            flight.fail(error)
            _give_back(place)
            return unavailable(error, event.id, event.type, "delivery_broke")
        if not isinstance(claim, Claim):
            flight.end(claim)
            _give_back(place)
            if refused is not None:
                refused.recorded(event.id)
            return claim
        (flight.end if marked else flight.announce)(claim)
        try:
            return await self._dispatch(claim, event, handler, place or Place(slots, for_delivery=True))
        except Exception as error:  # noqa: BLE001
            return unavailable(error, event.id, event.type, "delivery_broke")
        finally:
            if not marked:  # until the marker is written, the copies that come to this process are answered here
                flight.end(claim)

    def _counted(self, event_id: str, result: Outcome, stopped_by: metrics.StoppedBy) -> Outcome:
        """Count `result` if it is a duplicate, and return it."""
        if result.kind is Kind.DUPLICATE:
            metrics.duplicates[stopped_by].inc()
            self._duplicates.note(event_id)
        return result

    def _slots_of(self, handler: Handler | str) -> Slots:
        """Where the places of this handler's events are counted."""
        if isinstance(handler, Handler) and handler.batch:
            return self._batches.lanes(handler).places
        return self._slots

    def _reserve(self, event: Event, slots: Slots) -> Place | Refused:
        """A place for a handler, unless none is free, or a thread of this event still runs past its deadline."""
        place = None if event.id in self._slots.hung else slots.reserve()
        return place or Refused(NO_PLACE, recorded=lambda _: slots.overflowed())

    # -- recovery ---------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Learn what is paused before the first delivery, if the ledger can be read by now."""
        with contextlib.suppress(LedgerUnavailable):  # then a round of recovery learns it, as soon as it can
            self.pause(await self._ledger.survey())

    def pause(self, survey: Survey) -> None:
        """Note which types operators have paused."""
        self._pauses.update(survey.paused)

    async def return_abandoned(self, limit: int) -> None:
        """Make the events of vanished processes due again. Raises `LedgerUnavailable`."""
        for event in await self._ledger.return_abandoned(limit):
            log.warning("abandoned", **asdict(event))
            metrics.abandoned.inc()

    async def give_up_unwanted(self, survey: Survey, limit: int) -> None:
        """Make events `dead` that no build has taken a day after their time to give up. Raises `LedgerUnavailable`."""
        for event in await self._backlog.give_up_unwanted(survey, limit):
            log.warning("unwanted", event_id=event.event_id, type=event.queue[0])

    async def recover(self, survey: Survey | None = None) -> bool:
        """Claim due events, as many as `Slots.claimable` says, and dispatch them.

        At most one of them is an event that was abandoned before. `survey`: of this round, if it has made one. Returns
        whether due events are left. Raises `LedgerUnavailable`.
        """
        if self._claims.redis_unreachable or self._work.draining:
            return False
        more = [await self._recover_batched(lanes, survey) for lanes in self._batches]
        claimable = self._slots.claimable
        if not claimable:
            return True
        hung = list(self._slots.hung)
        due = await self._singles.look(claimable, survey, left_out=hung)
        previously_abandoned: list[str] = []
        if self._slots.previously_abandoned_free:
            previously_abandoned = await self._abandoned.look(1, survey, abandoned=True, left_out=hung)
        limited = await self._limits.look(claimable, survey, hung)
        count = min(claimable, self._slots.claimable)  # deliveries may have taken places during the looks
        if limited:
            count = self._limits.share_out(limited, count, len(due) + len(previously_abandoned[:1]))
        chosen = [*previously_abandoned[:1], *self._singles.choose(due, count)][:count]
        places: dict[str, Place] = {each: Place(self._slots, for_delivery=False) for each in chosen}
        places |= self._limits.take_places(limited)
        # In a task of its own, so that claims which are made while recovery is cancelled here are dispatched or
        # released. Otherwise they would count as abandoned when their lease is over.
        backlogs = (self._singles, self._abandoned, *(each.limited.backlog for each in limited))
        got_on = await asyncio.shield(self._work.spawn(self._take_up(places, *backlogs)))
        self._slots.backlog = len(due) > count or any(each.number > each.share for each in limited)
        return (self._slots.backlog and got_on) or any(more)

    async def _recover_batched(self, lanes: Lanes, survey: Survey | None) -> bool:
        """The same for the events of a batch handler: its lanes have places of their own."""
        claimable = min(lanes.places.claimable, MAX_EVENTS)
        if not claimable or self._slots.all_hung:  # its places wake recovery; behind hung threads no lane gets a slot
            return False
        due = await lanes.backlog.look(claimable, survey, left_out=list(self._slots.hung))
        count = min(claimable, lanes.places.claimable)
        places = {each: Place(lanes.places, for_delivery=False) for each in lanes.backlog.choose(due, count)}
        got_on = await asyncio.shield(self._work.spawn(self._take_up(places, lanes.backlog)))
        lanes.places.backlog = len(due) > count
        return lanes.places.backlog and got_on

    async def _take_up(self, places: dict[str, Place], *backlogs: Backlog) -> bool:
        """Claim the events of these places and dispatch them. Those that others hold are left out of the next looks.

        Returns whether another look would find other events. If it would find these again, recovery must pause first.
        """
        unknown = True
        try:
            with self._work.claiming():
                await self._limits.admit(places)
                event_ids = list(places)
                claims, held_by_others = await self._claims.recover(event_ids)
            unknown = self._claims.redis_unreachable
            for backlog in backlogs:
                backlog.leave_out(held_by_others)
            for claim in claims:
                self._work.spawn(self._recovered(claim, places.pop(claim.event_id)))
            if not event_ids or claims:  # no place was free: recovery waits for one
                return True
            return bool(held_by_others) and not any(backlog.is_full for backlog in backlogs)
        finally:
            for place in places.values():
                place.release()
            self._limits.not_claimed(places, unknown=unknown)

    async def _recovered(self, claim: Claim, place: Place) -> Outcome:
        handler = self._routes.registry.find(claim.type)
        links = [tracing.recorded_by(claim.traceparent)]
        with tracing.span("recovered", links, event_id=claim.event_id, attempt=claim.attempt):
            try:
                result = await self._dispatch_recovered(claim, place)
            except Exception as error:  # noqa: BLE001
                result = unavailable(error, claim.event_id, claim.type, "recovery_broke")
            else:
                log.info(
                    "recovered",
                    event_id=claim.event_id,
                    type=claim.type,
                    attempt=claim.attempt,
                    handler=None if handler is None else handler.name,
                    outcome=result.kind,
                )
            metrics.recovered[result.kind].inc()
            tracing.note(outcome=result.kind)
            return result

    async def _dispatch_recovered(self, claim: Claim, place: Place) -> Outcome:
        if claim.body is None:
            return await self._kill(claim, place, "its payload has expired: it cannot be dispatched")
        try:
            event = parse_row(claim.event_id, claim.type, claim.body, claim.endpoint)
        except (FirstclaimError, ValueError) as error:  # accepted by a build with other rules
            return await self._kill(claim, place, f"its payload cannot be read: {error}")
        return await self._dispatch(claim, event, self._routes.find_for(claim.type, event), place)

    async def _dispatch(self, claim: Claim, event: Event, handler: Handler | str, place: Place) -> Outcome:
        if self._work.releasing:
            place.release()
            await self._dispatcher.release(claim)
            return _RELEASED
        if isinstance(handler, str):  # only if the row has another type or mode than its payload
            return await self._kill(claim, place, f"its payload is not the event of its row: {handler}")
        if handler.batch:
            return await self._batches.lanes(handler).run(claim, event, place)
        if (limited := self._limits.of(handler)) is not None:
            return await self._limits.run(limited, claim, event, handler, place)
        return await self._dispatcher.run(claim, event, handler, place)

    async def _kill(self, claim: Claim, place: Place, error: str) -> Outcome:
        try:
            await self._ledger.kill_if_held(claim, error)
        finally:
            place.release()
            self._limits.withdraw(claim.event_id)
        return outcome.dead(claim.event_id, claim.attempt)

    # -- shutdown ---------------------------------------------------------------------------------------

    async def drain(self, seconds: float) -> None:
        """Accept no new work, wait up to `seconds` for running work, then release the rest without a charge."""
        await self._work.drain(seconds)
        await self._dispatcher.releases.close()

    @property
    def unstarted(self) -> list[Claim]:
        """The claims whose attempt has not begun."""
        return [*self._dispatcher.unstarted, *self._batches.unstarted]

    async def release_unstarted(self, claims: Sequence[Claim]) -> None:
        """Release claims that `unstarted` returned, without a charge. Recovery gets those that cannot be released."""
        await self._dispatcher.releases.release_once(claims)


def _give_back(place: Place | None) -> None:
    if place is not None:
        place.release()
