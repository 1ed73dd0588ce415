"""The events that are due, and which of them a round of recovery tries to claim.

Guarantees: the oldest events never block the others. One in eight of the events that a round tries is the oldest, the
others are a random sample of the rest, so that processes which look at the same rows rarely try the same ones. (With
one half of each, eight processes lost six of ten tries to each other, measured.) An event that could not be claimed is
left out of the next looks: until the lock ends, if another delivery has its lock; for the TTL of a lock, if another
transaction has locked its row.

A look costs the same at a million due rows as at ten: it walks the index from the oldest row of each type that this
process wants. A full look first reads which types have waiting events, and begins at their oldest rows. Under a
backlog, most looks are not full: they begin where the last look found something, and cost one statement less. Under an
old snapshot (a long dump, a forgotten transaction), the index keeps the entries of finished rows, and a full look walks
over all of them (0.6 s behind half a million, measured): such looks take at most a twentieth of the time.
"""

import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime

from firstclaim.inbox.due import DueEvent, Queue, Survey
from firstclaim.inbox.key_statement import READY
from firstclaim.inbox.keys import DUE_SECONDS_MOST
from firstclaim.inbox.ledger import Ledger
from firstclaim.inbox.pauses import Pauses

# A look reads more than it takes, so that the random samples of eight processes differ.
_CANDIDATES_PER_SLOT = 16
_MIN_CANDIDATES = 64
_OLDEST_SHARE = 1 / 8
_MAX_LEFT_OUT = 1000  # ids in the query; if there are more, those that were left out first are tried again
_CHEAP_LOOK_SECONDS = 0.05  # a look takes some milliseconds, also over a slow line
_FULL_LOOK_SHARE = 20  # a full look that takes longer is made once in twenty times as long as it takes

_Start = dict[Queue, datetime | None]  # where a look at each queue begins; None: at its start


class Backlog:
    """The due events that this process wants and that are not paused, and what it remembers of them between rounds.

    `interval_seconds`: between full looks, unless one finds too little or takes too long.
    """

    def __init__(
        self,
        ledger: Ledger,
        wants: Callable[[str, bool], bool],
        pauses: Pauses,
        *,
        interval_seconds: float,
    ) -> None:
        self._ledger = ledger
        self._wants = wants
        self._pauses = pauses
        self._interval_seconds = interval_seconds
        self._left_out: dict[str, float] = {}  # event id: until when, by the monotonic clock
        # By whether the events were abandoned before:
        self._starts: dict[bool, _Start] = {False: {}, True: {}}
        self._next_full_look_at = {False: 0.0, True: 0.0}
        self._put_off_until = {False: 0.0, True: 0.0}  # because the last full look was slow

    async def look(
        self,
        count: int,
        survey: Survey | None = None,
        *,
        abandoned: bool = False,
        left_out: Iterable[str] = (),
    ) -> list[str]:
        """Ids of due events, oldest first, and more than `count` if there are more. Raises `LedgerUnavailable`.

        `abandoned`: only those that were abandoned before; otherwise only the others. `survey`: of this round, if it
        has made one.
        """
        limit = max(_CANDIDATES_PER_SLOT * count, _MIN_CANDIDATES)
        excluded = [*self._remembered(), *left_out]
        now = time.monotonic()
        due: list[DueEvent] = []
        if between := now < self._next_full_look_at[abandoned]:
            due = await self._ledger.due(self._unpaused(abandoned), limit, excluded, abandoned=abandoned)
            # Too few: events of another type may be due. Those that were abandoned before are rare, and can wait.
            between = len(due) >= count or abandoned or now < self._put_off_until[abandoned]
        if not between:
            due = await self._full_look(limit, excluded, survey, abandoned=abandoned)
        starts = self._starts[abandoned]
        for event in reversed(due):  # the oldest of its queue last
            starts[event.queue] = event.due_at
        return [event.event_id for event in due]

    async def ready(self, event_ids: Sequence[str]) -> list[str]:
        """Those of these events, whose key is free now, that may be tried before they are due, in their order.

        Without what is paused, or was tried by another process meanwhile. Raises `LedgerUnavailable`.
        """
        if not event_ids:
            return []
        rows = await self._ledger.run(READY, event_ids=list(event_ids), seconds=DUE_SECONDS_MOST)
        found = {row["event_id"] for row in rows if not self._pauses.cover(row["type"])}
        return [event_id for event_id in event_ids if event_id in found]

    async def _full_look(
        self, limit: int, excluded: Sequence[str], survey: Survey | None, *, abandoned: bool
    ) -> list[DueEvent]:
        began = time.monotonic()
        if survey is None:
            waiting = await self._ledger.queues(abandoned=abandoned)
        else:
            waiting = survey.abandoned if abandoned else survey.waiting
        self._starts[abandoned] = {queue: None for queue in waiting if self._wants(*queue)}
        due = await self._ledger.due(self._unpaused(abandoned), limit, excluded, abandoned=abandoned)
        took = time.monotonic() - began
        self._put_off_until[abandoned] = began + _FULL_LOOK_SHARE * took if took > _CHEAP_LOOK_SECONDS else began
        self._next_full_look_at[abandoned] = max(self._put_off_until[abandoned], began + self._interval_seconds)
        return due

    def _unpaused(self, abandoned: bool) -> _Start:
        starts = self._starts[abandoned]
        return {queue: start for queue, start in starts.items() if not self._pauses.cover(queue[0])}

    async def give_up_unwanted(self, survey: Survey, limit: int) -> list[DueEvent]:
        """Make waiting events `dead` that nobody took until a day after their time to give up; returns them.

        Only events that this process does not want: it would dispatch the others, those that are paused once they are
        resumed. Raises `LedgerUnavailable`.
        """
        waiting = {*survey.waiting, *survey.abandoned}
        return await self._ledger.give_up({queue for queue in waiting if not self._wants(*queue)}, limit)

    @staticmethod
    def choose(due: Sequence[str], count: int) -> list[str]:
        """Choose `count` of these due events, which are sorted by age, the oldest first."""
        oldest = sum(random.random() < _OLDEST_SHARE for _ in range(count))  # noqa: S311
        rest = due[oldest:]
        return [*due[:oldest], *random.sample(rest, min(count - oldest, len(rest)))]

    def leave_out(self, held: Mapping[str, float]) -> None:
        """Leave these events out of looks, each for so many seconds: they could not be claimed, as others hold them."""
        now = time.monotonic()
        for event_id, seconds in held.items():
            self._left_out.pop(event_id, None)
            self._left_out[event_id] = now + seconds
        while len(self._left_out) > _MAX_LEFT_OUT:
            del self._left_out[next(iter(self._left_out))]

    @property
    def is_full(self) -> bool:
        """Whether no more events can be left out, so that looks find some again that were left out before."""
        return len(self._left_out) >= _MAX_LEFT_OUT

    def _remembered(self) -> list[str]:
        now = time.monotonic()
        self._left_out = {event_id: until for event_id, until in self._left_out.items() if until > now}
        return list(self._left_out)
