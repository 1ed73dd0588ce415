"""Coalescing: concurrent calls share one round trip.

Guarantees: while no batch is running, a call is sent in the same turn of the event loop. While one is running, calls
gather for the next. If the running batch is late, the next one starts beside it, up to the maximum number of batches.
Each caller gets the answer to its own item, or an error of its own. A batch runs in a task of its own, so a caller that
is cancelled disturbs no other.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Batcher(Generic[T, R]):
    """Calls of `run` with up to `max_items` items each; at most `parallel` batches at once.

    A further batch starts only beside one that is late, that is, has been running for `late_seconds`.

    `run` answers in the order of its items. An exception in place of an answer is raised to that one caller, and one
    that `run` raises is raised to all callers of the batch.
    """

    def __init__(
        self,
        run: Callable[[Sequence[T]], Awaitable[Sequence[R | Exception]]],
        *,
        max_items: int,
        parallel: int = 1,
        late_seconds: float = 0,
    ) -> None:
        self._run = run
        self._max_items = max_items
        self._parallel = parallel
        self._late_seconds = late_seconds
        self._began = 0.0  # the batch that was sent last, by the loop's clock
        self._late_timer: asyncio.TimerHandle | None = None
        self._waiting: deque[tuple[T, asyncio.Future[R]]] = deque()
        self._running = 0
        self._tasks: set[asyncio.Task[None]] = set()  # the loop itself holds them only weakly

    def call(self, item: T) -> asyncio.Future[R]:
        """The answer to `item`, to be awaited."""
        answer: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, answer))
        if not self._running or self._late_timer is None:
            self._start()
        return answer

    def _start(self) -> None:
        """Send the waiting items, or wait until the running batch is late."""
        if self._late_timer is not None:
            self._late_timer.cancel()
            self._late_timer = None
        if not self._waiting or self._running >= self._parallel:
            return
        loop = asyncio.get_running_loop()
        late_at = self._began + self._late_seconds
        if self._running and loop.time() < late_at:
            self._late_timer = loop.call_at(late_at, self._start)
            return
        self._running += 1
        self._began = loop.time()
        task = loop.create_task(self._work())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def refuse_waiting(self, error: Exception) -> None:
        """Raise `error` to all whose batch has not begun."""
        while self._waiting:
            _, future = self._waiting.popleft()
            if not future.cancelled():
                future.set_exception(error)

    async def _work(self) -> None:
        while self._waiting:
            self._began = asyncio.get_running_loop().time()
            batch = [self._waiting.popleft() for _ in range(min(self._max_items, len(self._waiting)))]
            try:
                answers = await self._run([item for item, _ in batch])
            except Exception as error:  # noqa: BLE001  (raised to every caller)
                answers = [error] * len(batch)
            for (_, future), answer in zip(batch, answers, strict=True):
                if future.cancelled():
                    continue
                if isinstance(answer, Exception):
                    future.set_exception(answer)
                else:
                    future.set_result(answer)
        # No await between the empty queue and this line: a call in between would wait for ever.
        self._running -= 1
