"""Handlers: how they are declared, what they get, and which one an event is dispatched to.

Guarantees: `@on` only stores a declaration in the function's module. It opens nothing, and there is no global registry.
`Registry.load` imports the named modules and refuses an unknown module, or two handlers for one pattern; it reports all
faults together. The most specific pattern is used: the type itself, then the longest `prefix.*`, then `*`.
"""

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from firstclaim.errors import ConfigurationError
from firstclaim.observability.frames import place
from firstclaim.observability.redaction import redacted_error

_PATTERN = re.compile(r"\*|[A-Za-z0-9_\[\]\-]+(\.[A-Za-z0-9_\[\]\-]+)*(\.\*)?")
# Annotations of the first parameter, as they are written.
_ONE_EVENT = re.compile(r"['\"]?([\w.]+\.)?Event\b")
_LIST = re.compile(r"['\"]?([\w.]+\.)?([Ll]ist|Sequence)\[")
_DECLARED = "__firstclaim_handlers__"
_HANDLERS = "__firstclaim_handlers_of_function__"


H = TypeVar("H", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Handler:
    """A declared function and its pattern. `batch`: the function takes a list of events."""

    pattern: str
    function: Callable[..., Any]
    batch: bool = False
    is_async: bool = field(init=False)  # the function is awaited; if not, it runs in a thread

    def __post_init__(self) -> None:
        object.__setattr__(self, "is_async", inspect.iscoroutinefunction(self.function))

    @property
    def name(self) -> str:
        """The function's qualified name, for faults and logs."""
        return f"{self.function.__module__}.{self.function.__qualname__}"


def on(*patterns: str, batch: bool = False) -> Callable[[H], H]:
    """Declare a handler for `patterns`: an exact type, `"customer.subscription.*"`, or `"*"`.

    The function takes `(event, context)`, is async or sync (a sync one runs in a thread), and returns the `action` of
    the answer, a short str. None means `handled`. With `batch` it takes `(events, context)`, a list of events and a
    `BatchContext`, and returns one action for all, or a list of one for each event in their order. Raises `TypeError`
    or `ValueError` at import for a function or pattern that could never work.
    """
    if not patterns:
        raise TypeError('@on needs at least one event type, e.g. @on("invoice.payment_failed")')
    if not isinstance(batch, bool):
        raise TypeError(f"@on(..., batch={batch!r}): expected True or False")
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f'@on({pattern!r}): write @on("type"), with the event type as a string')
        if not _PATTERN.fullmatch(pattern):
            raise ValueError(f'@on("{pattern}"): expected an event type, "prefix.*" or "*"')

    def declare(function: H) -> H:
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError(f"{function.__qualname__}: a handler returns its action, it does not yield")
        _check_signature(function, batch=batch)
        # A list in the module's namespace: a second function of the same name replaces the first one in the module,
        # and must not replace its handler.
        declared = vars(sys.modules[function.__module__]).setdefault(_DECLARED, [])
        handlers = [Handler(pattern, function, batch) for pattern in patterns]
        declared.extend(handlers)
        # Also on the function, for modules that re-export it. It may carry a second `@on`.
        setattr(function, _HANDLERS, (*handlers_of(function), *handlers))
        return function

    return declare


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


class Registry:
    """Maps event types to handlers. Immutable once loaded."""

    def __init__(self, handlers: Iterable[Handler]) -> None:
        """Raises `ConfigurationError` if two different functions are declared for one pattern."""
        self._by_pattern: dict[str, Handler] = {}
        faults = []
        for handler in handlers:
            known = self._by_pattern.setdefault(handler.pattern, handler)
            if known.function is not handler.function:
                faults.append(f'two handlers for "{handler.pattern}": {known.name} and {handler.name}')
        if faults:
            raise ConfigurationError(faults)

    @classmethod
    def load(cls, modules: Iterable[str]) -> "Registry":
        """Import `modules`, and collect the handlers that they declare or re-export. Raises `ConfigurationError`."""
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
        return iter(self._by_pattern.values())

    def find(self, event_type: str) -> Handler | None:
        """The handler with the most specific pattern for `event_type`, or None."""
        if found := self._by_pattern.get(event_type):
            return found
        words = event_type.split(".")
        for length in range(len(words) - 1, 0, -1):
            if found := self._by_pattern.get(".".join(words[:length]) + ".*"):
                return found
        return self._by_pattern.get("*")
