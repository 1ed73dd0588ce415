"""The events that are due, and which of them a round of recovery tries to claim.

Guarantees: the oldest events never block the others. One in eight of the events that a round tries is the oldest, the
others are a random sample of the rest, so that processes which look at the same rows rarely try the same ones. (With
one half of each, eight processes lost six of ten tries to each other, measured.) An event that could not be claimed,
because another transaction has locked its row or another delivery has its lock, is left out for the TTL of a lock.

A look costs the same at a million due rows as at ten: it walks the index from the oldest row of each type that this
process wants. A full look reads first of which types anything waits, and begins at their oldest rows. The looks between
them, which are most of them under a backlog, begin where the last one found something, and cost one statement less.
Under an old snapshot (a long dump, a forgotten transaction), the index keeps the entries of finished rows, and a full
look walks over all of them (0.6 s behind half a million, measured): such looks take at most a twentieth of the time.
"""

import random
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime

from firstclaim.inbox.due import DueEvent, Queue
from firstclaim.inbox.ledger import Ledger

# A look reads more than it takes, so that the random samples of eight processes differ.
_CANDIDATES_PER_SLOT = 16
_MIN_CANDIDATES = 64
_OLDEST_SHARE = 1 / 8
_MAX_LEFT_OUT = 1000  # ids in the query; if there are more, those that were left out first are tried again
_CHEAP_LOOK_SECONDS = 0.05  # a look takes some milliseconds, also over a slow line
_FULL_LOOK_SHARE = 20  # a full look that takes longer is made once in twenty times as long as it takes

_Start = dict[Queue, datetime | None]  # where a look at each queue begins; None: at its start


class Backlog:
    """The due events that this process wants, and what it remembers of them between rounds.

    `interval_seconds`: between full looks, unless one finds too little or takes too long.
    """

    def __init__(
        self,
        ledger: Ledger,
        wants: Callable[[str, bool], bool],
        *,
        interval_seconds: float,
        leave_out_seconds: float,
    ) -> None:
        self._ledger = ledger
        self._wants = wants
        self._interval_seconds = interval_seconds
        self._leave_out_seconds = leave_out_seconds
        self._left_out: dict[str, float] = {}  # event id: until when, by the monotonic clock
        # By whether the events were abandoned before:
        self._starts: dict[bool, _Start] = {False: {}, True: {}}
        self._next_full_look_at = {False: 0.0, True: 0.0}
        self._put_off_until = {False: 0.0, True: 0.0}  # because the last full look was slow

    async def look(self, count: int, *, abandoned: bool = False, left_out: Iterable[str] = ()) -> list[str]:
        """Ids of due events, oldest first, and more than `count` if there are more. Raises `LedgerUnavailable`.

        `abandoned`: only those that were abandoned before; otherwise only the others.
        """
        limit = max(_CANDIDATES_PER_SLOT * count, _MIN_CANDIDATES)
        excluded = [*self._remembered(), *left_out]
        now = time.monotonic()
        due: list[DueEvent] = []
        if between := now < self._next_full_look_at[abandoned]:
            due = await self._ledger.due(self._starts[abandoned], limit, excluded, abandoned=abandoned)
            # Too few: events of another type may be due. Those that were abandoned before are rare, and can wait.
            between = len(due) >= count or abandoned or now < self._put_off_until[abandoned]
        if not between:
            due = await self._full_look(limit, excluded, abandoned=abandoned)
        starts = self._starts[abandoned]
        for event in reversed(due):  # the oldest of its queue last
            starts[event.queue] = event.due_at
        return [event.event_id for event in due]

    async def _full_look(self, limit: int, excluded: Sequence[str], *, abandoned: bool) -> list[DueEvent]:
        began = time.monotonic()
        waiting = await self._ledger.queues(abandoned=abandoned)
        starts = self._starts[abandoned] = {queue: None for queue in waiting if self._wants(*queue)}
        due = await self._ledger.due(starts, limit, excluded, abandoned=abandoned)
        took = time.monotonic() - began
        self._put_off_until[abandoned] = began + _FULL_LOOK_SHARE * took if took > _CHEAP_LOOK_SECONDS else began
        self._next_full_look_at[abandoned] = max(self._put_off_until[abandoned], began + self._interval_seconds)
        return due

    async def give_up_unwanted(self, limit: int) -> list[DueEvent]:
        """Make events `dead` that nobody took until a day after their time to give up; returns them.

        Only events that this process does not want: it would dispatch the others. Raises `LedgerUnavailable`.
        """
        waiting = {queue for flag in (False, True) for queue in await self._ledger.queues(abandoned=flag)}
        return await self._ledger.give_up({queue for queue in waiting if not self._wants(*queue)}, limit)

    @staticmethod
    def choose(due: Sequence[str], count: int) -> list[str]:
        """Choose `count` of these due events, which are sorted by age, the oldest first."""
        oldest = sum(random.random() < _OLDEST_SHARE for _ in range(count))  # noqa: S311
        rest = due[oldest:]
        return [*due[:oldest], *random.sample(rest, min(count - oldest, len(rest)))]

    def leave_out(self, event_ids: Iterable[str]) -> None:
        """Leave these events out of the next looks: they could not be claimed, because others hold them."""
        until = time.monotonic() + self._leave_out_seconds
        for event_id in event_ids:
            self._left_out.pop(event_id, None)
            self._left_out[event_id] = until
        while len(self._left_out) > _MAX_LEFT_OUT:
            del self._left_out[next(iter(self._left_out))]

    def _remembered(self) -> list[str]:
        now = time.monotonic()
        self._left_out = {event_id: until for event_id, until in self._left_out.items() if until > now}
        return list(self._left_out)
