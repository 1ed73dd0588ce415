"""Follow-ups: rows that a handler's own transaction writes, for a task or for one of several handlers of an event.

Guarantees: the id of a follow-up is a pure function of the row that wrote it, of the name, and of its number among
those of this name. So a handler that runs again writes no follow-up twice. Nothing is written before the handler has
returned: what it has enqueued waits in an `Outbox`, is written in the handler's transaction just before the completion
mark, and so exists exactly if the handler's effects do. What cannot be stored is refused when it is enqueued.
"""

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final, NamedTuple

from firstclaim.errors import HandlerRuleBroken

# The types of follow-ups have a colon, which no type of Stripe's has (see `firstclaim.event`).
TASK, HANDLER = "task:", "handler:"
PAYLOAD_MOST_BYTES: Final = 64 * 1024  # a task needs ids, and reads the rest where it is up to date
FOLLOW_UPS_MOST: Final = 1000  # of one attempt: they are written in one statement, while the event's row is locked
AFTER_MOST_SECONDS: Final = 366 * 86_400.0
_DEPTH_MOST = 50
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,99}")
_HANDLER_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:\-]{0,199}")
_OBJECT = "firstclaim.task"
_HAS_ENDED = "this handler has ended: nothing more can be enqueued in its transaction"


@dataclass(frozen=True, slots=True)
class FollowUp:
    """A row to be written. `body` None: that of the row that writes it. `due_at` replaces `due_in_seconds`."""

    id: str
    parent_id: str
    type: str
    body: bytes | None = field(repr=False, default=None)
    due_in_seconds: float = 0.0
    due_at: datetime | None = None

    @property
    def name(self) -> str:
        """The name of the task, or of the handler."""
        return self.type.partition(":")[2]

    @property
    def payload(self) -> Any:
        """What was enqueued for a task. None for one of several handlers, which gets the event."""
        return None if self.body is None else parse_task(self.body).payload


class Origin(NamedTuple):
    """Where a follow-up comes from: the row that enqueues it, and Stripe's event which that goes back to."""

    row_id: str
    event_id: str
    account: str | None
    livemode: bool


@dataclass(frozen=True, slots=True)
class TaskData:
    """What the row of a task holds: its payload, the event that it goes back to, and the row that enqueued it."""

    payload: Any = field(repr=False)
    event_id: str
    parent_id: str
    account: str | None
    livemode: bool

    def body(self) -> bytes:
        """As it is stored."""
        stored = {
            "object": _OBJECT,
            "event": self.event_id,
            "parent": self.parent_id,
            "account": self.account,
            "livemode": self.livemode,
            "payload": self.payload,
        }
        return json.dumps(stored, allow_nan=False, separators=(",", ":")).encode()


def parse_task(body: bytes) -> TaskData:
    """What `TaskData.body` stored. Raises `ValueError` for anything else."""
    stored = json.loads(body)
    if not isinstance(stored, dict) or stored.get("object") != _OBJECT:
        raise ValueError("it is not the body of a task")
    try:
        return TaskData(
            stored["payload"], stored["event"], stored["parent"], stored.get("account"), bool(stored["livemode"])
        )
    except KeyError as error:
        raise ValueError(f"it has no {error}") from None


def is_follow_up(row_type: str) -> bool:
    """Whether a row of this type is a follow-up, and not an event of Stripe's."""
    return ":" in row_type


def is_task_name(name: object) -> bool:
    """Whether a task may have this name."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def is_handler_name(name: object) -> bool:
    """Whether a handler may be given this name."""
    return isinstance(name, str) and _HANDLER_NAME.fullmatch(name) is not None


def follow_up_id(parent_id: str, row_type: str, number: object) -> str:
    """The id of a follow-up: always the same for the same arguments, and of the same length for all of them."""
    digest = hashlib.sha256("\0".join((parent_id, row_type, str(number))).encode()).hexdigest()
    return f"{row_type.partition(':')[0]}_{digest[:32]}"


class Outbox:
    """What one attempt has enqueued, in order.

    `tasks`: the names that may be enqueued; None: all. `rows`: the ids of the ledger's rows, by event id, where they
    differ: the row of one of several handlers has an id of its own.
    """

    def __init__(self, tasks: Collection[str] | None = None, rows: Mapping[str, str] | None = None) -> None:
        self._tasks = tasks
        self._rows = rows or {}
        self._follow_ups: list[FollowUp] = []
        self._closed = False

    @property
    def follow_ups(self) -> list[FollowUp]:
        """What is to be written."""
        return self._follow_ups

    @property
    def has_due(self) -> bool:
        """Whether some of it is due at once."""
        return any(each.due_in_seconds <= 0 and each.due_at is None for each in self._follow_ups)

    def row_id(self, event_id: str) -> str:
        """The id of the ledger's row of this event in this attempt."""
        return self._rows.get(event_id, event_id)

    def enqueue(
        self,
        name: str,
        payload: Any,
        origin: Origin,
        *,
        after: float | timedelta,
        at: datetime | None,
        repeat: int | None,
    ) -> str:
        """Add a follow-up for a task; returns its id. `repeat`: the attempt, if each attempt is to write its own."""
        self._check_open(name)
        parent_id, event_id, account, livemode = origin
        body = TaskData(_checked_payload(name, payload), event_id, parent_id, account, livemode).body()
        if len(body) > PAYLOAD_MOST_BYTES:
            raise ValueError(
                f"enqueue({name!r}): the payload has {len(body):,} bytes as JSON, and may have {PAYLOAD_MOST_BYTES:,}: "
                "store what is large in a table of yours, and enqueue its id"
            )
        due_in_seconds = _checked_after(name, after)
        if at is not None:
            _check_at(name, at, has_after=bool(due_in_seconds))
        number = 1 + sum(each.parent_id == parent_id and each.type == TASK + name for each in self._follow_ups)
        row_id = follow_up_id(parent_id, TASK + name, number if repeat is None else f"{number} of attempt {repeat}")
        self._follow_ups.append(FollowUp(row_id, parent_id, TASK + name, body, due_in_seconds, at))
        return row_id

    def fan_out(self, event_id: str, names: Iterable[str]) -> None:
        """Add a row for each of these handlers."""
        parent_id = self.row_id(event_id)
        for name in names:
            row_type = HANDLER + name
            self._follow_ups.append(FollowUp(follow_up_id(parent_id, row_type, 1), parent_id, row_type))

    def undo_to(self, count: int) -> None:
        """Forget what was enqueued after the first `count`: the savepoint around it was rolled back."""
        del self._follow_ups[count:]

    def close(self) -> None:
        """The handler has ended."""
        self._closed = True

    def _check_open(self, name: object) -> None:
        if self._closed:
            raise HandlerRuleBroken(_HAS_ENDED)
        if not is_task_name(name):
            raise ValueError(f"enqueue({name!r}): {NAME_RULE}")
        if self._tasks is not None and name not in self._tasks:
            declared = ", ".join(sorted(self._tasks)) or "none"
            raise HandlerRuleBroken(
                f'enqueue("{name}"): no module of FIRSTCLAIM_HANDLERS declares @task("{name}") in this process '
                f"(declared: {declared})"
            )
        if len(self._follow_ups) >= FOLLOW_UPS_MOST:
            raise HandlerRuleBroken(
                f'enqueue("{name}"): one attempt may enqueue {FOLLOW_UPS_MOST:,} follow-ups: enqueue a task for many'
            )


NAME_RULE: Final = "expected the name of a task: letters, digits, _, . and -, 100 characters at most"


def _checked_after(name: str, after: object) -> float:
    seconds = after.total_seconds() if isinstance(after, timedelta) else after
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds <= AFTER_MOST_SECONDS:
        raise ValueError(
            f'enqueue("{name}", after={after!r}): expected seconds or a timedelta, from 0 to {AFTER_MOST_SECONDS:.0f} '
            "seconds (366 days)"
        )
    return float(seconds)


def _check_at(name: str, at: object, *, has_after: bool) -> None:
    if has_after:
        raise ValueError(f'enqueue("{name}"): give after= or at=, not both')
    if not isinstance(at, datetime) or at.tzinfo is None or at.utcoffset() is None:
        raise ValueError(
            f'enqueue("{name}", at={at!r}): expected an aware datetime, such as datetime.now(UTC) + timedelta(days=1)'
        )
    if at > datetime.now(at.tzinfo) + timedelta(seconds=AFTER_MOST_SECONDS + 60):
        raise ValueError(f'enqueue("{name}", at={at!r}): expected a time within the next 366 days')


def _checked_payload(name: str, payload: Any) -> Any:
    """The payload, if a task gets what was enqueued: JSON turns some other values into something else silently."""
    if (fault := _fault(payload, "payload", 0)) is not None:
        raise TypeError(
            f'enqueue("{name}"): {fault}. Expected what JSON has: dict with str keys, list, str, int, float, bool, None'
        )
    return payload


def _fault(value: Any, path: str, depth: int) -> str | None:
    if depth > _DEPTH_MOST:
        return f"the payload is nested more than {_DEPTH_MOST} levels deep"
    if value is None or isinstance(value, bool | int | str):
        return None
    if isinstance(value, float):
        return None if value - value == 0 else f"{path} is {value}, which JSON does not have"
    if isinstance(value, dict):
        for key, each in value.items():
            if not isinstance(key, str):
                return f"{path} has the key {key!r:.80}, which is no str"
            if (fault := _fault(each, f"{path}[{key!r:.80}]", depth + 1)) is not None:
                return fault
        return None
    if isinstance(value, list | tuple):
        faults = (_fault(each, f"{path}[{number}]", depth + 1) for number, each in enumerate(value))
        return next((fault for fault in faults if fault is not None), None)
    return f"{path} is a {type(value).__name__}"
