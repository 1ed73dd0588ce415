"""Graceful shutdown: SIGTERM, drain, stop accepting, finish or release the work in flight, close.

Guarantees: the first signal only starts the drain delay. During the delay everything is still served, and `/readyz`
returns 503. The server's own signal handling runs after the delay. A second signal skips the delay. A worker whose
supervisor was killed shuts itself down, because no other process would.
"""

import asyncio
import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import structlog

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Shutdown:
    """Whether a shutdown was requested, and how much of its time is left."""

    drain_seconds: float
    shutdown_seconds: float
    _requested_at: float | None = None

    @property
    def requested(self) -> bool:
        """Whether a signal was received."""
        return self._requested_at is not None

    @property
    def remaining_seconds(self) -> float:
        """The time left for the shutdown. All of it, if no shutdown was requested."""
        spent = 0.0 if self._requested_at is None else time.monotonic() - self._requested_at
        return max(0.0, self.shutdown_seconds - spent)

    def install(self) -> None:
        """Delay the server's handling of SIGTERM and SIGINT by the drain. Must be called on the server's event loop."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            previous = signal.getsignal(number)
            if callable(previous):
                with contextlib.suppress(ValueError):  # not the main thread: another program embeds the application
                    signal.signal(number, self._delayed(previous, loop))

    def _delayed(self, proceed: Callable[..., Any], loop: asyncio.AbstractEventLoop) -> Callable[..., None]:
        def begin(number: int, frame: FrameType | None) -> None:
            delay = 0.0 if self.requested else self.drain_seconds
            if self._requested_at is None:
                self._requested_at = time.monotonic()
            loop.call_soon_threadsafe(loop.call_later, delay, proceed, number, frame)

        return begin


@contextlib.contextmanager
def stop_with_supervisor() -> Iterator[None]:
    """While the block runs in a worker process, that process sends itself SIGTERM when its supervisor exits."""
    supervisor = multiprocessing.parent_process()
    if supervisor is None:
        yield
        return
    loop, sentinel = asyncio.get_running_loop(), supervisor.sentinel

    def vanished() -> None:
        loop.remove_reader(sentinel)
        log.warning("supervisor_vanished")
        os.kill(os.getpid(), signal.SIGTERM)

    loop.add_reader(sentinel, vanished)
    try:
        yield
    finally:
        loop.remove_reader(sentinel)
