"""Batches: the claimed events of a batch handler gather, and are dispatched together.

Guarantees: no timer delays an event. A batch is what gathered while the lanes of its handler were busy. A lane occupies
one handler slot, and runs one batch at a time (`firstclaim.inbox.batch_dispatch`). An event that was abandoned
before, or whose batch has failed, goes alone. So an event that ends its process, or fails, affects the other events of
its batch only once. If the process of a batch dies, each of its events counts as abandoned, so each comes back alone.

An event that has failed alone gathers only with others that have failed alone too. So it fails no batch of new events,
and what an outage has left behind goes in batches: one by one, 1,000 events whose handler takes 0.1 s took nine times
as long (measured).

A claim that has waited for half of its lease is released without a charge, as every claim is that gets no slot.
"""

import asyncio
import contextvars
from collections import deque
from collections.abc import Coroutine, Iterator
from typing import Any

from firstclaim import outcome
from firstclaim.event import Event
from firstclaim.inbox.backlog import Backlog
from firstclaim.inbox.batch_dispatch import BatchDispatcher, Member
from firstclaim.inbox.claim import Claim
from firstclaim.inbox.dispatch import QUEUED
from firstclaim.inbox.slots import Place, Slots
from firstclaim.inbox.work import Work
from firstclaim.observability import tracing
from firstclaim.outcome import Outcome
from firstclaim.registry import Handler

MAX_EVENTS = 64  # in a batch: a larger one saves little more, and more events run again if one of them fails
MAX_LANES = 3  # one whose handler runs, one that commits, one that begins


class Lanes:
    """The lanes of one batch handler. `places` counts the events that are in them or wait for them."""

    def __init__(self, batches: BatchDispatcher, slots: Slots, backlog: Backlog, work: Work) -> None:
        most = MAX_LANES * MAX_EVENTS  # what the lanes can run, and no more: a crash charges what is claimed
        self.places = Slots(most, places=most, work=slots.work)
        self.backlog = backlog
        self._batches = batches
        self._slots = slots
        self._work = work
        self._members: set[Member] = set()
        self._waiting: deque[Member] = deque()  # those that no lane has taken
        self._lanes = 0
        self._lane_begins = False
        self._expiry: asyncio.TimerHandle | None = None
        # Events that go alone use half of the slots at most, however many batches have failed.
        self._alone = asyncio.Semaphore(max(1, slots.size // 2))

    @property
    def unstarted(self) -> list[Claim]:
        """The claims whose attempt has not begun, except those in `Dispatcher.unstarted`: they go alone."""
        return [member.claim for member in self._members if not member.begun and not member.ended]

    async def run(self, claim: Claim, event: Event, place: Place) -> Outcome:
        """Dispatch a claimed event, alone or in a batch, and release `place`.

        Raises `LedgerUnavailable` if the event's state is unknown or cannot be written.
        """
        member = Member(claim, event, asyncio.get_running_loop())
        self._members.add(member)
        try:
            if claim.alone or claim.abandoned:
                return await self._run_alone(member)
            self._waiting.append(member)
            self._start()
            return await member.result
        except asyncio.CancelledError:  # a shutdown; what a lane has taken, the lane releases
            if member in self._waiting:
                self._waiting.remove(member)
                await self._batches.dispatcher.release(claim)
            raise
        finally:
            self._members.discard(member)
            place.release()

    def _start(self) -> None:
        """Begin a lane if one is free. It also takes the events that come later in this turn of the event loop."""
        if self._lanes < MAX_LANES:
            if not self._lane_begins:
                self._lane_begins = True
                self._lanes += 1
                # In a context of its own: a batch belongs to none of its deliveries.
                contextvars.Context().run(self._work.spawn, self._run_lane())
        elif self._expiry is None:
            self._expire()

    async def _run_lane(self) -> None:
        self._lane_begins = False
        try:
            while self._waiting and not self._work.releasing:  # then who waits for each member releases it
                members = self._take()
                if self._waiting:  # more than a batch may hold
                    self._start()
                if len(members) == 1:
                    await self._end(members[0], self._run_one(members[0]))
                    continue
                await self._batches.run(members, self._go_alone)
        finally:  # no await between the empty queue and this line: an event in between would wait for ever
            self._lanes -= 1

    def _take(self) -> list[Member]:
        """The next batch: those that have waited longest, of events that have failed before or of the others.

        An event is in it once: one that had a handler before it had several may have two rows that are due.
        """
        erred = self._waiting[0].claim.erred
        taken: dict[str, Member] = {}
        left: deque[Member] = deque()
        for member in self._waiting:
            if member.claim.erred is erred and len(taken) < MAX_EVENTS and member.event.id not in taken:
                taken[member.event.id] = member
            else:
                left.append(member)
        self._waiting = left
        return list(taken.values())

    def _expire(self) -> None:
        """Release the events that have waited for half of their lease, and set the timer for the next ones."""
        loop = asyncio.get_running_loop()
        self._expiry = None
        while self._waiting:
            ends_at = self._waiting[0].leased_at + self._batches.lease_seconds / 2
            if ends_at > loop.time():
                self._expiry = loop.call_at(ends_at, self._expire)
                return
            self._work.spawn(self._release(self._waiting.popleft()))

    async def _release(self, member: Member) -> None:
        with self._work.claiming():  # a drain does not cancel it either: nobody else would release it
            await self._batches.release(member)

    # -- alone ------------------------------------------------------------------------------------------

    def _go_alone(self, member: Member) -> None:
        self._work.spawn(self._end(member, self._run_alone(member)))

    async def _run_alone(self, member: Member) -> Outcome:
        """Dispatch the event by itself, or release it if many others do: the wait for a slot is still to come."""
        if self._work.releasing:
            await self._batches.dispatcher.release(member.claim)
            return outcome.deferred(QUEUED, member.claim.attempt)
        try:
            async with asyncio.timeout_at(member.leased_at + self._batches.lease_seconds / 4):
                await self._alone.acquire()
        except TimeoutError:
            with self._work.claiming():
                await self._batches.dispatcher.release(member.claim)
            return outcome.deferred(QUEUED, member.claim.attempt)
        except asyncio.CancelledError:
            await self._batches.dispatcher.release(member.claim)
            raise
        try:
            return await self._run_one(member)
        finally:
            self._alone.release()

    async def _run_one(self, member: Member) -> Outcome:
        """Write the marker, and dispatch the event as one of an ordinary handler."""
        try:
            await self._batches.dispatcher.claims.mark([member.claim])
        except asyncio.CancelledError:
            await self._batches.dispatcher.release(member.claim)
            raise
        member.begun = True  # from here on the dispatcher knows it
        place = Place(self._slots, for_delivery=True)
        waited = asyncio.get_running_loop().time() - member.leased_at
        with tracing.within(member.span):
            return await self._batches.dispatcher.run(
                member.claim, member.event, self._batches.handler, place, waited_seconds=waited
            )

    @staticmethod
    async def _end(member: Member, work: Coroutine[Any, Any, Outcome]) -> None:
        """End the member with the outcome of `work`."""
        try:
            member.end(await work)
        except Exception as error:  # noqa: BLE001  (who waits for the member answers with it)
            member.fail(error)


class Batches:
    """The lanes of all batch handlers."""

    def __init__(self, slots: Slots, work: Work) -> None:
        self._slots = slots
        self._work = work
        self._lanes: dict[Handler, Lanes] = {}

    def add(self, batches: BatchDispatcher, backlog: Backlog) -> None:
        """Open lanes for the handler of `batches`; `backlog` has its due events."""
        self._lanes[batches.handler] = Lanes(batches, self._slots, backlog, self._work)

    def lanes(self, handler: Handler) -> Lanes:
        """The lanes of this batch handler."""
        return self._lanes[handler]

    def __iter__(self) -> Iterator[Lanes]:
        return iter(self._lanes.values())

    @property
    def unstarted(self) -> list[Claim]:
        """The claims whose attempt has not begun."""
        return [claim for lanes in self for claim in lanes.unstarted]
