"""An event loop for callers that have none: sync code that uses async code, such as users' sync tests.

Guarantees: one loop in one thread of its own for as long as the caller needs it, so that what is opened on it can be
used, and closed, on the same loop.
"""

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from typing import Any, TypeVar

T = TypeVar("T")


class LoopThread:
    """An event loop in a thread of its own, for callers that have none."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True, name="firstclaim-testing")
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` on the loop, and wait for its result here."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def close(self) -> None:
        """Stop the loop, and wait for the end of its thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@contextmanager
def loop_thread() -> Iterator[LoopThread]:
    """One for the duration of the block."""
    thread = LoopThread()
    try:
        yield thread
    finally:
        thread.close()


@contextmanager
def entered(loop: LoopThread, block: AbstractAsyncContextManager[T]) -> Iterator[T]:
    """An async block, entered and left on `loop`."""

    async def enter() -> T:
        return await block.__aenter__()

    async def leave(error: BaseException | None) -> bool | None:
        kind, traceback = (None, None) if error is None else (type(error), error.__traceback__)
        return await block.__aexit__(kind, error, traceback)

    value = loop.run(enter())
    try:
        yield value
    except BaseException as error:
        if not loop.run(leave(error)):
            raise
    else:
        loop.run(leave(None))
