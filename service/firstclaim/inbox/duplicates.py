"""How often an event was delivered again after it was recorded: counted in this process, written in groups.

Guarantees: a duplicate costs no command and no statement of its own. Every `INTERVAL_SECONDS`, one statement writes
what was counted for up to `_MOST_WRITTEN` events. So a burst of duplicates of many events costs Postgres at most 100
rows a second from each process, and the rest waits, for up to `_MOST_EVENTS` events.

The number is a lower bound, and never too high. It lacks what a process has counted since its last statement, if that
process is killed; what a statement had that failed, because it may have been committed; and events beyond these limits.

Redis was rejected for this: SET has no counter, so each duplicate would cost a second command, or a script.
"""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import structlog

from firstclaim.inbox.ledger import Ledger
from firstclaim.observability.redaction import describe_error
from firstclaim.postgres.statement import statement

log = structlog.get_logger(__name__)

INTERVAL_SECONDS: Final = 5.0
_LAST_SECONDS: Final = 0.5  # of a shutdown, for the last statement
_MOST_WRITTEN: Final = 500
_MOST_EVENTS: Final = 10_000

# Of events that the ledger has. Sorted, because two processes that write the same ids in opposite order deadlock. No
# handler locks these rows. The time is that of the database: a process says how long ago it was.
WRITE = statement("""
INSERT INTO firstclaim.stripe_event_duplicates AS d (event_id, duplicates, last_at)
SELECT event_id, duplicates, clock_timestamp() - make_interval(secs => seconds_ago)
  FROM unnest(CAST(:event_ids AS text[]), CAST(:duplicates AS bigint[]), CAST(:seconds_ago AS float8[]))
       AS counted (event_id, duplicates, seconds_ago)
 WHERE EXISTS (SELECT FROM firstclaim.stripe_events e WHERE e.event_id = counted.event_id)
 ORDER BY event_id COLLATE "C"
ON CONFLICT (event_id) DO UPDATE
   SET duplicates = d.duplicates + excluded.duplicates, last_at = greatest(d.last_at, excluded.last_at)
""")


@dataclass(slots=True)
class _Count:
    duplicates: int
    last_at: float  # of the clock


class Duplicates:
    """The counts of one process. `clock` is monotonic, in seconds."""

    def __init__(self, ledger: Ledger, clock: Callable[[], float] = time.monotonic) -> None:
        self._ledger = ledger
        self._clock = clock
        self._counts: dict[str, _Count] = {}

    def note(self, event_id: str) -> None:
        """Count a duplicate of this event."""
        if (count := self._counts.get(event_id)) is not None:
            count.duplicates += 1
            count.last_at = self._clock()
        elif len(self._counts) < _MOST_EVENTS:
            self._counts[event_id] = _Count(1, self._clock())

    async def run(self) -> None:
        """Write what was counted every `INTERVAL_SECONDS`, until cancelled, and then once more."""
        try:
            while True:
                await asyncio.sleep(INTERVAL_SECONDS)
                await self.write()
        finally:
            with suppress(TimeoutError):
                async with asyncio.timeout(_LAST_SECONDS):
                    await self.write()

    async def write(self) -> None:
        """Write the counts of the events that were counted first. An error is logged, and does not raise."""
        event_ids = list(self._counts)[:_MOST_WRITTEN]
        if not event_ids:
            return
        counts, now = [self._counts.pop(event_id) for event_id in event_ids], self._clock()
        try:
            await self._ledger.run(
                WRITE,
                event_ids=event_ids,
                duplicates=[count.duplicates for count in counts],
                seconds_ago=[now - count.last_at for count in counts],
            )
        except Exception as error:  # noqa: BLE001  (a number for operators must not end the loop that writes the others)
            log.warning("duplicates_not_written", events=len(counts), error=describe_error(error))
