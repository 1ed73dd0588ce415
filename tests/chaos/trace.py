"""Records what the process of a service does: a test-only module, named in FIRSTCLAIM_HANDLERS.

The service has no switch for this. Imported as if it held handlers, this module wraps methods of the service, and
only if TEST_TRACE names a file.

Guarantees: a line is one write to a file opened for appending, so several processes share the file and kill -9 tears
no line. A line is written before the action that it announces can have an effect (a handler runs after its `start`),
and after the action that it reports (a `claim` is committed). Both instants of a line are on the machine's monotonic
clock, which is the same in every process: the action happened between `began` and `at`.
"""

import functools
import os
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import orjson

from firstclaim.event import Event
from firstclaim.follow_up import Outbox
from firstclaim.inbox import batch_attempt
from firstclaim.inbox.batch_ledger import BatchLedger
from firstclaim.inbox.claim import Claim, HandlerTransaction
from firstclaim.inbox.handler_call import HandlerCall
from firstclaim.inbox.ledger import Ledger
from firstclaim.inbox.lock import Lock, LockReply
from firstclaim.inbox.single_attempt import SingleAttempt
from firstclaim.postgres.handler_connections import HandlerConnection

VARIABLE: Final = "TEST_TRACE"

# The kinds of lines, in the order of a dispatch.
LOCK: Final = "lock"  # the process has taken the lock in Redis
CLAIM: Final = "claim"  # the ledger has given it this attempt
HOLD: Final = "hold"  # the handler transaction has the lock on the row: from here on it can commit
START: Final = "start"  # the handler is about to be called
OUTSIDE: Final = "outside"  # the handler's call to another system: the line is the effect
END: Final = "end"  # the handler returned or raised
# The same of a batch: for each of its events a line. If the batch fails, the same attempt goes on alone.
BATCH_HOLD: Final = "batch hold"
BATCH_START: Final = "batch start"
BATCH_END: Final = "batch end"


@dataclass(frozen=True, slots=True)
class Line:
    """One action of a process; `began` and `at` in nanoseconds of the monotonic clock."""

    what: str
    event_id: str
    pid: int
    began: int
    at: int
    attempt: int = 0  # a lock has none
    key: str = ""  # of a call to another system: its idempotency key

    @classmethod
    def of(cls, what: str, event_id: str, attempt: int = 0, began: int | None = None, key: str = "") -> "Line":
        """A line about this process, now."""
        now = time.monotonic_ns()
        return cls(what, event_id, os.getpid(), now if began is None else began, now, attempt, key)

    def append(self, file: Path) -> None:
        """Add it to the file."""
        descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, orjson.dumps(asdict(self)) + b"\n")
        finally:
            os.close(descriptor)


def read(file: Path) -> list[Line]:
    """Every line so far, in the order of writing; none if there is no file yet."""
    if not file.exists():
        return []
    return [Line(**orjson.loads(line)) for line in file.read_bytes().splitlines()]


def outside(event_id: str, attempt: int, key: str) -> None:
    """A handler's call to another system: at least one per completed event, also by attempts that fail."""
    if file := os.environ.get(VARIABLE):
        Line.of(OUTSIDE, event_id, attempt, key=key).append(Path(file))


def arm(environ: Mapping[str, str]) -> None:
    """Wrap the methods, if `environ` names a file."""
    if VARIABLE not in environ:
        return
    file = Path(environ[VARIABLE])
    _note_after(Lock, "acquire", file, _locked)
    _note_after(Ledger, "claim", file, _claimed)
    _note_after(Ledger, "take_over", file, _taken_over)
    _note_after(Ledger, "hold", file, _held)
    _note_after(BatchLedger, "hold", file, _held_together)
    _note_around_the_handler(file)
    _note_around_the_batch_handler(file)


Note = Callable[[tuple[Any, ...], Any], Iterator[Line]]


def _note_after(owner: type, method: str, file: Path, note: Note) -> None:
    whole: Callable[..., Awaitable[Any]] = getattr(owner, method)

    @functools.wraps(whole)
    async def wrapped(self: Any, *arguments: Any, **named: Any) -> Any:
        began = time.monotonic_ns()
        result = await whole(self, *arguments, **named)
        for line in note(arguments, result):
            replace(line, began=began).append(file)
        return result

    setattr(owner, method, wrapped)


def _locked(arguments: tuple[Any, ...], reply: object) -> Iterator[Line]:
    event_id = arguments[0]
    # `serve` also locks a key of its own when it starts.
    if reply is LockReply.HELD and event_id.startswith(("evt_", "task_", "handler_")):
        yield Line.of(LOCK, event_id)


def _claimed(_: tuple[Any, ...], won: object) -> Iterator[Line]:
    if isinstance(won, Claim):
        yield Line.of(CLAIM, won.event_id, won.attempt)


def _taken_over(_: tuple[Any, ...], claims: list[Claim]) -> Iterator[Line]:
    for claim in claims:
        yield Line.of(CLAIM, claim.event_id, claim.attempt)


def _held(arguments: tuple[Any, ...], held: HandlerTransaction | None) -> Iterator[Line]:
    claim: Claim = arguments[1]
    if held is not None and held.has_key:
        yield Line.of(HOLD, claim.event_id, claim.attempt)


def _held_together(arguments: tuple[Any, ...], held: tuple[object, set[str]]) -> Iterator[Line]:
    for claim in arguments[1]:
        if claim.event_id in held[1]:
            yield Line.of(BATCH_HOLD, claim.event_id, claim.attempt)


def _note_around_the_batch_handler(file: Path) -> None:
    whole = vars(batch_attempt)["call_batch_handler"]

    @functools.wraps(whole)
    async def wrapped(call: HandlerCall, events: Sequence[Event], attempts: Mapping[str, int], *arguments: Any) -> Any:
        began = time.monotonic_ns()
        for event in events:
            Line.of(BATCH_START, event.id, attempts[event.id]).append(file)
        try:
            return await whole(call, events, attempts, *arguments)
        finally:
            for event in events:
                Line.of(BATCH_END, event.id, attempts[event.id], began).append(file)

    vars(batch_attempt)["call_batch_handler"] = wrapped


def _note_around_the_handler(file: Path) -> None:
    whole = SingleAttempt._call

    @functools.wraps(whole)
    async def wrapped(self: SingleAttempt, call: HandlerCall, connection: HandlerConnection, outbox: Outbox) -> str:
        began = time.monotonic_ns()
        # The row's id: several handlers of an event have a row each.
        Line.of(START, self.claim.event_id, self.claim.attempt).append(file)
        try:
            return await whole(self, call, connection, outbox)
        finally:
            Line.of(END, self.claim.event_id, self.claim.attempt, began).append(file)

    SingleAttempt._call = wrapped  # type: ignore[method-assign]


arm(os.environ)
