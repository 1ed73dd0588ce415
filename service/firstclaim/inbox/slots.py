"""The handler slots of one process: how many handlers run at once, and how many claims wait for a slot.

Guarantees: at most `size` handlers run at once. Of the events that were abandoned before, one at a time: such an event
may end the process again, and then it takes as few others with it as possible.
"""

import asyncio
import contextlib
from collections.abc import Callable


class Slots:
    """`size` slots, and the claims that wait for one."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._slots = asyncio.Semaphore(size)
        self._previously_abandoned = asyncio.Semaphore(1)
        self._waiting = 0
        self._running = 0
        self._half_free = asyncio.Event()
        self._half_free.set()

    @property
    def free(self) -> int:
        """How many handlers could start now; claims that already wait for a slot are subtracted."""
        return max(0, self._size - self._running - self._waiting)

    @property
    def previously_abandoned_free(self) -> bool:
        """Whether an event that was abandoned before could start now."""
        return not self._previously_abandoned.locked()

    async def wait_for_capacity(self) -> None:
        """Wait until half of the slots are free: recovery then fetches a batch, not single events."""
        await self._half_free.wait()

    async def enter(self, *, previously_abandoned: bool, timeout_seconds: float) -> Callable[[], None] | None:
        """Wait for a slot; returns the function that frees it, to be called once, or None after `timeout_seconds`."""
        gates = [self._previously_abandoned, self._slots] if previously_abandoned else [self._slots]
        entered: list[asyncio.Semaphore] = []
        full = any(gate.locked() for gate in gates)
        self._count(waiting=1)
        try:
            async with asyncio.timeout(timeout_seconds) if full else contextlib.nullcontext():
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

        def leave() -> None:
            self._count(running=-1)
            for gate in entered:
                gate.release()

        return leave

    def _count(self, *, waiting: int = 0, running: int = 0) -> None:
        self._waiting += waiting
        self._running += running
        if self.free * 2 >= self._size:
            self._half_free.set()
        else:
            self._half_free.clear()
