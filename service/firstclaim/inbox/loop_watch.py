"""Watches the event loop: a handler that blocks it is named in the log, because everything else waits for that handler.

Guarantees: while the loop is blocked for more than a second, by whatever code, there is one warning, which comes
while it is still blocked. It has the place in the user's code, and the handler and its event if a handler's task
runs. A process that was frozen, or got no CPU time, does not count as blocked: the watching thread did not run either.

The cost is a timer of the loop and a thread, which both wake four times a second.
"""

import asyncio
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import structlog

from firstclaim.inbox.handler_call import HandlerCall
from firstclaim.observability.frames import running_place

log = structlog.get_logger(__name__)

_LIMIT_SECONDS = 1.0
_PERIOD_SECONDS = 0.25


class LoopWatch:
    """Watches the loop that `running` is entered on. `calls`: the handlers that run."""

    def __init__(self, calls: Callable[[], Collection[HandlerCall]]) -> None:
        self._calls = calls
        self._beat_at = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Watch while the block runs."""
        loop = asyncio.get_running_loop()
        stopped = threading.Event()

        def beat() -> None:
            self._beat_at = time.monotonic()
            if not stopped.is_set():
                loop.call_later(_PERIOD_SECONDS, beat)

        beat()
        watch = threading.Thread(
            target=self._watch, args=(loop, threading.get_ident(), stopped), daemon=True, name="loop-watch"
        )
        watch.start()
        try:
            yield
        finally:
            stopped.set()

    def _watch(self, loop: asyncio.AbstractEventLoop, thread: int, stopped: threading.Event) -> None:
        woke_at = time.monotonic()
        reported: float | None = None
        while not stopped.wait(_PERIOD_SECONDS):
            slept_at, woke_at = woke_at, time.monotonic()
            was_frozen = woke_at - slept_at > 2 * _PERIOD_SECONDS
            beat_at = self._beat_at
            # It may have been blocked since the end of the period in which it beat last.
            if woke_at - beat_at > _LIMIT_SECONDS + _PERIOD_SECONDS and beat_at != reported and not was_frozen:
                reported = beat_at
                self._report(loop, thread)

    def _report(self, loop: asyncio.AbstractEventLoop, thread: int) -> None:
        task = asyncio.current_task(loop)
        names = next((call.names for call in self._calls() if task is not None and call.running is task), {})
        frame = sys._current_frames().get(thread)  # noqa: SLF001  (documented, despite its name)
        log.warning("event_loop_blocked", **names, place=None if frame is None else running_place(frame))
