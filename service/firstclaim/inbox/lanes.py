"""Batches: the claimed events of a batch handler gather, and are dispatched together.

Guarantees: no timer delays an event. A batch is what gathered while the lanes of its handler were busy. A lane occupies
one handler slot, and runs one batch at a time (`firstclaim.inbox.batch_dispatch`). An event whose earlier attempt was
abandoned, or has left another error, never enters a batch: it goes alone. So an event that ends its process, or fails,
drags no other along a second time. Of a batch whose process dies, each event counts as abandoned, so that each comes
back alone.

A claim that has waited for half of its lease is released without a charge, as every claim is that gets no slot.
"""

import asyncio
import contextvars
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from firstclaim import outcome
from firstclaim.event import Event
from firstclaim.inbox.backlog import Backlog
from firstclaim.inbox.batch_dispatch import BatchDispatcher, Member
from firstclaim.inbox.dispatch import QUEUED
from firstclaim.inbox.ledger import Claim
from firstclaim.inbox.slots import Place, Slots
from firstclaim.outcome import Outcome
from firstclaim.registry import Handler

MAX_EVENTS = 64  # in a batch: a larger one saves little more, and more events run again if one of them fails
MAX_LANES = 3  # one whose handler runs, one that commits, one that begins


class Lanes:
    """The lanes of one batch handler. `places` counts the events that are in them or wait for them.

    `spawn` starts a task that a graceful shutdown waits for.
    """

    def __init__(
        self,
        batches: BatchDispatcher,
        slots: Slots,
        backlog: Backlog,
        spawn: Callable[[Coroutine[Any, Any, None]], object],
    ) -> None:
        most = MAX_LANES * MAX_EVENTS  # what the lanes can run, and no more: a crash charges what is claimed
        self.places = Slots(most, places=most, work=slots.work)
        self.backlog = backlog
        self._batches = batches
        self._slots = slots
        self._spawn = spawn
        self._members: set[Member] = set()
        self._waiting: deque[Member] = deque()  # those that no lane has taken
        self._lanes = 0
        self._lane_begins = False
        self._expiry: asyncio.TimerHandle | None = None
        # Events that go alone use half of the slots at most, however many batches have failed.
        self._alone = asyncio.Semaphore(max(1, slots.size // 2))

    @property
    def unstarted(self) -> list[Claim]:
        """The claims whose attempt has not begun. The dispatcher has those that go alone and wait for a slot."""
        return [member.claim for member in self._members if not member.begun and not member.ended]

    async def run(self, claim: Claim, event: Event, place: Place) -> Outcome:
        """Dispatch a claimed event, alone or in a batch, and release `place`.

        Raises `LedgerUnavailable` if the event's state is unknown or cannot be written.
        """
        member = Member(claim, event, asyncio.get_running_loop())
        self._members.add(member)
        try:
            if claim.erred or claim.abandoned:
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
        """Begin a lane if one is free. It takes what comes in this turn of the event loop, too."""
        if self._lanes < MAX_LANES:
            if not self._lane_begins:
                self._lane_begins = True
                self._lanes += 1
                # In a context of its own: a batch belongs to none of its deliveries.
                contextvars.Context().run(self._spawn, self._run_lane())
        elif self._expiry is None:
            self._expire()

    async def _run_lane(self) -> None:
        self._lane_begins = False
        try:
            while self._waiting:
                members = [self._waiting.popleft() for _ in range(min(MAX_EVENTS, len(self._waiting)))]
                if self._waiting:  # more than a batch may hold
                    self._start()
                if len(members) == 1:
                    await self._end(members[0], self._run_one(members[0]))
                    continue
                for member in await self._batches.run(members):
                    self._spawn(self._end(member, self._run_alone(member)))
        finally:  # no await between the empty queue and this line: an event in between would wait for ever
            self._lanes -= 1

    def _expire(self) -> None:
        """Release the events that have waited for half of their lease, and come again for the next."""
        loop = asyncio.get_running_loop()
        self._expiry = None
        while self._waiting:
            ends_at = self._waiting[0].leased_at + self._batches.lease_seconds / 2
            if ends_at > loop.time():
                self._expiry = loop.call_at(ends_at, self._expire)
                return
            self._spawn(self._batches.release(self._waiting.popleft()))

    # -- alone ------------------------------------------------------------------------------------------

    async def _run_alone(self, member: Member) -> Outcome:
        """Dispatch the event by itself, or release it if many others do: the wait for a slot is still to come."""
        try:
            async with asyncio.timeout_at(member.leased_at + self._batches.lease_seconds / 4):
                await self._alone.acquire()
        except TimeoutError:
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
            await self._batches.claims.mark([member.claim])
        except asyncio.CancelledError:
            await self._batches.dispatcher.release(member.claim)
            raise
        member.begun = True  # from here on the dispatcher knows it
        place = Place(self._slots, for_delivery=True)
        return await self._batches.dispatcher.run(member.claim, member.event, self._batches.handler, place)

    @staticmethod
    async def _end(member: Member, work: Coroutine[Any, Any, Outcome]) -> None:
        """End the member with the outcome of `work`."""
        try:
            member.end(await work)
        except Exception as error:  # noqa: BLE001  (who waits for the member answers with it)
            member.fail(error)


class Batches:
    """The lanes of all batch handlers, and the tasks that a graceful shutdown waits for."""

    def __init__(self, slots: Slots) -> None:
        self.tasks: set[asyncio.Task[Any]] = set()
        self._slots = slots
        self._lanes: dict[Handler, Lanes] = {}

    def add(self, batches: BatchDispatcher, backlog: Backlog) -> None:
        """Open lanes for the handler of `batches`; `backlog` has its due events."""
        self._lanes[batches.handler] = Lanes(batches, self._slots, backlog, self._spawn)

    def lanes(self, handler: Handler) -> Lanes:
        """The lanes of this batch handler."""
        return self._lanes[handler]

    def __iter__(self) -> Iterator[Lanes]:
        return iter(self._lanes.values())

    @property
    def unstarted(self) -> list[Claim]:
        """The claims whose attempt has not begun."""
        return [claim for lanes in self for claim in lanes.unstarted]

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
