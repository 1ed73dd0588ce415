"""Handlers: how they are declared, what they are given, and which one an event goes to.

Guarantees: `@on` only notes a declaration beside the function, opens nothing and registers nowhere global;
`Registry.load` imports the named modules and refuses, all faults together, an unknown module or two handlers
for one pattern. The most exact pattern wins: the type itself, then the longest `prefix.*`, then `*`.
"""

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from firstclaim.errors import ConfigurationError, HandlerRuleBroken
from firstclaim.event import Event
from firstclaim.observability.redaction import redacted_error

if TYPE_CHECKING:  # a quarter of a second, which every command and every test process would pay
    import asyncio

    from sqlalchemy import CursorResult, Executable
    from sqlalchemy.ext.asyncio import AsyncConnection

_PATTERN = re.compile(r"\*|[A-Za-z0-9_\[\]\-]+(\.[A-Za-z0-9_\[\]\-]+)*(\.\*)?")
_DECLARED = "__firstclaim_handlers__"
_PATTERNS = "__firstclaim_patterns__"
_DEADLINE_PASSED = "the handler's deadline has passed; its transaction is gone"


class Transaction(Protocol):
    """What a handler's transaction is asked for."""

    @property
    def connection(self) -> "AsyncConnection":
        """SQLAlchemy's view of it."""

    async def fetch(self, sql: str, *values: Any) -> list[Any]:
        """Run one statement on the driver."""


@dataclass(frozen=True, slots=True)
class Context:
    """What a handler is given beside the event: the number of the attempt, from 1 and only rising, and a transaction.

    Its commit carries the completion mark: what you write by `connection`, `fetch` or `execute` happens exactly once
    in this database.
    """

    event: Event
    attempt: int
    _transaction: Transaction
    _loop: "asyncio.AbstractEventLoop"
    _deadline: float

    @property
    def idempotency_key(self) -> str:
        """Hand this to every call to the outside (`idempotency_key=` of Stripe's own API): the event's id.

        The same on every attempt, so the far side can tell a repeat. Calling out twice for one event? Add a
        suffix of your own per call.
        """
        return self.event.id

    @property
    def connection(self) -> "AsyncConnection":
        """SQLAlchemy's view of the transaction, for async handlers.

        It refuses `commit()` and `rollback()`; savepoints (`begin_nested`) are fine. Raises `HandlerRuleBroken` once
        the handler has ended.
        """
        return self._transaction.connection

    async def fetch(self, sql: str, *values: Any) -> list[Any]:
        """Run one statement as it stands, with `$1`, `$2`, ... in it, in the same transaction; returns its rows.

        The driver's own call; rows have their values by name and by index. Raises what asyncpg raises, and
        `HandlerRuleBroken` once the handler has ended.
        """
        return await self._transaction.fetch(sql, *values)

    def execute(self, statement: "Executable", parameters: Any = None) -> "CursorResult[Any]":
        """Run one statement from a sync handler's thread, in the same transaction; rows are buffered.

        Raises what SQLAlchemy raises, `HandlerRuleBroken` on the event loop's own thread (an async handler
        awaits `context.connection.execute`), and `TimeoutError` once the handler's deadline has passed.
        """
        import asyncio

        try:
            running = asyncio.get_running_loop()
        except RuntimeError:
            running = None
        if running is not None:
            raise HandlerRuleBroken(
                "context.execute() is for sync handlers; an async one awaits context.connection.execute()"
            )
        remaining = self._deadline - self._loop.time()
        if remaining <= 0:
            raise TimeoutError(_DEADLINE_PASSED)
        call = asyncio.run_coroutine_threadsafe(self._execute(statement, parameters), self._loop)
        try:
            return call.result(remaining)
        except TimeoutError:
            raise TimeoutError(_DEADLINE_PASSED) from None

    async def _execute(self, statement: "Executable", parameters: Any) -> "CursorResult[Any]":
        return await self.connection.execute(statement, parameters)


H = TypeVar("H", bound=Callable[[Event, Context], Any])


@dataclass(frozen=True, slots=True)
class Handler:
    """One declared function and its pattern."""

    pattern: str
    function: Callable[[Event, Context], Any]

    @property
    def is_async(self) -> bool:
        """Whether it is awaited; else it runs in a thread."""
        return inspect.iscoroutinefunction(self.function)

    @property
    def name(self) -> str:
        """Where it is defined, for faults and logs."""
        return f"{self.function.__module__}.{self.function.__qualname__}"


def on(*patterns: str) -> Callable[[H], H]:
    """Declare a handler for `patterns`: an exact type, `"customer.subscription.*"`, or `"*"`.

    The function takes `(event, context)`, is async or sync (then it runs in a thread), and returns the
    `action` of the answer, a short str; None means `handled`. Raises `TypeError` or `ValueError` at import
    for what could never work.
    """
    if not patterns:
        raise TypeError('@on needs at least one event type, e.g. @on("invoice.payment_failed")')
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f'@on({pattern!r}): write @on("type"), with the event type as a string')
        if not _PATTERN.fullmatch(pattern):
            raise ValueError(f'@on("{pattern}"): expected an event type, "prefix.*" or "*"')

    def declare(function: H) -> H:
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError(f"{function.__qualname__}: a handler returns its action, it does not yield")
        try:
            inspect.signature(function).bind(object(), object())
        except TypeError:
            raise TypeError(f"{function.__qualname__}: a handler takes (event, context)") from None
        # Noted in the module's own namespace, in a list: a second function of the same name hides the first
        # from the module, and must not hide its handler.
        noted = vars(sys.modules[function.__module__]).setdefault(_DECLARED, [])
        noted.extend(Handler(pattern, function) for pattern in patterns)
        # Also on the function, for whoever re-exports it; there may be a second `@on` on it.
        known = getattr(function, _PATTERNS, ())
        setattr(function, _PATTERNS, (*known, *patterns))
        return function

    return declare


class Registry:
    """Which handler an event goes to; immutable once loaded."""

    def __init__(self, handlers: Iterable[Handler]) -> None:
        """Raises `ConfigurationError` when two different functions claim one pattern."""
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
        """Import `modules` and collect what they declare or re-export; raises `ConfigurationError`."""
        handlers: list[Handler] = []
        faults: list[str] = []
        for name in modules:
            try:
                module = importlib.import_module(name)
            except (Exception, SystemExit) as error:  # noqa: BLE001  (whatever a user's module raises at import)
                faults.append(f"FIRSTCLAIM_HANDLERS: cannot import {name}: {redacted_error(error)}")
                continue
            handlers += getattr(module, _DECLARED, [])
            for function in vars(module).values():
                if inspect.isfunction(function) and function.__module__ != name:
                    handlers += [Handler(each, function) for each in getattr(function, _PATTERNS, ())]
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
        """The most exact handler for `event_type`, or None."""
        if found := self._by_pattern.get(event_type):
            return found
        parts = event_type.split(".")
        for length in range(len(parts) - 1, 0, -1):
            if found := self._by_pattern.get(".".join(parts[:length]) + ".*"):
                return found
        return self._by_pattern.get("*")
