"""The keys of one process's events: which runs, which wait for it, and whose turn is next.

Guarantees: that no two events of a key run at once is not decided here but in Postgres, by an advisory lock which the
handler's transaction takes together with its row (`HOLD_FOR_KEY`). This module only keeps a process from trying in
vain. While an event of a key runs here, the others of the key wait in the ledger, without a claim, a slot or a
connection; when it has ended, the one that has waited longest is next. A key that another process holds is tried again
by one event at a time, ever more rarely.

What waits is remembered by its id alone, and up to `_MOST` of them. All else is in the ledger: each waiting event is
also due there before long, for other processes, and for this one if it has forgotten it. So an event that one process
cannot get in between is soon in the queue of the process that can.

A turn is given to each event once, and whoever takes it ends it (`end`, `withdraw`) or hands it on (`pass_on`): a turn
that nobody ends would keep the others of its key waiting here for ever.
"""

import asyncio
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

_MOST = 1000  # events that a process remembers, as many as a look leaves out
# Until a key that another process holds is tried again: at first about the time of a brief handler.
_FIRST_TRY_SECONDS = 0.1
_LONGEST_TRY_SECONDS = 2.0
# Until a waiting event is due for any process: the longer, the more events wait before it.
_DUE_SECONDS = 1.0
_DUE_SECONDS_EACH = 0.1
DUE_SECONDS_MOST = 20.0

Ready = deque[str]  # the ids of events whose turn has come, for recovery to take up


@dataclass(slots=True)
class _Key:
    turn: str | None = None  # the event that runs, or whose turn it is
    has_begun: bool = False
    ready: Ready | None = None  # where the event is whose turn it is
    waiting: OrderedDict[str, Ready] = field(default_factory=OrderedDict)
    misses: int = 0  # tries in a row for which another process had the key
    again: asyncio.TimerHandle | None = None  # the next try

    @property
    def is_free(self) -> bool:
        return self.turn is None and self.again is None and not self.waiting


@dataclass(slots=True)
class Turn:
    """The turn of an event: it runs now, if the advisory lock `number` can be had."""

    number: int
    event_id: str
    ready: Ready
    due_in_seconds: float  # if another process has the key
    missed: bool = False  # it has


class Keys:
    """The keys that events of this process have. `wake`: what wakes recovery."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._keys: dict[int, _Key] = {}
        self._known: dict[str, int] = {}  # the events that wait or whose turn has come, and their keys

    @property
    def waiting(self) -> list[str]:
        """The events that wait here: recovery leaves them out of its looks."""
        return list(self._known)

    @property
    def is_full(self) -> bool:
        """Whether no more events are remembered: looks then find again what waits."""
        return len(self._known) >= _MOST

    def is_busy(self, number: int) -> bool:
        """Whether an event of this key could not begin now, as far as this process knows."""
        return number in self._keys

    def begin(self, number: int, event_id: str, ready: Ready) -> Turn | None:
        """The event's turn, if no other of its key runs or waits here. Otherwise it waits from now on."""
        key = self._keys.get(number)
        if key is None:
            key = self._keys[number] = _Key()
        if not (key.is_free or (key.turn == event_id and not key.has_begun)):
            self.wait(number, event_id, ready)
            return None
        self._known.pop(event_id, None)
        key.turn, key.has_begun = event_id, True
        return Turn(number, event_id, ready, self.due_in_seconds(number))

    def end(self, turn: Turn) -> None:
        """The event has run, or another process has the key (`missed`): then it keeps its place in the queue."""
        key = self._keys[turn.number]
        key.turn, key.has_begun = None, False
        if not turn.missed:
            key.misses = 0
            self._next(turn.number)
            return
        self._remember(turn.number, turn.event_id, turn.ready)
        if turn.event_id in key.waiting:
            key.waiting.move_to_end(turn.event_id, last=False)
        seconds = _jittered(min(_FIRST_TRY_SECONDS * 2.0 ** min(key.misses, 30), _LONGEST_TRY_SECONDS))
        key.misses += 1
        key.again = asyncio.get_running_loop().call_later(seconds, self._next, turn.number)

    def wait(self, number: int, event_id: str, ready: Ready) -> None:
        """The event is recorded, and waits for its key."""
        key = self._keys.setdefault(number, _Key())
        if event_id != key.turn:
            self._remember(number, event_id, ready)
        if key.turn is None and key.again is None:  # what it waited for has ended meanwhile
            self._next(number)

    def withdraw(self, event_id: str) -> None:
        """The turn of the event has passed unused: it could not be claimed. Does nothing for any other event."""
        if self.has_turn(event_id):
            number = self._known.pop(event_id)
            self._keys[number].turn = None
            self._next(number)

    def change(self, event_id: str, number: int | None) -> None:
        """The event has this key (None: none) by now. If it waits here for another one, it does so no longer."""
        known = self._known.get(event_id, number)
        if known is None or known == number:
            return
        self.withdraw(event_id)
        if self._known.pop(event_id, None) is not None:
            del self._keys[known].waiting[event_id]

    def pass_on(self, event_id: str, full: Sequence[Ready]) -> bool:
        """Let an event of another handler go first, if one waits: the handler of this one is at its limit.

        `full`: those of the handlers that are. The event is next after that. Returns whether it has passed.
        """
        key = self._keys[self._known[event_id]]
        other = next((each for each, ready in key.waiting.items() if not any(ready is one for one in full)), None)
        if other is None or key.ready is None:
            return False
        key.waiting[event_id] = key.ready
        key.waiting.move_to_end(event_id, last=False)
        self._give(key, other)
        return True

    def has_turn(self, event_id: str) -> bool:
        """Whether it is the event's turn, and it has not begun."""
        key = self._keys.get(self._known[event_id]) if event_id in self._known else None
        return key is not None and key.turn == event_id and not key.has_begun

    def due_in_seconds(self, number: int) -> float:
        """Until an event that waits for this key is due again, whoever takes it then."""
        key = self._keys.get(number)
        waiting = 0 if key is None else len(key.waiting)
        return _jittered(min(_DUE_SECONDS + _DUE_SECONDS_EACH * waiting, DUE_SECONDS_MOST))

    def _remember(self, number: int, event_id: str, ready: Ready) -> None:
        if event_id not in self._known and not self.is_full:
            self._known[event_id] = number
            self._keys[number].waiting[event_id] = ready

    def _next(self, number: int) -> None:
        key = self._keys[number]
        if key.again is not None:
            key.again.cancel()
            key.again = None
        if not key.waiting:
            del self._keys[number]
            return
        self._give(key, next(iter(key.waiting)))

    def _give(self, key: _Key, event_id: str) -> None:
        key.turn, key.has_begun, key.ready = event_id, False, key.waiting.pop(event_id)
        key.ready.append(event_id)
        self._wake()


def _jittered(seconds: float) -> float:
    return seconds * random.uniform(0.5, 1)  # noqa: S311  (spread, not secrecy)
