"""The options of a handler or a task: its key, and limits of its own.

Guarantees: `checked` refuses what could never work, where the handler is declared, and names the option, what was
given and what was expected. What depends on the settings is derived from them for each handler
(`Options.idle_seconds`), or reported by `firstclaim check` (`advice`). A handler without options has `NONE`, and costs
nothing more.
"""

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypedDict

from firstclaim.backoff import Backoff
from firstclaim.errors import HandlerRuleBroken
from firstclaim.event import Event
from firstclaim.follow_up import TASK
from firstclaim.formatting import shown

if TYPE_CHECKING:
    from firstclaim.settings import Settings

Key = str | Callable[[Event[Any]], str | None]

SLOTS_MOST: Final = 500  # as FIRSTCLAIM_HANDLER_SLOTS
PER_SECOND_MOST: Final = 1000
_DEADLINE = (0.5, 3600.0)  # as the settings of the same meaning, as are the next three
_BACKOFF_FIRST_MOST = 3600.0
_BACKOFF_LONGEST_MOST = 86_400.0
_GIVE_UP_MOST = 30 * 86_400.0
_PER_SECOND_LEAST = 0.001
_PRIORITY_MOST = 100
_KEY_MOST_CHARACTERS = 1000
_PATH = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_NOT_FOR_BATCHES = {
    "key": "its events are handled together",
    "slots": "it has three lanes at most",
    "per_second": "its events are handled together",
    "priority": "its lanes take what has gathered",
}


class LimitOptions(TypedDict, total=False):
    """The limits of a handler or a task, as they are written. Times are in seconds."""

    slots: int | None
    per_second: float | None
    deadline: float | None
    backoff: tuple[float, float] | None
    give_up: float | None
    priority: int


class HandlerOptions(LimitOptions, total=False):
    """The options of `@on`: the limits, and the key of an event."""

    key: Key | None


class TaskOptions(LimitOptions, total=False):
    """The options of `@task`: the limits, and the key of a payload."""

    key: str | Callable[[Any], str | None] | None


@dataclass(frozen=True, slots=True)
class Options:
    """Checked options. None: what the settings say, or no limit. `per_second` is that of the whole fleet."""

    key: Key | None = None
    slots: int | None = None
    per_second: float | None = None
    deadline_seconds: float | None = None
    backoff: Backoff | None = None
    give_up_seconds: float | None = None
    priority: int = 0

    @property
    def limited(self) -> bool:
        """Whether its events are counted and looked for apart from those of other handlers."""
        return self.key is not None or self.slots is not None or self.per_second is not None or self.priority != 0

    def idle_seconds(self, deadline_seconds: float, idle_seconds: float) -> float:
        """When Postgres ends the transaction of a handler with `deadline`: as long after it as the settings say.

        `deadline_seconds` and `idle_seconds` are those of the settings.
        """
        return (
            idle_seconds if self.deadline_seconds is None else self.deadline_seconds + idle_seconds - deadline_seconds
        )

    @property
    def words(self) -> list[str]:
        """Each option that is set, as it is shown to operators."""
        key = self.key if isinstance(self.key, str) or self.key is None else f"{self.key.__qualname__}()"
        backoff = self.backoff
        parts = {
            "key": key,
            "slots": self.slots,
            "per_second": None if self.per_second is None else f"{self.per_second:g}",
            "deadline": None if self.deadline_seconds is None else f"{self.deadline_seconds:g} s",
            "backoff": None if backoff is None else f"{backoff.first_seconds:g} to {backoff.max_seconds:g} s",
            "give_up": None if self.give_up_seconds is None else f"{self.give_up_seconds:g} s",
            "priority": self.priority or None,
        }
        return [f"{name} {value}" for name, value in parts.items() if value is not None]

    def advice(self, settings: "Settings") -> Iterator[str]:
        """What is allowed, and will not do what was probably meant with these settings."""
        if self.slots is not None and self.slots > settings.handler_slots:
            yield f"slots={self.slots} limits nothing: FIRSTCLAIM_HANDLER_SLOTS is {settings.handler_slots}"
        if self.deadline_seconds is not None and self.deadline_seconds > settings.shutdown_seconds:
            yield (
                f"deadline={self.deadline_seconds:g} is above FIRSTCLAIM_SHUTDOWN_SECONDS={settings.shutdown_seconds:g}"
                ": a deploy may interrupt it, and it then begins anew, uncharged"
            )


NONE: Final = Options()


def checked(options: HandlerOptions | TaskOptions, *, batch: bool = False, of: str = "@on") -> Options:
    """The options, checked. Raises `TypeError` or `ValueError`, which name the option and `of`, the decorator."""
    try:
        return _checked(dict(options), batch=batch)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{of}{error}") from None


def _checked(given: dict[str, Any], *, batch: bool) -> Options:
    for name in given:
        if name not in HandlerOptions.__annotations__:
            import difflib

            near = difflib.get_close_matches(name, HandlerOptions.__annotations__, n=1)
            raise TypeError(f"(..., {name}=...): no such option" + "".join(f"; did you mean {each}?" for each in near))
    set_ = {name: value for name, value in given.items() if value is not None and (name != "priority" or value != 0)}
    if not set_:
        return NONE
    for name, why in _NOT_FOR_BATCHES.items():
        if batch and name in set_:
            raise ValueError(f"(..., batch=True, {name}=...): a batch handler cannot have it: {why}; leave one out")
    slots, priority = set_.get("slots"), set_.get("priority", 0)
    if slots is not None and not (_is_int(slots) and 1 <= slots <= SLOTS_MOST):
        raise _wrong("slots", slots, f"a whole number from 1 to {SLOTS_MOST}")
    if not (_is_int(priority) and abs(priority) <= _PRIORITY_MOST):
        raise _wrong("priority", priority, f"a whole number from -{_PRIORITY_MOST} to {_PRIORITY_MOST}")
    return Options(
        _checked_key(set_.get("key")),
        slots,
        _number(set_, "per_second", _PER_SECOND_LEAST, PER_SECOND_MOST, "events a second"),
        _number(set_, "deadline", *_DEADLINE),
        _checked_backoff(set_.get("backoff")),
        _number(set_, "give_up", 0, _GIVE_UP_MOST),
        priority,
    )


def _wrong(name: str, value: object, expected: str) -> ValueError:
    return ValueError(f"(..., {name}={shown(value)}): expected {expected}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object, least: float, most: float) -> bool:
    """Whether it is a number of this range. Not of a NaN, which is in no range. The least is allowed unless it is 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most and value > 0


def _number(given: dict[str, Any], name: str, least: float, most: float, unit: str = "seconds") -> float | None:
    if (value := given.get(name)) is None:
        return None
    if not _is_number(value, least, most):
        from_ = f"from {least:g} to" if least else "above 0, at most"
        raise _wrong(name, value, f"a number of {unit}, {from_} {most:.0f}")
    return float(value)


def _checked_backoff(value: object) -> Backoff | None:
    if value is None:
        return None
    if isinstance(value, tuple | list) and len(value) == 2:
        first, most = value
        if _is_number(first, 0, _BACKOFF_FIRST_MOST) and _is_number(most, first, _BACKOFF_LONGEST_MOST):
            return Backoff(float(first), float(most))
    raise _wrong(
        "backoff",
        value,
        f"(first, most), two numbers of seconds: the first at most {_BACKOFF_FIRST_MOST:g}, "
        f"the second not below it and at most {_BACKOFF_LONGEST_MOST:g}",
    )


def _checked_key(value: object) -> Key | None:
    if value is None or (isinstance(value, str) and _PATH.fullmatch(value)):
        return value
    if isinstance(value, str):
        raise _wrong(
            "key",
            value,
            'a path into data.object, or into a payload, e.g. "customer" or "parent.subscription_details.subscription"',
        )
    if not callable(value):
        raise TypeError(f"(..., key={shown(value)}): expected a path, or a function of the event or payload")
    if inspect.iscoroutinefunction(value):
        raise TypeError("(..., key=...): an async function cannot give a key: it must not wait for anything")
    try:
        inspect.signature(value).bind(object())
    except TypeError:
        raise TypeError("(..., key=...): a key's function takes one argument, the event or payload") from None
    except ValueError:  # a builtin has no signature
        pass
    return value


# -- the key of an event ------------------------------------------------------------------------------


def key_of(key: Key, event: Event[Any]) -> str | None:
    """The event's key; None: it has none. Raises what a key's function raises, and `HandlerRuleBroken`.

    The object of what was enqueued for a task is its payload (see `firstclaim.inbox.task_event`).
    """
    value: object
    of_task = event.type.startswith(TASK)
    if isinstance(key, str):
        value = _at(key, event, "payload" if of_task else "data.object")
        given = f'key="{key}": {"payload" if of_task else "data.object"}.{key}'
    else:
        value = _called(key, event.data["object"] if of_task else event)
        given = "the key's function"
    if value is None or (isinstance(value, str) and 0 < len(value) <= _KEY_MOST_CHARACTERS):
        return value
    shown = f"a text of {len(value)} characters" if isinstance(value, str) else type(value).__name__
    raise HandlerRuleBroken(
        f"{given} gave {shown}; expected a text of 1 to {_KEY_MOST_CHARACTERS} characters, or None for no key"
    )


def _called(key: Callable[[Any], object], given: object) -> object:
    """What a key's function returns. Raises what it raises, and `HandlerRuleBroken` for what would end the process.

    It is called before the event is recorded: each retry of Stripe's would end another process, uncharged.
    """
    try:
        return key(given)
    except (Exception, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise HandlerRuleBroken(f"the key's function raised {type(error).__name__}") from error


def _at(path: str, event: Event[Any], root: str) -> object:
    """What the object of the event has at `path`; None: null, or a part of the path is. Raises `HandlerRuleBroken`.

    What is missing is no null: a path that is misspelt would lock nothing, and nobody would notice.
    """
    value: object = event.data.get("object")
    if value is None:
        advice = "it is null" if root == "payload" else "a thin event has none; write a function, e.g. one of object_id"
        raise HandlerRuleBroken(f'key="{path}": no {root}: {advice}')
    for name in path.split("."):
        if value is None:
            return None
        if not isinstance(value, dict) or name not in value:
            raise HandlerRuleBroken(
                f'key="{path}": {root} of {event.type} has no such field; write a function that returns None '
                "where there is no key"
            )
        value = value[name]
    if isinstance(value, dict):  # an expanded object
        value = value.get("id", value)
    return str(value) if _is_int(value) else value


def lock_number(schema: str, key: str) -> int:
    """The advisory lock of a key, in the ledger of this schema: a signed number of 64 bits.

    Two keys that share a number wait for one another, which costs time and nothing else. All builds must agree on it.
    """
    import hashlib

    named = f"{schema}\0{key}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(named, digest_size=8, person=b"firstclaim-key").digest(), "big", signed=True)
