"""Coalescing: concurrent calls share one round trip.

Guarantees: when idle, a call is sent in the same turn of the event loop, and while a batch is under way, calls gather
for the next one; they go past a batch that takes long as soon as it does, unless as many are under way as may be. Each
caller gets the answer to its own item, or an error of its own; one that is cancelled disturbs neither its batch nor its
mates, because a batch runs in a task of its own.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Batcher(Generic[T, R]):
    """Calls of `run` with up to `most` items each; at most `parallel` at once, and a further one only beside late ones.

    A batch is late after `late_seconds`: before, the next one fills; after, a call goes past it.

    `run` answers in the order of its items; an exception in place of an answer is raised to that one caller,
    and one that `run` raises itself to all of the batch.
    """

    def __init__(
        self,
        run: Callable[[Sequence[T]], Awaitable[Sequence[R | Exception]]],
        *,
        most: int,
        parallel: int = 1,
        late_seconds: float = 0,
    ) -> None:
        self._run = run
        self._most = most
        self._parallel = parallel
        self._late_seconds = late_seconds
        self._began = 0.0  # the batch that was sent last, by the loop's clock
        self._look_again: asyncio.TimerHandle | None = None
        self._waiting: deque[tuple[T, asyncio.Future[R]]] = deque()
        self._working = 0
        self._tasks: set[asyncio.Task[None]] = set()  # the loop itself holds them only weakly

    def call(self, item: T) -> asyncio.Future[R]:
        """The answer to `item`, to be awaited."""
        answer: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, answer))
        if not self._working or self._look_again is None:
            self._look()
        return answer

    def _look(self) -> None:
        """Send what waits; or, beside a batch that is not late yet, look again when it is."""
        if self._look_again is not None:
            self._look_again.cancel()
            self._look_again = None
        if not self._waiting or self._working >= self._parallel:
            return
        loop = asyncio.get_running_loop()
        late_at = self._began + self._late_seconds
        if self._working and loop.time() < late_at:
            self._look_again = loop.call_at(late_at, self._look)
            return
        self._working += 1
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
            batch = [self._waiting.popleft() for _ in range(min(self._most, len(self._waiting)))]
            try:
                answers = await self._run([item for item, _ in batch])
            except Exception as error:  # noqa: BLE001  (every caller has to hear of it)
                answers = [error] * len(batch)
            for (_, future), answer in zip(batch, answers, strict=True):
                if future.cancelled():
                    continue
                if isinstance(answer, Exception):
                    future.set_exception(answer)
                else:
                    future.set_result(answer)
        # Counted off in the same breath as nothing was found waiting: a call in between would wait for ever.
        self._working -= 1
