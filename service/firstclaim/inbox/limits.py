"""All handlers with a key or with limits of their own: who gets a place, whose turn it is, and when events may begin.

Guarantees: an event beyond a limit is recorded and not claimed; one that is claimed and then finds its key taken is
released without a charge, and frees its slot at once. So a limit costs the other handlers nothing: what waits for it
holds no slot, no connection and no claim, and recovery leaves it out of its looks or does not look at all. Events of
handlers without options do not come here.

If slots are scarce, recovery gives each to the events of the highest priority, but one in four to the next lower one
that has due events, and so on: no priority, and no number of events, keeps the others waiting without bound.
"""

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from firstclaim import outcome
from firstclaim.event import Event
from firstclaim.follow_up import is_follow_up
from firstclaim.handler_options import Options, key_of, lock_number
from firstclaim.inbox.backlog import Backlog
from firstclaim.inbox.claim import Claim
from firstclaim.inbox.claims import Refused
from firstclaim.inbox.dispatch import KEY_IS_TAKEN, QUEUED, Dispatcher
from firstclaim.inbox.due import Survey
from firstclaim.inbox.keys import Keys
from firstclaim.inbox.limited import Limited, LimitedPlace, Look
from firstclaim.inbox.rate import Rate
from firstclaim.inbox.slots import Place, Slots
from firstclaim.inbox.work import Work
from firstclaim.observability.handler_metrics import limit_metrics
from firstclaim.outcome import Outcome
from firstclaim.registry import Handler

_HIGHER_SHARE = 3 / 4
_OVER_SLOTS = "Recorded; dispatched when its handler has a free slot"
_OVER_RATE = "Recorded; dispatched when the rate of its handler allows it"


class Limits:
    """All handlers with options."""

    def __init__(self, dispatcher: Dispatcher, slots: Slots, work: Work, schema: str) -> None:
        self._dispatcher = dispatcher
        self._slots = slots
        self._work = work
        self._schema = schema
        self._by_options: dict[int, Limited] = {}
        self._keys = Keys(slots.work.set)

    def add(self, handler: Handler, backlog: Callable[[], Backlog], rate: Callable[[str, float], Rate]) -> None:
        """Take a handler in, if it is limited. The handlers of one `@on` share their limits."""
        options = handler.options
        if options.limited and id(options) not in self._by_options:
            rated = None if options.per_second is None else rate(handler.name, options.per_second)
            metrics = limit_metrics(handler.pattern)
            self._by_options[id(options)] = Limited(options, metrics, self._slots, backlog(), rated)
        if options.limited and is_follow_up(handler.pattern):
            self._by_options[id(options)].takes_follow_ups = True

    def of(self, handler: Handler | str) -> Limited | None:
        """The limits of this handler, if it has any."""
        return self._by_options.get(id(handler.options)) if isinstance(handler, Handler) else None

    def __iter__(self) -> Iterator[Limited]:
        return iter(self._by_options.values())

    # -- deliveries -------------------------------------------------------------------------------------

    async def reserve(self, limited: Limited, event: Event) -> LimitedPlace | Refused:
        """A place for a delivery, or why it gets none."""
        if (number := self._number_if_known(limited, event)) is not None and self._keys.is_busy(number):
            limited.metrics.waits["process"].inc()
            return Refused(
                outcome.deferred(KEY_IS_TAKEN),
                self._keys.due_in_seconds(number),
                lambda event_id: self._keys.wait(number, event_id, limited.ready),
            )
        if not limited.places.has_place:
            limited.metrics.refused["slots"].inc()
            return limited.refused(_OVER_SLOTS)
        if not self._slots.has_place or event.id in self._slots.hung:
            return limited.refused(QUEUED)
        place = LimitedPlace(limited, for_delivery=True)
        try:
            admitted = await limited.admit(1)
        except BaseException:
            place.release()
            raise
        if admitted:
            return place
        place.release()
        limited.metrics.refused["per_second"].inc()
        return limited.refused(_OVER_RATE)

    def _number_if_known(self, limited: Limited, event: Event) -> int | None:
        """The lock of the event's key. If its function raises, the event fails by it once it is dispatched."""
        try:
            return self._number(limited.options, event)
        except Exception:  # noqa: BLE001
            return None

    def _number(self, options: Options, event: Event) -> int | None:
        key = None if options.key is None else key_of(options.key, event)
        return None if key is None else lock_number(self._schema, key)

    # -- recovery ---------------------------------------------------------------------------------------

    async def look(self, most: int, survey: Survey | None, hung: Sequence[str]) -> list[Look]:
        """What recovery could claim, for each of the handlers that have something, by descending priority."""
        ready = {limited: await self._ready(limited, most) for limited in self}
        left_out = [*hung, *self._keys.waiting]
        by_priority = sorted(self, key=lambda each: -each.options.priority)
        looks: list[Look] = []
        try:
            for limited in by_priority:
                found = await limited.look(most, survey, ready[limited], left_out, only_surveyed=self._keys.is_full)
                if found is not None:
                    looks.append(found)
                    for event_id in found.first:  # not before: a look that fails would lose the turns of its key
                        if event_id in limited.ready:
                            limited.ready.remove(event_id)
        except BaseException:
            for found in looks:
                self._put_back(found.limited, found.first)
            raise
        return looks

    async def _ready(self, limited: Limited, most: int) -> list[str]:
        """Those whose turn it is and that may begin, `most` at most. The turn of others passes on.

        They wait for something else than their key by now: they are paused, or were tried by another process; or their
        handler is at its limit, and then only the events of other handlers go before them.
        """
        if limited.is_full:
            full = [each.ready for each in self if each.is_full]
            for event_id in [*limited.ready]:
                if not self._keys.has_turn(event_id) or self._keys.pass_on(event_id, full):
                    limited.ready.remove(event_id)
            return []
        asked = [*itertools.islice(limited.ready, most)]
        ready = await limited.backlog.ready(asked)
        for event_id in {*asked} - {*ready}:
            limited.ready.remove(event_id)
            self._keys.withdraw(event_id)
        return ready

    @staticmethod
    def share_out(looks: Sequence[Look], slots: int, others: int) -> int:
        """Give `slots` to the looks and to `others`, due events without a priority; returns how many the others get."""
        left = [look.number for look in looks] + [others]
        levels: dict[int, list[int]] = {}  # by descending priority, the numbers in `left`
        priorities = [look.limited.options.priority for look in looks] + [0]
        for priority, number in sorted(zip(priorities, range(len(left)), strict=True), reverse=True):
            levels.setdefault(priority, []).append(number)
        shares = [0] * len(left)
        for _ in range(min(slots, sum(left))):
            waiting = [level for level in levels.values() if any(left[number] for number in level)]
            level = next((each for each in waiting if random.random() < _HIGHER_SHARE), waiting[-1])  # noqa: S311
            number = random.choices(level, [left[number] for number in level])[0]  # noqa: S311
            shares[number] += 1
            left[number] -= 1
        for look, share in zip(looks, shares, strict=False):
            look.share = share
        return shares[-1]

    def take_places(self, looks: Iterable[Look]) -> dict[str, Place]:
        """A place for each event that a look has a share for, by the event's id."""
        places: dict[str, Place] = {}
        for look in looks:
            limited = look.limited
            others = max(0, look.share - len(look.first))
            chosen = [*look.first[: look.share], *limited.backlog.choose(look.due, others)]
            self._put_back(limited, look.first[look.share :])
            limited.places.backlog = len(look.due) > others
            places |= {event_id: LimitedPlace(limited, for_delivery=False) for event_id in chosen}
        return places

    async def admit(self, places: dict[str, Place]) -> None:
        """Take the places away again, and release them, for which the rate allows no event now."""
        for limited in self:
            own = [event_id for event_id, place in places.items() if _belongs(place, limited)]
            admitted = await limited.admit(len(own))
            for event_id in own[admitted:]:
                places.pop(event_id).release()
            self._put_back(limited, own[admitted:])

    def not_claimed(self, places: Mapping[str, Place], *, unknown: bool) -> None:
        """These events could not be claimed. `unknown`: because the ledger cannot be reached."""
        for event_id, place in places.items():
            if not isinstance(place, LimitedPlace):
                continue
            if unknown:
                self._put_back(place.limited, [event_id])
            else:
                self.withdraw(event_id)

    def withdraw(self, event_id: str) -> None:
        """The event does not come to its handler: if it was its turn, the next one of its key has it now."""
        self._keys.withdraw(event_id)

    def _put_back(self, limited: Limited, event_ids: Sequence[str]) -> None:
        """Those of the events whose turn had come: it is still theirs."""
        limited.ready.extendleft(event_id for event_id in reversed(event_ids) if self._keys.has_turn(event_id))

    # -- dispatch ---------------------------------------------------------------------------------------

    async def run(self, limited: Limited, claim: Claim, event: Event, handler: Handler, place: Place) -> Outcome:
        """Dispatch a claimed event, or let it wait for its key, and release `place`.

        Raises `LedgerUnavailable` if the event's state is unknown or cannot be written.
        """
        try:
            number = self._number(limited.options, event)
        except Exception as error:  # noqa: BLE001  (a user's function may raise anything)
            place.release()
            self._keys.withdraw(claim.event_id)
            with self._work.claiming():
                return await self._dispatcher.fail(claim, handler, error)
        self._keys.change(claim.event_id, number)
        if number is None:
            return await self._dispatcher.run(claim, event, handler, place)
        turn = self._keys.begin(number, claim.event_id, limited.ready)
        if turn is None:
            place.release()
            limited.metrics.waits["process"].inc()
            with self._work.claiming():
                await self._dispatcher.release(claim, due_in_seconds=self._keys.due_in_seconds(number))
            return outcome.deferred(KEY_IS_TAKEN, claim.attempt)
        try:
            return await self._dispatcher.run(claim, event, handler, place, turn=turn)
        finally:
            if turn.missed:
                limited.metrics.waits["fleet"].inc()
            self._keys.end(turn)


def _belongs(place: Place, limited: Limited) -> bool:
    return isinstance(place, LimitedPlace) and place.limited is limited
