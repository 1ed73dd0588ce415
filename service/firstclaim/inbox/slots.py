"""The handler slots of one process, and the places of the claims that wait for one.

Guarantees: at most `size` handlers run at once, and the process holds at most twice as many claims: a delivery that
gets no place is not claimed. So memory is bounded, and a crash abandons at most twice as many events as there are
slots. While there is a backlog, deliveries leave half of the slots to recovery: otherwise, at a load just above
capacity, the oldest event would wait without bound. Of the events that were abandoned before, only one runs at a time:
it may end the process again, and then as few other events as possible are abandoned with it.

Under a backlog of brief handlers, recovery claims ahead: half as many events as there are slots wait in this process,
and start in the moment a slot is free. Otherwise each slot would be empty for a round of recovery after each event.
With a handler of 0.1 s that costs throughput (measured with `tests.load.drain`: a fifth with 20 slots, a fourteenth
with 4), with one of a second it does not. Without a backlog nothing is claimed ahead: another process may have the free
slot.
"""

import asyncio
import contextlib
import time
from typing import Any

from firstclaim.observability.handler_metrics import HandlerMetrics

_BRIEF_SECONDS = 1.0


class Place:
    """The place of one claim, from its reservation until `release`: it waits for a slot (`enter`), then occupies it."""

    def __init__(self, slots: "Slots", *, for_delivery: bool) -> None:
        self.slots = slots
        self._for_delivery = for_delivery
        self._entered: list[asyncio.Semaphore] = []
        self._released = False
        self._entered_at: float | None = None
        self._metrics: HandlerMetrics | None = None
        slots.count(for_delivery=for_delivery, change=1)

    async def enter(
        self, metrics: HandlerMetrics | None = None, *, previously_abandoned: bool, timeout_seconds: float
    ) -> bool:
        """Wait for a slot. Returns whether there was one within `timeout_seconds`. `metrics`: the handler's."""
        gates = self.slots.gates(previously_abandoned=previously_abandoned)
        full = any(gate.locked() for gate in gates)
        try:
            async with asyncio.timeout(timeout_seconds) if full else contextlib.nullcontext():
                for gate in gates:
                    await gate.acquire()
                    self._entered.append(gate)
        except TimeoutError:
            return False
        self._entered_at = time.monotonic()
        if metrics is not None:
            self._metrics = metrics
            metrics.slots_in_use.inc()
            if previously_abandoned:
                metrics.slots_held["previously_abandoned"].inc()
        return True

    def release(self, running: asyncio.Future[Any] | None = None) -> None:
        """Free the place, now or when `running` ends: a handler that ignores the end of its attempt keeps its slot.

        The next event that was abandoned before may run at once: it does not wait for such a handler.
        """
        if self.slots.previously_abandoned in self._entered:
            self._entered.remove(self.slots.previously_abandoned)
            self.slots.previously_abandoned.release()
            self.slots.work.set()
            if self._metrics is not None:
                self._metrics.slots_held["previously_abandoned"].dec()
        if running is None:
            self._free()
        else:
            running.add_done_callback(lambda _: self._free())

    def _free(self) -> None:
        if self._released:
            return
        self._released = True
        if self._entered_at is not None:
            self.slots.brief = time.monotonic() - self._entered_at < _BRIEF_SECONDS
        if self._metrics is not None:
            self._metrics.slots_in_use.dec()
        for gate in self._entered:
            gate.release()
        self.slots.count(for_delivery=self._for_delivery, change=-1)


class Slots:
    """`size` slots, and `places` for claims, by default twice as many. `work`: what wakes recovery, if it is shared."""

    def __init__(self, size: int, *, places: int | None = None, work: asyncio.Event | None = None) -> None:
        self.size = size
        self._places = 2 * size if places is None else places
        self.previously_abandoned = asyncio.Semaphore(1)
        self.backlog = False  # the last round of recovery left due events behind
        self.brief = False  # the handler that ended last had its slot for less than a second
        self.wakes = 0  # how often follow-ups were committed that were due at once
        self.work = work or asyncio.Event()  # recovery has work before its next interval
        self._shares_work = work is not None
        self.hung: dict[str, asyncio.Future[Any]] = {}  # event id: the thread that ignores its deadline
        self._slots = asyncio.Semaphore(size)
        self._deliveries = 0
        self._recovered = 0
        self._capacity = asyncio.Event()
        self._capacity.set()

    def reserve(self) -> Place | None:
        """A place for a delivery. None if it could not start soon: then it is recorded for recovery."""
        return Place(self, for_delivery=True) if self.has_place else None

    @property
    def has_place(self) -> bool:
        """Whether a delivery gets a place now."""
        limit = self.size // 2 if self.backlog else self._places
        return self._deliveries < limit and self._deliveries + self._recovered < self._places

    def overflowed(self) -> None:
        """Note that a delivery was recorded without a place: there is a backlog, so recovery is woken."""
        self.backlog = True
        # Recovery does not wait for the capacity of slots that share its work: it would look in vain each time.
        if self._has_capacity or not self._shares_work:
            self.work.set()

    def wake(self) -> None:
        """Wake recovery: follow-ups that are due at once have been committed."""
        self.wakes += 1
        self.work.set()

    @property
    def free(self) -> int:
        """How many slots no claim occupies or waits for."""
        return max(0, self.size - self._deliveries - self._recovered)

    @property
    def claimable(self) -> int:
        """How many due events recovery may claim now. Under a backlog, deliveries leave it half of the slots."""
        ahead = self.size // 2 if self.backlog and self.brief else 0
        return max(0, self.size + ahead - self._deliveries - self._recovered)

    @property
    def previously_abandoned_free(self) -> bool:
        """Whether an event that was abandoned before could start now."""
        return not self.previously_abandoned.locked()

    async def wait_for_capacity(self) -> None:
        """Wait until recovery may claim a quarter of the slots: it then fetches a batch, not single events."""
        # Looked at anew: without a backlog, or behind a slow handler, fewer are claimable than at the last count.
        while not self._has_capacity:
            self._capacity.clear()
            await self._capacity.wait()

    @property
    def _has_capacity(self) -> bool:
        return self.claimable * 4 >= self.size

    async def wait_for_work(self) -> None:
        """Wait until a delivery has been recorded without a place, or a previously abandoned event has ended."""
        await self.work.wait()
        self.work.clear()

    @property
    def all_hung(self) -> bool:
        """Whether every slot is held by a thread that ignores its deadline: then only a restart helps."""
        return len(self.hung) >= self.size

    def hang(self, event_id: str, running: asyncio.Future[Any]) -> None:
        """Note that a thread ignores its deadline: while it runs, this process does not try its event again."""
        self.hung[event_id] = running
        running.add_done_callback(lambda _: self.hung.pop(event_id, None))

    def gates(self, *, previously_abandoned: bool) -> list[asyncio.Semaphore]:
        """The semaphores that a claim acquires, in this order."""
        return [self.previously_abandoned, self._slots] if previously_abandoned else [self._slots]

    def count(self, *, for_delivery: bool, change: int) -> None:
        """Count a place that was reserved (`change` 1) or released (-1)."""
        if for_delivery:
            self._deliveries += change
        else:
            self._recovered += change
        if self._has_capacity:
            if self._shares_work and self.backlog and not self._capacity.is_set():
                self.work.set()  # recovery does not wait for the capacity of these
            self._capacity.set()
        else:
            self._capacity.clear()
