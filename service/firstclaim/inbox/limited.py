"""The handlers of one `@on` with options: their places, their rate, and what recovery may claim for them.

Guarantees: no more of their events run in this process than they have slots, and none begins that their rate does not
admit. A look finds no more events than could begin.
"""

import asyncio
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from firstclaim import outcome
from firstclaim.handler_options import Options
from firstclaim.inbox.backlog import Backlog
from firstclaim.inbox.claims import Refused
from firstclaim.inbox.due import Survey
from firstclaim.inbox.rate import Rate
from firstclaim.inbox.slots import Place, Slots
from firstclaim.observability.handler_metrics import HandlerMetrics, LimitMetrics


class LimitedPlace(Place):
    """A place among those of a handler with limits, and one among those of all handlers."""

    def __init__(self, limited: "Limited", *, for_delivery: bool) -> None:
        super().__init__(limited.places, for_delivery=for_delivery)
        self.limited = limited
        self._shared = Place(limited.slots, for_delivery=for_delivery)

    async def enter(
        self, metrics: HandlerMetrics | None = None, *, previously_abandoned: bool, timeout_seconds: float
    ) -> bool:
        """Wait for a slot of the handler's own, then for one of all."""
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + timeout_seconds
        if not await super().enter(previously_abandoned=False, timeout_seconds=timeout_seconds):
            return False
        return await self._shared.enter(
            metrics, previously_abandoned=previously_abandoned, timeout_seconds=ends_at - loop.time()
        )

    def release(self, running: asyncio.Future[object] | None = None) -> None:
        """Free both places, now or when `running` ends."""
        super().release(running)
        self._shared.release(running)


class Limited:
    """The handlers of one `@on` with options. `slots` are those of all handlers, `backlog` has their due events."""

    def __init__(self, options: Options, metrics: LimitMetrics, slots: Slots, backlog: Backlog, rate: Rate | None):
        self.options = options
        self.metrics = metrics
        self.slots = slots
        size = slots.size if options.slots is None else min(options.slots, slots.size)
        self.places = Slots(size, places=2 * size if options.slots is None else size, work=slots.work)
        self.backlog = backlog
        self.ready: deque[str] = deque()  # events whose key is free now
        self._rate = rate
        self.takes_follow_ups = False
        self._wakes = slots.wakes  # as of the last look
        self._opens_at: float | None = None  # the rate is used up until then, by the event loop's clock

    @property
    def is_full(self) -> bool:
        """Whether none of its events could begin now, by the handler's own limits."""
        return self._opens_at is not None or self.places.claimable <= 0

    @property
    def _is_woken(self) -> bool:
        """Whether follow-ups were committed since the last look, which may be for these handlers."""
        return self.takes_follow_ups and self._wakes != self.slots.wakes

    def refused(self, reason: str) -> Refused:
        """A delivery gets no place: recovery looks for its event, once it is recorded."""
        return Refused(outcome.deferred(reason), recorded=lambda _: self.places.overflowed())

    async def look(
        self, most: int, survey: Survey | None, ready: Sequence[str], left_out: Sequence[str], *, only_surveyed: bool
    ) -> "Look | None":
        """What recovery could claim for these handlers, `most` at most. None: nothing, or nothing that may begin.

        `ready`: those of `self.ready` that may. `only_surveyed`: look for due events only in a round that has made a
        survey.
        """
        if self.is_full:
            return None
        count = min(most, self.places.claimable)
        found = Look(self, list(ready[:count]), most=count)
        if survey is None and (only_surveyed or not (self.places.backlog or self._is_woken)):
            return found if found.first else None  # no other event has come to wait since the last look
        self._wakes = self.slots.wakes
        found.due = await self.backlog.look(count, survey, left_out=left_out)
        if survey is not None and survey.abandoned and self.slots.previously_abandoned_free:
            abandoned_before = await self.backlog.look(1, survey, abandoned=True, left_out=left_out)
            found.first += abandoned_before[:1]
        return found

    async def admit(self, wanted: int) -> int:
        """How many of `wanted` events may begin now, by the rate. If not all: recovery is woken when more may."""
        if self._rate is None or not wanted:
            return wanted
        if self._opens_at is not None:
            return 0
        granted = await self._rate.take(wanted)
        if not granted.events and self._opens_at is None:
            loop = asyncio.get_running_loop()
            seconds = granted.wait_seconds * random.uniform(1, 1.25)  # noqa: S311  (processes ask one after the other)
            self._opens_at = loop.time() + seconds
            loop.call_later(seconds, self._open)
        if granted.events < wanted:
            self.places.backlog = True
            if granted.events:
                self.slots.work.set()
        return granted.events

    def _open(self) -> None:
        self._opens_at = None
        if self.places.backlog or self.ready:
            self.slots.work.set()


@dataclass(slots=True)
class Look:
    """What a look has found: `first` goes before the rest of `due`. `share`: how many of them get a slot."""

    limited: Limited
    first: list[str] = field(default_factory=list)
    due: list[str] = field(default_factory=list)
    most: int = 0
    share: int = 0

    @property
    def number(self) -> int:
        """How many events could begin."""
        return min(self.most, len(self.first) + len(self.due))
