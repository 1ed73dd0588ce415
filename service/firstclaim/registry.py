"""Handlers: how they are declared, what they get, and which one an event is dispatched to.

Guarantees: `@on` only stores a declaration in the function's module. It opens nothing, and there is no global registry.
`Registry.load` imports the named modules and refuses an unknown module, or two handlers that it cannot tell apart; it
reports all faults together. The most specific pattern is used: the type itself, then the longest `prefix.*`, then `*`.

Several handlers may be declared for one pattern. Its events then go to a *fan-out*, a handler of ours which writes a
row for each of them, and each row goes to its handler by the handler's name.
"""

import importlib
import inspect
import itertools
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar, Unpack, cast

from firstclaim.context import outbox_of
from firstclaim.errors import ConfigurationError
from firstclaim.follow_up import HANDLER, TASK, is_follow_up, is_handler_name, names_follow_ups
from firstclaim.handler_options import NONE, HandlerOptions, Options, checked
from firstclaim.observability.frames import place
from firstclaim.observability.redaction import redacted_error

if TYPE_CHECKING:
    from firstclaim.context import Context
    from firstclaim.event import Event
    from firstclaim.observability.handler_metrics import HandlerMetrics
    from firstclaim.settings import Settings

FANNED_OUT = "fanned_out"  # the action of an event whose handlers have a row each
_PATTERN = re.compile(r"\*|[A-Za-z0-9_\[\]\-]+(\.[A-Za-z0-9_\[\]\-]+)*(\.\*)?")
# Annotations of the first parameter, as they are written.
_ONE_EVENT = re.compile(r"['\"]?([\w.]+\.)?Event\b")
_LIST = re.compile(r"['\"]?([\w.]+\.)?([Ll]ist|Sequence)\[")
_ALL_FOLLOW_UPS = (f"{TASK}*", f"{HANDLER}*")
_NAME_RULE = "expected letters, digits, _, ., : and -, 200 characters at most"
_DECLARED = "__firstclaim_handlers__"
_DECLARE = "declare_handlers"
_HANDLERS = "__firstclaim_handlers_of_function__"


H = TypeVar("H", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Handler:
    """A declared function and its pattern. `batch`: the function takes a list of events.

    `fresh`: the event's object is fetched from Stripe before the function is called.
    `name`: by default the function's qualified name, for faults, logs, and the rows of one of several handlers.
    `exclusive`: no other handler may have its pattern.
    """

    pattern: str
    function: Callable[..., Any]
    batch: bool = False
    fresh: bool = False
    name: str = ""
    exclusive: bool = False
    options: Options = NONE
    is_async: bool = field(init=False)  # the function is awaited; if not, it runs in a thread
    _metrics: "HandlerMetrics | None" = field(default=None, init=False, repr=False, compare=False)  # once looked up

    def __post_init__(self) -> None:
        object.__setattr__(self, "is_async", inspect.iscoroutinefunction(self.function))
        if not self.name:
            object.__setattr__(self, "name", f"{self.function.__module__}.{self.function.__qualname__}")

    @property
    def is_task(self) -> bool:
        """Whether it runs follow-ups: the function takes its context only."""
        return self.pattern.startswith(TASK)

    @property
    def metrics(self) -> "HandlerMetrics":
        """What counts its attempts. Its series exist once this was read."""
        if self._metrics is None:
            # Here, because a module of handlers, and each command's help, would load the metrics with it.
            from firstclaim.observability.handler_metrics import handler_metrics

            object.__setattr__(self, "_metrics", handler_metrics(self.pattern, self.batch))
        return cast("HandlerMetrics", self._metrics)


def on(
    *patterns: str,
    batch: bool = False,
    fresh: bool = False,
    name: str | None = None,
    exclusive: bool = False,
    **options: Unpack[HandlerOptions],
) -> Callable[[H], H]:
    """Declare a handler for `patterns`: an exact type, `"customer.subscription.*"`, or `"*"`.

    The function takes `(event, context)`, is async or sync (a sync one runs in a thread), and returns the `action` of
    the answer, a short str. None means `handled`. With `batch` it takes `(events, context)`, a list of events and a
    `BatchContext`, and returns one action for all, or a list of one for each event in their order.

    With `fresh` the object of the event is fetched from Stripe's API before the handler's transaction begins:
    `event.object` and `event.data["object"]` are the object as it is now, and `context.snapshot` is the object as the
    event has it. A batch handler cannot have it.

    Several handlers may have one pattern: each then gets the event in an attempt of its own, and fails and retries by
    itself. `name` identifies this one in the rows that wait for it, by default the function's qualified name: a name
    that a deploy changes leaves those rows behind. With `exclusive` no other handler may have the pattern.

    `options`: `key`, `slots`, `per_second`, `deadline`, `backoff`, `give_up` and `priority`, see [Options](#options).
    Raises `TypeError` or `ValueError` at import for a function, pattern, name or option that could never work.
    """
    if not patterns:
        raise TypeError('@on needs at least one event type, e.g. @on("invoice.payment_failed")')
    _check_options(batch=batch, name=name, exclusive=exclusive)
    _check_fresh(fresh, batch=batch)
    own = checked(options, batch=batch)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f'@on({pattern!r}): write @on("type"), with the event type as a string')
        if not _PATTERN.fullmatch(pattern):
            raise ValueError(f'@on("{pattern}"): expected an event type, "prefix.*" or "*"')

    def declare(function: H) -> H:
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError(f"{function.__qualname__}: a handler returns its action, it does not yield")
        _check_signature(function, batch=batch)
        note(function, [Handler(pattern, function, batch, fresh, name or "", exclusive, own) for pattern in patterns])
        return function

    return declare


def _check_fresh(fresh: object, *, batch: bool) -> None:
    if not isinstance(fresh, bool):
        raise TypeError(f"@on(..., fresh={fresh!r}): expected True or False")
    if fresh and batch:  # its events are claimed together: the slowest of up to 64 requests would use up their leases
        raise ValueError("@on(..., batch=True, fresh=True): a batch handler gets no fresh objects; leave one out")


def _check_options(*, batch: object, name: object, exclusive: object) -> None:
    for option, value in (("batch", batch), ("exclusive", exclusive)):
        if not isinstance(value, bool):
            raise TypeError(f"@on(..., {option}={value!r}): expected True or False")
    if name is not None and not is_handler_name(name):
        raise ValueError(f"@on(..., name={name!r:.80}): {_NAME_RULE}")


def note(function: Callable[..., Any], handlers: list[Handler]) -> None:
    """Store declarations where `Registry.load` finds them: in the function's module, and on the function.

    Raises `ValueError` for two of one function, pattern and name that differ: only one of them could hold.
    """
    for new, known in itertools.product(handlers, handlers_of(function)):
        if (known.function, known.pattern, known.name) == (function, new.pattern, new.name) and known != new:
            raise ValueError(
                f'{function.__qualname__} is declared twice for "{new.pattern}", with different options: leave one out'
            )
    # A list in the module's namespace: a second function of the same name replaces the first one in the module,
    # and must not replace its handler.
    vars(sys.modules[function.__module__]).setdefault(_DECLARED, []).extend(handlers)
    # Also on the function, for modules that re-export it. It may carry a second `@on`.
    setattr(function, _HANDLERS, (*handlers_of(function), *handlers))


def handlers_of(function: Callable[..., Any]) -> tuple[Handler, ...]:
    """What `@on` has declared for `function`."""
    declared: tuple[Handler, ...] = getattr(function, _HANDLERS, ())
    return declared


def _check_signature(function: Callable[..., Any], *, batch: bool) -> None:
    """Raise `TypeError` for a function that cannot be called with an event, or with a list of them if it is `batch`.

    Python does not say what a parameter takes, except in its annotation, where there is one.
    """
    name = function.__qualname__
    if any(handler.batch is not batch for handler in handlers_of(function)):
        raise TypeError(f"{name}: a handler takes one event or, with batch=True, a list of events; it cannot do both")
    signature = inspect.signature(function)
    try:
        signature.bind(object(), object())
    except TypeError:
        takes = "(events, context), where events is a list" if batch else "(event, context)"
        raise TypeError(f"{name}: a {'batch ' if batch else ''}handler takes {takes}") from None
    first = next(iter(signature.parameters.values())).annotation
    written = first if isinstance(first, str) else inspect.formatannotation(first)
    if batch and _ONE_EVENT.match(written):
        raise TypeError(f"{name}: a batch handler takes a list of events, and is annotated with {written}")
    if not batch and _LIST.match(written):
        raise TypeError(f"{name}: it is annotated with {written}: to get a list, declare it with batch=True")


def _declare(module: ModuleType, settings: "Settings | None") -> list[str]:
    """Let a module declare the handlers that follow from the settings; those of an earlier load are forgotten.

    Such a module has a function `declare_handlers(settings)`, which raises an exception group with its faults.
    """
    declare = vars(module).get(_DECLARE)
    if declare is None or settings is None:
        return []
    vars(module).pop(_DECLARED, None)
    try:
        declare(settings)
    except ExceptionGroup as error:
        return [str(fault) for fault in error.exceptions]
    return []


def is_pattern(text: str) -> bool:
    """Whether it is an event type, `prefix.*` or `*`, or says which follow-ups: `task:name`, `handler:name`, `task:*`.

    A name is one that can be declared: a pattern that covers nothing would seem to pause something.
    """
    return _PATTERN.fullmatch(text) is not None or text in _ALL_FOLLOW_UPS or names_follow_ups(text)


def covers(pattern: str, event_type: str) -> bool:
    """Whether `pattern` (an event type, `prefix.*` or `*`) is for this type, or for all types of another pattern."""
    if pattern.endswith("*"):
        return event_type.startswith(pattern[:-1])
    return pattern == event_type


class Registry:
    """Maps event types to handlers. Immutable once loaded."""

    def __init__(self, handlers: Iterable[Handler]) -> None:
        """Raises `ConfigurationError` for two handlers of one pattern if one is exclusive, or if they share a name."""
        declared: dict[str, list[Handler]] = {}
        for handler in handlers:
            several = declared.setdefault(handler.pattern, [])
            if handler not in several:
                several.append(handler)
        if faults := [fault for several in declared.values() for fault in _faults(several)]:
            raise ConfigurationError(faults)
        self._by_pattern: dict[str, Handler] = {}
        self._members: dict[str, Handler] = {}  # of the fan-outs, by the type of their rows
        for pattern, several in declared.items():
            self._by_pattern[pattern] = several[0] if len(several) == 1 else _fan_out(several)
            if len(several) > 1:
                members = [replace(each, pattern=HANDLER + each.name) for each in several]
                for each in members:
                    faults += _fault_of(self._members.setdefault(each.pattern, each), each)
        if faults:
            raise ConfigurationError(faults)
        # A handler that is the only one of its pattern now still gets the rows that were written when it was not.
        self._only: dict[str, Handler] = {}
        for handler in self._by_pattern.values():
            self._only.setdefault(HANDLER + handler.name, handler)
        self.tasks = frozenset(each[len(TASK) :] for each in declared if each.startswith(TASK))

    @classmethod
    def load(cls, modules: Iterable[str], settings: "Settings | None" = None) -> "Registry":
        """Import `modules`, and collect the handlers that they declare or re-export. Raises `ConfigurationError`.

        `settings`: for a module whose handlers depend on them, such as `firstclaim.handlers.forward`.
        """
        handlers: list[Handler] = []
        faults: list[str] = []
        for name in modules:
            try:
                module = importlib.import_module(name)
            except (Exception, SystemExit) as error:  # noqa: BLE001  (a user's module may raise anything)
                where = place(error)
                at = f" (at {where})" if where else ""
                faults.append(f"FIRSTCLAIM_HANDLERS: cannot import {name}: {redacted_error(error)}{at}")
                continue
            faults += _declare(module, settings)
            handlers += getattr(module, _DECLARED, [])
            for function in vars(module).values():
                if inspect.isfunction(function) and function.__module__ != name:
                    handlers += handlers_of(function)
        try:
            registry = cls(handlers)
        except ConfigurationError as error:
            faults += error.faults
        if faults:
            raise ConfigurationError(faults)
        return registry

    def __iter__(self) -> Iterator[Handler]:
        """All handlers, the fan-outs and what they write rows for too; each has a pattern of its own."""
        return iter((*self._by_pattern.values(), *self._members.values()))

    def find(self, event_type: str) -> Handler | None:
        """The handler with the most specific pattern for `event_type`, or None. It may be the type of a follow-up."""
        if found := self._by_pattern.get(event_type):
            return found
        if is_follow_up(event_type):  # of nobody else: `*` means events of Stripe's
            return self._members.get(event_type) or self._only.get(event_type)
        words = event_type.split(".")
        for length in range(len(words) - 1, 0, -1):
            if found := self._by_pattern.get(".".join(words[:length]) + ".*"):
                return found
        return self._by_pattern.get("*")


def _faults(several: list[Handler]) -> Iterator[str]:
    """Why these handlers of one pattern cannot work together."""
    first = several[0]
    for number, other in enumerate(several[1:], 1):
        if any(each.exclusive for each in several):
            yield f'two handlers for "{first.pattern}": {first.name} and {other.name}'
        elif any(other.name == each.name for each in several[:number]):
            yield f'two handlers for "{first.pattern}" have the name {other.name}: give one of them another, with name='


def _fault_of(known: Handler, other: Handler) -> list[str]:
    """Why rows of their name cannot be for both of these: a row says no more than the name."""
    if known.function is not other.function:
        return [f'two handlers have the name "{other.name}": give one of them another, with name=']
    if (known.fresh, known.options) != (other.fresh, other.options):
        return [
            f'the handler "{other.name}" shares its events with others, and its declarations have different options: '
            "give each of them a name of its own, with name="
        ]
    return []


def _fan_out(several: list[Handler]) -> Handler:
    """The handler of an event for which there are several: it writes a row for each of them, and is done."""
    names = [each.name for each in several]

    async def fan_out(event: "Event", context: "Context") -> str:
        outbox_of(context).fan_out(event.id, names)
        return FANNED_OUT

    return Handler(several[0].pattern, fan_out, name=", ".join(names))
