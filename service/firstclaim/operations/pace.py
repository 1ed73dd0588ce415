"""The pace of a long job beside the running services: it rests after each statement.

Guarantees: of the time, a job spends at most its share in statements. A rest is as long as the statement before it
took, times a factor, so it follows the server: the busier that is, the longer are the rests. What the job does
meanwhile (it stores a file of the archive) is part of the rest.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Pace:
    """At most `busy_percent` of the time in the blocks of `statement`; 100: no rests."""

    def __init__(self, busy_percent: float) -> None:
        self._rest_factor = 100 / busy_percent - 1
        self._not_before = 0.0

    @asynccontextmanager
    async def statement(self) -> AsyncIterator[None]:
        """Wait for the end of the rest. The block is a statement, and its time decides the next rest."""
        await asyncio.sleep(self._not_before - time.monotonic())
        began = time.monotonic()
        yield
        ended = time.monotonic()
        self._not_before = ended + (ended - began) * self._rest_factor
