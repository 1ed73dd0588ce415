"""The work of one process that a graceful shutdown waits for: of deliveries, of recovery, and of batches.

Guarantees: all of it runs in tasks that are known here, so that nothing is left behind unnoticed. When the time of a
shutdown is over, what runs is cancelled, except for claims that are being made: a row may be ours already, and if
nobody were there to release it, the event would count as abandoned. Nor is a task cancelled that has not begun: it may
have a claim, and none of its code would run that could release it. It begins, and sees `releasing`.
"""

import asyncio
import contextlib
import inspect
import time
from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar

import structlog

log = structlog.get_logger(__name__)

T = TypeVar("T")

_RELEASE_SECONDS = 1.5  # for releases at the end of a drain, of the 2 s that a shutdown reserves for closing


class Work:
    """The tasks. `draining`: nothing new is accepted. `releasing`: what is claimed from now on is released."""

    def __init__(self) -> None:
        self.tasks: set[asyncio.Task[Any]] = set()
        self.draining = False
        self.releasing = False
        self._claiming: set[asyncio.Task[Any] | None] = set()

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run it in a task of its own."""
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    @contextlib.contextmanager
    def claiming(self) -> Iterator[None]:
        """The current task makes claims, or releases one, while the block runs."""
        task = asyncio.current_task()
        self._claiming.add(task)
        try:
            yield
        finally:
            self._claiming.discard(task)

    async def drain(self, seconds: float) -> None:
        """Wait up to `seconds` for what runs, then cancel the rest, which releases its claims."""
        self.draining = True
        await self._ended(time.monotonic() + seconds)
        self.releasing = True
        for task in self.tasks - self._claiming:
            if _has_begun(task):
                task.cancel()
        if self.tasks:
            log.info("releasing", events=len(self.tasks))
            await self._ended(time.monotonic() + _RELEASE_SECONDS)

    async def _ended(self, deadline: float) -> None:
        """Wait until `deadline` for all work, also for what begins meanwhile: a task that claims starts others."""
        while self.tasks:
            await asyncio.wait(self.tasks, timeout=max(0, deadline - time.monotonic()))
            if time.monotonic() >= deadline:
                break


def _has_begun(task: asyncio.Task[Any]) -> bool:
    work = task.get_coro()
    return not inspect.iscoroutine(work) or inspect.getcoroutinestate(work) != inspect.CORO_CREATED
