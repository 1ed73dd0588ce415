"""Handlers: how they are declared, what they get, and which one an event is dispatched to.

Guarantees: `@on` only stores a declaration in the function's module. It opens nothing, and there is no global registry.
`Registry.load` imports the named modules and refuses an unknown module, or two handlers for one pattern; it reports all
faults together. The most specific pattern is used: the type itself, then the longest `prefix.*`, then `*`.
"""

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Coroutine, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from firstclaim.errors import ConfigurationError, HandlerRuleBroken
from firstclaim.event import Event
from firstclaim.observability.frames import place
from firstclaim.observability.redaction import redacted_error

if TYPE_CHECKING:  # importing them takes a quarter of a second, in every command and test process
    import asyncio

    from sqlalchemy import CursorResult, Executable
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
    from sqlalchemy.orm import Session

_PATTERN = re.compile(r"\*|[A-Za-z0-9_\[\]\-]+(\.[A-Za-z0-9_\[\]\-]+)*(\.\*)?")
_DECLARED = "__firstclaim_handlers__"
_PATTERNS = "__firstclaim_patterns__"
_DEADLINE_PASSED = "the handler's deadline has passed; its transaction was rolled back"


class Transaction(Protocol):
    """The operations of a handler's transaction that the context uses."""

    @property
    def connection(self) -> "AsyncConnection":
        """The transaction as an SQLAlchemy connection."""

    def session(self, **options: Any) -> "AsyncSession":
        """A session in a savepoint of the transaction."""

    def sync_session(
        self, run: Callable[[Coroutine[Any, Any, Any]], Any], **options: Any
    ) -> "Coroutine[Any, Any, Session]":
        """A session for a thread, whose statements go through `run`."""

    def fetch(self, sql: str, *values: Any) -> "Coroutine[Any, Any, list[Any]]":
        """Run one statement on the driver."""

    def refuse(self) -> None:
        """The handler was told that its deadline has passed: it cannot complete any more, even if it ignores that."""


@dataclass(frozen=True, slots=True)
class Context:
    """What a handler gets beside the event: the attempt's number (from 1, always rising) and a transaction.

    The completion mark commits in the same transaction: what you write through it (`connection`, `session`, `fetch`;
    `execute`, `sync_session`) happens exactly once in this database.
    """

    event: Event
    attempt: int
    _transaction: Transaction
    _loop: "asyncio.AbstractEventLoop"
    _deadline: float

    @property
    def idempotency_key(self) -> str:
        """The event's id. Pass it to every call to another system (`idempotency_key=` of Stripe's own API).

        It is the same on every attempt, so that the other system can detect a repeated call. If a handler makes
        several calls, add a suffix of your own to each.
        """
        return self.event.id

    @property
    def connection(self) -> "AsyncConnection":
        """The transaction as an SQLAlchemy connection, for async handlers. Sessions can be bound to it.

        `commit()` raises; after `rollback()` every statement raises, and the handler fails. Savepoints (`begin_nested`)
        are allowed. Raises `HandlerRuleBroken` after the handler has ended.
        """
        return self._transaction.connection

    def session(self, **options: Any) -> "AsyncSession":
        """An SQLAlchemy session in a savepoint of the transaction, for async handlers. `options`: see `AsyncSession`.

        Use it as `async with context.session() as session:`: what is not written yet is written when the block ends.
        `commit()` releases the savepoint, and `rollback()` undoes what was written since. Nothing is durable before
        the handler has returned. Raises `HandlerRuleBroken` after the handler has ended, and in a sync handler.
        """
        if not is_on_a_loop():
            raise HandlerRuleBroken(
                "context.session() is for async handlers; a sync handler uses context.sync_session()"
            )
        return self._transaction.session(**options)

    def sync_session(self, **options: Any) -> "Session":
        """The same in the thread of a sync handler: `with context.sync_session() as session:`, lazy loads included.

        Raises `HandlerRuleBroken` on the event loop's thread, and `TimeoutError` after the handler's deadline.
        """
        if is_on_a_loop():
            raise HandlerRuleBroken("context.sync_session() is for sync handlers; an async one uses context.session()")
        session: Session = self._run(self._transaction.sync_session(self._run, **options))
        return session

    def fetch(self, sql: str, *values: Any) -> Coroutine[Any, Any, list[Any]]:
        """Run one statement in the same transaction, directly on the driver, and return its rows. To be awaited.

        Parameters are written `$1`, `$2`, ... Values of a row are accessible by name and by index. Raises what asyncpg
        raises, and `HandlerRuleBroken` after the handler has ended, and in a sync handler: nothing would await it
        there, and the event would be completed without its effect.
        """
        if not is_on_a_loop():
            raise HandlerRuleBroken("context.fetch() is for async handlers; a sync handler calls context.execute()")
        return self._transaction.fetch(sql, *values)

    def execute(self, statement: "Executable", parameters: Any = None) -> "CursorResult[Any]":
        """Run one statement in the same transaction, from the thread of a sync handler. Its rows are buffered.

        Raises what SQLAlchemy raises; `HandlerRuleBroken` on the event loop's thread (an async handler awaits
        `context.connection.execute`); and `TimeoutError` after the handler's deadline has passed.
        """
        if is_on_a_loop():
            raise HandlerRuleBroken(
                "context.execute() is for sync handlers; an async handler awaits context.connection.execute()"
            )
        result: CursorResult[Any] = self._run(self._execute(statement, parameters))
        return result

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run `work` on the event loop, and wait for it here, in the handler's thread, until the deadline."""
        import asyncio

        remaining = self._deadline - self._loop.time()
        if remaining <= 0:
            work.close()
            self._transaction.refuse()
            raise TimeoutError(_DEADLINE_PASSED)
        call = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return call.result(remaining)
        except TimeoutError:
            if call.done():  # an error of the statement's own
                raise
            self._transaction.refuse()
            raise TimeoutError(_DEADLINE_PASSED) from None

    async def _execute(self, statement: "Executable", parameters: Any) -> "CursorResult[Any]":
        return await self.connection.execute(statement, parameters)


def is_on_a_loop() -> bool:
    """Whether the caller runs on an event loop, and not in the thread of a sync handler."""
    import asyncio

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


H = TypeVar("H", bound=Callable[[Event, Context], Any])


@dataclass(frozen=True, slots=True)
class Handler:
    """A declared function and its pattern."""

    pattern: str
    function: Callable[[Event, Context], Any]
    is_async: bool = field(init=False)  # the function is awaited; if not, it runs in a thread

    def __post_init__(self) -> None:
        object.__setattr__(self, "is_async", inspect.iscoroutinefunction(self.function))

    @property
    def name(self) -> str:
        """The function's qualified name, for faults and logs."""
        return f"{self.function.__module__}.{self.function.__qualname__}"


def on(*patterns: str) -> Callable[[H], H]:
    """Declare a handler for `patterns`: an exact type, `"customer.subscription.*"`, or `"*"`.

    The function takes `(event, context)`, is async or sync (a sync one runs in a thread), and returns the `action` of
    the answer, a short str. None means `handled`. Raises `TypeError` or `ValueError` at import for a function or
    pattern that could never work.
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
        # A list in the module's namespace: a second function of the same name replaces the first one in the module,
        # and must not replace its handler.
        declared = vars(sys.modules[function.__module__]).setdefault(_DECLARED, [])
        declared.extend(Handler(pattern, function) for pattern in patterns)
        # Also on the function, for modules that re-export it. It may carry a second `@on`.
        known = getattr(function, _PATTERNS, ())
        setattr(function, _PATTERNS, (*known, *patterns))
        return function

    return declare


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
        """The handler with the most specific pattern for `event_type`, or None."""
        if found := self._by_pattern.get(event_type):
            return found
        words = event_type.split(".")
        for length in range(len(words) - 1, 0, -1):
            if found := self._by_pattern.get(".".join(words[:length]) + ".*"):
                return found
        return self._by_pattern.get("*")
