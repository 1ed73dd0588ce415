"""The stream of log lines: lines of ordinary events are gathered, and written together every 10 ms.

Guarantees: lines are written whole and in their order. A warning or an error is written at once, after all that was
gathered before it; so is a line of a library, and a line that is logged outside of the event loop. What is gathered is
also written before a fork and when the process ends, unless it is killed: a process that is killed loses the ordinary
lines of its last 10 ms. (One system call for each line took a twentieth of the time of a duplicate.)

Several processes may share one pipe, where longer writes of one process may be torn by those of another. So no write is
longer than `PIPE_BUF`, unless a single line is.
"""

import asyncio
import os
import select
import threading
from collections import deque
from threading import get_ident
from typing import TextIO

_GATHER_SECONDS = 0.01


class LogLines:
    """Writes lines to `stream`. It is a text stream too, for the handler of the standard library's logging."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._gathered: deque[str] = deque()  # its operations are atomic: a thread may log at any time
        self._flushed_by: asyncio.AbstractEventLoop | None = None  # it has a timer that will write the lines
        self._flushed_in = 0  # the thread of that loop
        self._new_lock()
        # The child would write the same lines again, and would wait for a thread that it does not have.
        os.register_at_fork(before=self.flush, after_in_child=self._new_lock)

    def _new_lock(self) -> None:
        self._writing = threading.RLock()  # reentrant: a signal handler may log

    def gather(self, line: str) -> None:
        """Write `line` within 10 ms; without a running event loop, at once."""
        self._gathered.append(f"{line}\n")
        # Before `get_running_loop`, which up to Python 3.11 costs a system call.
        if self._flushed_by is not None and self._flushed_in == get_ident() and self._flushed_by.is_running():
            return
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self.flush()
            return
        self._flushed_by, self._flushed_in = loop, get_ident()
        loop.call_later(_GATHER_SECONDS, self.flush)

    def write(self, text: str) -> None:
        """Add `text`, to be written by the next `flush`."""
        self._gathered.append(text)

    def write_line(self, line: str) -> None:
        """Write `line` and all that was gathered before it."""
        self._gathered.append(f"{line}\n")
        self.flush()

    def flush(self) -> None:
        """Write what was gathered. Raises `OSError` or `ValueError` if the stream is closed."""
        self._flushed_by = None
        with self._writing:
            while self._gathered:
                self._stream.write(self._piece())
                self._stream.flush()

    def _piece(self) -> str:
        """The next lines, as many as one write may have."""
        taken = [self._gathered.popleft()]
        size = len(taken[0])
        while self._gathered and (size := size + len(self._gathered[0])) <= select.PIPE_BUF:
            taken.append(self._gathered.popleft())
        return "".join(taken)
