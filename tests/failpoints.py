"""Kills the service's process at a chosen instruction: a test-only module, named in FIRSTCLAIM_HANDLERS.

The service holds no switch for any of this. Imported as if it held handlers, this module wraps the method
that ends at the chosen point, and only when the environment names one:

    TEST_FAILPOINT           a name of `POINTS`
    TEST_FAILPOINT_FOLDER    an existing folder, where each kill leaves a file, so that a restart remembers
    TEST_FAILPOINT_TIMES     how many kills in all (default 1); after them the point is passed unharmed
    TEST_FAILPOINT_ARRIVALS  how many must be at the point at once (default 1): the earlier ones wait there,
                             the last one kills the process with all of them
"""

import asyncio
import functools
import os
import signal
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from service.inbox.attempt import Attempt
from service.inbox.ledger import Claim, Ledger
from service.inbox.lock import Lock, LockReply


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
    # A recorded row was taken over, by a delivery or by recovery.
    "take_over": Point(Ledger, "take_over", lambda _, claims: bool(claims)),
    # The lock was replaced by the marker.
    "marker": Point(Lock, "mark_recorded", lambda _, __: True),
    # The handler's SQL is done in its open transaction, the completion mark is not.
    "handler": Point(Attempt, "_call", lambda _, __: True),
    # The completion mark too is done, and not committed.
    "mark": Point(Attempt, "_mark", lambda _, __: True),
    # Committed; nobody was answered.
    "commit": Point(Attempt, "_commit", lambda _, ended: isinstance(ended, str)),
}


@dataclass(slots=True)
class _Trap:
    folder: Path
    times: int
    arrivals: int
    _waiting: int = field(default=0, init=False)

    async def arrive(self) -> None:
        if len(list(self.folder.iterdir())) >= self.times:
            return
        self._waiting += 1
        if self._waiting < self.arrivals:
            await asyncio.Event().wait()  # for the process to end
        # Exclusively: of two processes here at once, one dies now and the other counts again.
        number = len(list(self.folder.iterdir()))
        try:
            (self.folder / f"kill-{number}").touch(exist_ok=False)
        except FileExistsError:
            return
        os.kill(os.getpid(), signal.SIGKILL)


def arm(environ: Mapping[str, str]) -> Callable[[], None]:
    """Wrap the point that `environ` names, if any; returns what undoes it. Raises KeyError for an unknown name."""
    if "TEST_FAILPOINT" not in environ:
        return lambda: None
    point = POINTS[environ["TEST_FAILPOINT"]]
    trap = _Trap(
        Path(environ["TEST_FAILPOINT_FOLDER"]),
        int(environ.get("TEST_FAILPOINT_TIMES", "1")),
        int(environ.get("TEST_FAILPOINT_ARRIVALS", "1")),
    )
    whole: Callable[..., Awaitable[Any]] = getattr(point.owner, point.method)

    @functools.wraps(whole)
    async def wrapped(self: Any, subject: Any, *arguments: Any, **named: Any) -> Any:
        result = await whole(self, subject, *arguments, **named)
        if point.reached(subject, result):
            await trap.arrive()
        return result

    setattr(point.owner, point.method, wrapped)
    return lambda: setattr(point.owner, point.method, whole)


def wrapped_points() -> list[str]:
    """The names of the points that are wrapped in this process."""
    return [name for name, point in POINTS.items() if hasattr(getattr(point.owner, point.method), "__wrapped__")]


arm(os.environ)
