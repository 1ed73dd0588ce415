"""One call of a handler: in a task, or in a thread if it is a plain function.

Guarantees: nothing that a handler raises ends the event loop or the service. Whatever it does, the caller waits for it
no longer than its deadline, or until `end` is called.
"""

import asyncio
import contextlib
import contextvars
import inspect
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

from firstclaim.context import BatchContext, Context, TaskContext
from firstclaim.errors import HandlerRuleBroken
from firstclaim.event import Event
from firstclaim.inbox import unawaited
from firstclaim.inbox.step_timer import StepTimer
from firstclaim.observability import tracing
from firstclaim.observability.handler_metrics import AttemptOutcome
from firstclaim.observability.redaction import class_name, is_a
from firstclaim.registry import Handler

AnyContext: TypeAlias = Context | BatchContext | TaskContext

_GRACE_SECONDS = 1.0
_MAX_ACTION_CHARACTERS = 200
_NEVER_AWAITED = (
    "a handler must await what it calls: {} was never awaited, and has done nothing "
    "(write `await`, in a handler that is an `async def`)"
)


class DeadlineExceeded(Exception):
    """The handler ran longer than its deadline. (Not a TimeoutError: a handler may raise one of its own.)"""


class HandlerCall:
    """A handler, and, once `run` is called, the task or thread that it runs in."""

    def __init__(self, handler: Handler, deadline_seconds: float, timer: StepTimer) -> None:
        self._handler = handler
        self._deadline_seconds = deadline_seconds
        self._timer = timer
        self._context: AnyContext | None = None
        self._work: asyncio.Future[Any] | None = None
        self._reason: Exception | None = None  # to stop waiting for the handler
        self._seconds: float | None = None  # until it ended, or until nobody waited for it any more
        self._over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def running(self) -> asyncio.Future[Any] | None:
        """The task or thread if it still runs, because it ignores its cancellation or cannot be cancelled."""
        return None if self._work is None or self._work.done() else self._work

    @property
    def names(self) -> dict[str, str | int]:
        """What a log record of the call names."""
        if self._context is None:
            return {}
        if isinstance(self._context, BatchContext):
            return {"events": len(self._context.attempts), "handler": self._handler.name}
        if isinstance(self._context, TaskContext):
            event_id, row_type = self._context.id, self._handler.pattern
        else:
            event_id, row_type = self._context.event.id, self._context.event.type
        return {
            "event_id": event_id,
            "type": row_type,
            "attempt": self._context.attempt,
            "handler": self._handler.name,
        }

    def end(self, reason: Exception) -> None:
        """Stop waiting for the handler: unless it has returned, `run` cancels it and raises `reason`."""
        if not self._over.done():
            self._reason = reason
            self._over.set_result(None)

    def observe(self, outcome: AttemptOutcome | None) -> None:
        """Count the time that the handler took, and the outcome of its attempt, unless that has none."""
        if outcome is None or self._seconds is None:
            return
        self._handler.metrics.observe(outcome, self._seconds)
        if isinstance(self._context, BatchContext):
            self._handler.metrics.observe_batch(len(self._context.attempts), self._seconds)

    async def run(self, event: Event, context: Context) -> str:
        """The handler's action. Raises the handler's exception, `end`'s, `DeadlineExceeded` or `HandlerRuleBroken`."""
        return _checked_action(await self._run(context, event.id, event, context))

    async def run_task(self, context: TaskContext) -> str:
        """The action of a task. Raises as `run` does."""
        return _checked_action(await self._run(context, context.id, context))

    async def run_batch(self, events: Sequence[Event], context: BatchContext) -> list[str]:
        """The actions of a batch handler, one for each event. Raises as `run` does."""
        return _checked_actions(await self._run(context, events[0].id, list(events), context), len(events))

    async def _run(self, context: AnyContext, first_id: str, *arguments: object) -> Any:
        self._context = context
        loop = asyncio.get_running_loop()
        start = _in_task if self._handler.is_async else _in_thread
        forgotten: list[str] = []
        began = time.perf_counter()  # the loop's own clock counts milliseconds
        try:
            with tracing.span("handler", handler=self._handler.pattern):
                self._work = work = start(loop, partial(self._handler.function, *arguments), first_id, forgotten)
                work.add_done_callback(self._has_returned)
                self._timer.start(self._deadline_seconds, self._exceed_deadline)
                await self._over
        except asyncio.CancelledError:
            _cancel(work)
            raise
        finally:
            self._timer.stop()
            self._seconds = time.perf_counter() - began
        if self._reason is not None and not work.done():
            _cancel(work)
            if is_a(self._reason, DeadlineExceeded) and not self._handler.is_async:
                # A thread that uses its connection gets an error there, and ends. Until then its row is locked, so
                # that no process begins another attempt beside it.
                await asyncio.wait({work}, timeout=_GRACE_SECONDS)
            raise self._reason
        if work.cancelled():  # by something in the handler; a shutdown would have raised in the wait above
            raise HandlerRuleBroken("a handler must not end by cancelling itself")
        if (error := work.exception()) is not None and not is_a(error, Exception):
            raise _forbidden(error)
        result = work.result()
        if forgotten:
            raise HandlerRuleBroken(_NEVER_AWAITED.format(", ".join(forgotten)))
        return result

    def _has_returned(self, _work: asyncio.Future[Any]) -> None:
        if not self._over.done():
            self._over.set_result(None)

    def _exceed_deadline(self) -> None:
        self.end(DeadlineExceeded(f"the handler ran longer than its deadline of {self._deadline_seconds:g} s"))


def _in_task(
    loop: asyncio.AbstractEventLoop,
    function: Callable[[], Any],
    _first_id: str,
    forgotten: list[str],
) -> asyncio.Future[Any]:
    async def body() -> Any:
        unawaited.note_in(forgotten)
        try:
            return await function()
        except (SystemExit, KeyboardInterrupt) as error:
            raise _forbidden(error) from error

    return loop.create_task(body())


def _in_thread(
    loop: asyncio.AbstractEventLoop,
    function: Callable[[], Any],
    first_id: str,
    forgotten: list[str],
) -> asyncio.Future[Any]:
    """Run a sync handler in a thread of its own. It is a daemon thread: if it hangs, it does not delay the exit."""
    future: asyncio.Future[Any] = loop.create_future()

    def settle(result: Any, error: Exception | None) -> None:
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)
            future.exception()  # marks it as retrieved: after the deadline nobody retrieves it

    def body() -> None:
        unawaited.note_in(forgotten)
        result: Any = None
        failure: Exception | None = None
        try:
            result = function()
        except BaseException as error:  # noqa: BLE001
            catchable = is_a(error, Exception) and not is_a(error, StopIteration)
            failure = error if catchable else _forbidden(error)  # type: ignore[assignment]
        with contextlib.suppress(RuntimeError):  # the loop is closed: the service has ended, and recovery gets the row
            loop.call_soon_threadsafe(settle, result, failure)

    run = contextvars.copy_context().run
    threading.Thread(target=run, args=(body,), daemon=True, name=f"handler-{first_id}").start()
    return future


def _forbidden(error: BaseException) -> HandlerRuleBroken:
    """The error to raise instead of one that would end the event loop, or that no `except Exception` catches."""
    return HandlerRuleBroken(f"a handler must not raise {class_name(error)}")


def _cancel(work: asyncio.Future[Any]) -> None:
    """Cancel a task. A thread cannot be cancelled: its later calls on the connection raise."""
    if isinstance(work, asyncio.Task):
        work.cancel()
        work.add_done_callback(lambda task: task.cancelled() or task.exception())


def _checked_action(value: object) -> str:
    if value is None:
        return "handled"
    if isinstance(value, str) and value.isprintable() and 0 < len(value) <= _MAX_ACTION_CHARACTERS:
        return value
    if inspect.isawaitable(value):
        name = type(value).__name__
        if inspect.iscoroutine(value):
            name = value.__qualname__
            value.close()  # otherwise Python reports it as well
        raise HandlerRuleBroken(_NEVER_AWAITED.format(name))
    raise HandlerRuleBroken(
        f"a handler returns its action, a short printable str, or None; this one returned {type(value).__name__}"
    )


def _checked_actions(value: object, count: int) -> list[str]:
    """One action for each event of a batch: a handler returns them in a list, or one for all."""
    if not isinstance(value, list | tuple):
        return [_checked_action(value)] * count
    if len(value) != count:
        raise HandlerRuleBroken(
            f"a batch handler returns one action, or one for each event: {count}; this one returned {len(value)}"
        )
    return [_checked_action(each) for each in value]
