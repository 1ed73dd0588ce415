"""Kills or stops the process of a service at a chosen point: a test-only module, named in FIRSTCLAIM_HANDLERS.

The service has no switch for this. Imported as if it held handlers, this module wraps the methods that end at the
chosen points, and only if the environment names some:

    TEST_FAILPOINT           names of `POINTS`, comma separated
    TEST_FAILPOINT_FOLDER    an existing folder, where each kill leaves a file, so that it counts after a restart
    TEST_FAILPOINT_TIMES     the number of kills (default 1); after them the points have no effect
    TEST_FAILPOINT_ARRIVALS  the number of calls that must be at a point at once (default 1): the first ones wait,
                             and the last one kills the process with all of them
    TEST_FAILPOINT_SIGNAL    the signal (default SIGKILL); after a SIGSTOP and its SIGCONT all calls continue
"""

import asyncio
import contextlib
import functools
import os
import signal
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from firstclaim.inbox.attempt import Attempt, Committed
from firstclaim.inbox.claim import Claim
from firstclaim.inbox.existing_row import ExistingRow
from firstclaim.inbox.ledger import Ledger
from firstclaim.inbox.lock import Lock, LockReply
from firstclaim.inbox.single_attempt import SingleAttempt
from firstclaim.status import TAKEABLE


@dataclass(frozen=True, slots=True)
class Point:
    """A method of the service and, given its first argument and its result, whether it ended at the point."""

    owner: type
    method: str
    reached: Callable[[Any, Any], bool]


POINTS: Mapping[str, Point] = {
    # The lock is held, no row exists. Only for events: `serve` also locks a key of its own when it starts.
    "lock": Point(Lock, "acquire", lambda event_id, reply: reply is LockReply.HELD and event_id.startswith("evt_")),
    # The row is committed as `processing`, nothing else is.
    "insert": Point(Ledger, "claim", lambda _, won: isinstance(won, Claim)),
    # The lock is held and the row was there already, recorded or failed: not yet taken over.
    "found": Point(Ledger, "claim", lambda _, won: isinstance(won, ExistingRow) and won.status in TAKEABLE),
    # A recorded row was taken over, by a delivery or by recovery.
    "take_over": Point(Ledger, "take_over", lambda _, claims: bool(claims)),
    # The lock was replaced by the marker.
    "marker": Point(Lock, "mark_recorded", lambda _, __: True),
    # The handler's SQL is done in its open transaction, the mark is not. (The mark is written together with COMMIT:
    # no method ends between the two.)
    "handler": Point(SingleAttempt, "_call", lambda _, __: True),
    # Committed; the delivery is not answered yet.
    "commit": Point(Attempt, "_commit", lambda _, result: isinstance(result, Committed)),
}


@dataclass(slots=True)
class _Trap:
    folder: Path
    times: int
    arrivals: int
    signal: signal.Signals
    _waiting: int = field(default=0, init=False)
    _resumed: asyncio.Event = field(default_factory=asyncio.Event, init=False)

    async def arrive(self) -> None:
        if len(list(self.folder.iterdir())) >= self.times:
            return
        self._waiting += 1
        if self._waiting < self.arrivals:
            await self._resumed.wait()  # or for the process to end
            return
        # Exclusively: of two processes here at once, one is killed now, and the other counts again.
        number = len(list(self.folder.iterdir()))
        try:
            (self.folder / f"kill-{number}").touch(exist_ok=False)
        except FileExistsError:
            return
        os.kill(os.getpid(), self.signal)
        self._waiting = 0
        self._resumed.set()


def arm(environ: Mapping[str, str]) -> Callable[[], None]:
    """Wrap the points that `environ` names; returns a function that undoes it. Raises KeyError for an unknown name."""
    if "TEST_FAILPOINT" not in environ:
        return lambda: None
    points = [POINTS[name] for name in environ["TEST_FAILPOINT"].split(",")]
    trap = _Trap(
        Path(environ["TEST_FAILPOINT_FOLDER"]),
        int(environ.get("TEST_FAILPOINT_TIMES", "1")),
        int(environ.get("TEST_FAILPOINT_ARRIVALS", "1")),
        signal.Signals[environ.get("TEST_FAILPOINT_SIGNAL", "SIGKILL")],
    )
    undo = contextlib.ExitStack()
    for point in points:
        undo.callback(_wrap(point, trap))
    return undo.close


def _wrap(point: Point, trap: _Trap) -> Callable[[], None]:
    whole: Callable[..., Awaitable[Any]] = getattr(point.owner, point.method)

    @functools.wraps(whole)
    async def wrapped(self: Any, subject: Any, *arguments: Any, **named: Any) -> Any:
        result = await whole(self, subject, *arguments, **named)
        if point.reached(subject, result):
            await trap.arrive()
        return result

    wrapped.failpoint = point  # type: ignore[attr-defined]
    setattr(point.owner, point.method, wrapped)
    return lambda: setattr(point.owner, point.method, whole)


def wrapped_points() -> list[str]:
    """The names of the points that are wrapped in this process."""
    return [name for name, point in POINTS.items() if point in _wrapped_at(getattr(point.owner, point.method))]


def _wrapped_at(method: Any) -> Iterator[Point | None]:
    while hasattr(method, "__wrapped__"):
        yield getattr(method, "failpoint", None)
        method = method.__wrapped__


arm(os.environ)
