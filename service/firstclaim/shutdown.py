"""How a process stops: SIGTERM, drain, stop accepting, finish or release, close.

Guarantees: the first signal only starts the drain delay, with everything still served while `/readyz` says
503; the server's own handling comes after it. A second signal skips the delay. A worker whose supervisor was
killed stops by itself, because nobody else ever would stop it.
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
class Stop:
    """Whether this process was asked to stop, and how much of its time for it is left; seconds."""

    drain_seconds: float
    shutdown_seconds: float
    _asked_at: float | None = None

    @property
    def asked(self) -> bool:
        """Whether a signal has come."""
        return self._asked_at is not None

    @property
    def remaining_seconds(self) -> float:
        """What is left of the shutdown; all of it while nobody has asked."""
        spent = 0.0 if self._asked_at is None else time.monotonic() - self._asked_at
        return max(0.0, self.shutdown_seconds - spent)

    def install(self) -> None:
        """Put the drain delay before what the server does on SIGTERM and SIGINT; call it on its loop."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            previous = signal.getsignal(number)
            if callable(previous):
                with contextlib.suppress(ValueError):  # not the main thread: the app is embedded in another
                    signal.signal(number, self._delayed(previous, loop))

    def _delayed(self, proceed: Callable[..., Any], loop: asyncio.AbstractEventLoop) -> Callable[..., None]:
        def begin(number: int, frame: FrameType | None) -> None:
            delay = 0.0 if self.asked else self.drain_seconds
            if self._asked_at is None:
                self._asked_at = time.monotonic()
            loop.call_soon_threadsafe(loop.call_later, delay, proceed, number, frame)

        return begin


@contextlib.contextmanager
def stop_with_supervisor() -> Iterator[None]:
    """While the block runs in a worker process, the death of its supervisor is a SIGTERM to it."""
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
