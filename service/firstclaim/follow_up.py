"""Follow-ups: rows that a handler's own transaction writes, for a task or for one of several handlers of an event.

Guarantees: the id of a follow-up is a pure function of the row that wrote it, of the name, and of its number among
those of this name. So a handler that runs again writes no follow-up twice. Nothing is written before the handler has
returned: what it has enqueued waits in an `Outbox`, is written in the handler's transaction just before the completion
mark, and so exists exactly if the handler's effects do. What cannot be stored is refused when it is enqueued.
"""

import itertools
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NamedTuple

from firstclaim.errors import HandlerRuleBroken
from firstclaim.formatting import shown

# The types of follow-ups have a colon, which no type of Stripe's has (see `firstclaim.event`).
TASK, HANDLER = "task:", "handler:"
PAYLOAD_MOST_BYTES: Final = 64 * 1024  # a task needs ids, and reads the rest where it is up to date
FOLLOW_UPS_MOST: Final = 1000  # of one attempt: they are written in one statement, while the event's row is locked
AFTER_MOST_SECONDS: Final = 366 * 86_400.0
_DEPTH_MOST = 50
_INT_MOST_BITS = 14_284  # 4,300 digits: the most that Python reads
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,99}")
_HANDLER_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:\-]{0,199}")
# What a handler is called that was given no name: its module and its qualified name.
_DEFAULT_NAME = re.compile(r"[\w\-]+(\.([\w\-]+|<locals>|<lambda>))+")
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


def names_follow_ups(row_type: str) -> bool:
    """Whether rows can have this type: that of a task or handler which can be declared, by its name."""
    kind, colon, name = row_type.partition(":")
    if kind + colon == TASK:
        return is_task_name(name)
    return kind + colon == HANDLER and (is_handler_name(name) or _DEFAULT_NAME.fullmatch(name) is not None)


def follow_up_id(parent_id: str, row_type: str, number: object) -> str:
    """The id of a follow-up: always the same for the same arguments, and of the same length for all of them."""
    import hashlib

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
        due_at = None if at is None else _checked_at(name, at, has_after=bool(due_in_seconds))
        number = 1 + sum(each.parent_id == parent_id and each.type == TASK + name for each in self._follow_ups)
        row_id = follow_up_id(parent_id, TASK + name, number if repeat is None else f"{number} of attempt {repeat}")
        self._follow_ups.append(FollowUp(row_id, parent_id, TASK + name, body, due_in_seconds, due_at))
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
            raise ValueError(f"enqueue({shown(name)}): {NAME_RULE}")
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
            f'enqueue("{name}", after={shown(after)}): expected seconds or a timedelta, from 0 to '
            f"{AFTER_MOST_SECONDS:.0f} seconds (366 days)"
        )
    return float(seconds)


def _checked_at(name: str, at: object, *, has_after: bool) -> datetime:
    """The same instant in UTC. One that is past is due at once, since a handler may run again long after its event."""
    if has_after:
        raise ValueError(f'enqueue("{name}"): give after= or at=, not both')
    try:
        aware = isinstance(at, datetime) and at.utcoffset() is not None
        instant = at.astimezone(UTC) if isinstance(at, datetime) and aware else None
    except OverflowError:  # of `datetime.min` and `datetime.max` in another zone
        aware, instant = True, None
    if not aware:
        raise ValueError(
            f'enqueue("{name}", at={shown(at)}): expected an aware datetime, such as '
            "datetime.now(UTC) + timedelta(days=1)"
        )
    if instant is None or not _EPOCH <= instant <= datetime.now(UTC) + timedelta(seconds=AFTER_MOST_SECONDS + 60):
        raise ValueError(
            f'enqueue("{name}", at={shown(at)}): expected a time within the next 366 days, or a past one from 1970 on'
        )
    return instant


def _checked_payload(name: str, payload: Any) -> Any:
    """The payload, if a task gets what was enqueued: JSON turns some other values into something else silently."""
    if (fault := next(_faults("payload", payload, itertools.count(1), 0), None)) is not None:
        raise TypeError(
            f'enqueue("{name}"): {fault}. Expected what JSON has (dict with str keys, list, str, int, float, bool, '
            f"None), {PAYLOAD_MOST_BYTES // 1024} KiB at most"
        )
    return payload


def _faults(path: str, value: Any, values: Iterator[int], depth: int) -> Iterator[str]:
    """What JSON cannot store of `value`, which is at `path`. `values` numbers all values of the payload."""
    if depth > _DEPTH_MOST:
        yield f"the payload is nested more than {_DEPTH_MOST} levels deep"
    elif next(values) > PAYLOAD_MOST_BYTES:  # each has a byte at least; one list may be in many others
        yield f"the payload has more than {PAYLOAD_MOST_BYTES:,} values"
    elif isinstance(value, dict):
        for key, each in value.items():
            if not (isinstance(key, str) and _is_text(key)):
                yield f"{path} has the key {shown(key)}, which is no {'text' if isinstance(key, str) else 'str'}"
            yield from _faults(f"{path}[{shown(key)}]", each, values, depth + 1)
    elif isinstance(value, list | tuple):
        for number, each in enumerate(value):
            yield from _faults(f"{path}[{number}]", each, values, depth + 1)
    elif (fault := _fault(value)) is not None:
        yield f"{path} is {fault}"


def _fault(value: Any) -> str | None:
    """Why JSON cannot store a value that has no others in it."""
    if isinstance(value, float):
        return None if value - value == 0 else f"{value}, which JSON does not have"
    if isinstance(value, int):
        return None if value.bit_length() <= _INT_MOST_BITS else "an int of more than 4,300 digits"
    if isinstance(value, str):
        return None if _is_text(value) else "a str with a surrogate, which is no text"
    return None if value is None else f"a {type(value).__name__}"


def _is_text(text: str) -> bool:
    """Whether it can be written in UTF-8. Two surrogates in a row would become another string."""
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False
