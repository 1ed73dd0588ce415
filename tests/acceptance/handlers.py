"""The handlers of the services under test: each writes to `effects`, calls another system, and follows its event.

`data.object.metadata.behaviour` of the event names a function of `ASYNC` or `SYNC`; the other metadata are its
parameters. `until` is the last attempt on which it misbehaves. With `fixed` it misbehaves until that file exists.
`gate` is a file that it waits for, and `seconds` the duration of a slow one.
"""

import asyncio
import contextlib
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from firstclaim import BatchContext, Context, Event, Permanent, Retry, on
from tests.chaos.trace import outside

ACTION = "effect_recorded"
BATCHED = "checkout.session.completed"
_POLL_SECONDS = 0.01
_FOR_EVER = 1_000_000

_EFFECT = text("""
INSERT INTO effects (event_id, attempt, pid, xid) VALUES (:event_id, :attempt, :pid, pg_current_xact_id()::text)
""")


class _Instructions:
    """What the event tells its handler to do."""

    def __init__(self, event: Event) -> None:
        about = event.data.get("object")
        metadata = about.get("metadata") if isinstance(about, dict) else None
        self.of: dict[str, Any] = metadata if isinstance(metadata, dict) else {}

    @property
    def behaviour(self) -> str:
        return str(self.of.get("behaviour", "plain"))

    def misbehaves(self, context: Context) -> bool:
        if "fixed" in self.of:
            return not Path(str(self.of["fixed"])).exists()
        return context.attempt <= int(self.of.get("until", _FOR_EVER))

    @property
    def gate(self) -> Path:
        return Path(str(self.of["gate"]))

    @property
    def after(self) -> float | None:
        return float(self.of["after"]) if "after" in self.of else None

    @property
    def seconds(self) -> float:
        return float(self.of["seconds"])


def _effect(event: Event, context: Context) -> dict[str, Any]:
    return {"event_id": event.id, "attempt": context.attempt, "pid": os.getpid()}


@on("invoice.payment_failed", "customer.subscription.*", "v1.billing.meter.error_report_triggered")
async def act(event: Event, context: Context) -> Any:
    """The async handler, for an exact type, a wildcard and a thin type."""
    await context.connection.execute(_EFFECT, _effect(event, context))
    outside(event.id, context.attempt, context.idempotency_key)
    instructions = _Instructions(event)
    return await ASYNC[instructions.behaviour](instructions, context)


@on("invoice.paid")
def act_in_thread(event: Event, context: Context) -> Any:
    """The sync handler."""
    context.execute(_EFFECT, _effect(event, context))
    outside(event.id, context.attempt, context.idempotency_key)
    instructions = _Instructions(event)
    return SYNC[instructions.behaviour](instructions, context)


@on(BATCHED, batch=True)
async def act_on_all(events: list[Event], context: BatchContext) -> str:
    """The batch handler: the effects of all in one statement, then what the events ask for, one after the other."""
    attempts = context.attempts
    await context.connection.execute(
        _EFFECT, [{"event_id": each.id, "attempt": attempts[each.id], "pid": os.getpid()} for each in events]
    )
    for event in events:
        outside(event.id, attempts[event.id], event.id)
    for event in events:
        instructions = _Instructions(event)
        if attempts[event.id] <= int(instructions.of.get("until", _FOR_EVER)):
            await _IN_A_BATCH[instructions.behaviour](instructions, context)
    return ACTION


# -- a batch ------------------------------------------------------------------------------------------


async def _fail_all(_instructions: _Instructions, _context: BatchContext) -> None:
    raise RuntimeError("instructed to fail")


async def _die_with_all(_instructions: _Instructions, _context: BatchContext) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


async def _commit_all(_instructions: _Instructions, context: BatchContext) -> None:
    await context.connection.exec_driver_sql("COMMIT")


async def _slow_for_all(instructions: _Instructions, _context: BatchContext) -> None:
    await asyncio.sleep(instructions.seconds)


async def _hold_all(instructions: _Instructions, _context: BatchContext) -> None:
    while not instructions.gate.exists():  # noqa: ASYNC110  (another process opens it)
        await asyncio.sleep(_POLL_SECONDS)


async def _plain_for_all(_instructions: _Instructions, _context: BatchContext) -> None:
    pass


_IN_A_BATCH: Mapping[str, Callable[[_Instructions, BatchContext], Awaitable[None]]] = {
    "plain": _plain_for_all,
    "fail": _fail_all,
    "die": _die_with_all,
    "raw_commit": _commit_all,
    "slow": _slow_for_all,
    "hold": _hold_all,
}


# -- async --------------------------------------------------------------------------------------------


async def _plain(_instructions: _Instructions, _context: Context) -> str:
    return ACTION


async def _fail(instructions: _Instructions, context: Context) -> str:
    return _fail_in_thread(instructions, context)


async def _retry(instructions: _Instructions, context: Context) -> str:
    if instructions.misbehaves(context):
        raise Retry("not yet", after=instructions.after)
    return ACTION


async def _permanent(instructions: _Instructions, context: Context) -> str:
    if instructions.misbehaves(context):
        raise Permanent("never")
    return ACTION


async def _hold(instructions: _Instructions, _context: Context) -> str:
    while not instructions.gate.exists():  # noqa: ASYNC110  (another process opens it)
        await asyncio.sleep(_POLL_SECONDS)
    return ACTION


async def _hang(instructions: _Instructions, context: Context) -> str:
    if instructions.misbehaves(context):
        await asyncio.Event().wait()
    return ACTION


async def _slow(instructions: _Instructions, _context: Context) -> str:
    await asyncio.sleep(instructions.seconds)
    return ACTION


async def _slow_sql(instructions: _Instructions, context: Context) -> str:
    if instructions.misbehaves(context):
        await context.connection.execute(text("SELECT pg_sleep(100)"))
    return ACTION


async def _stubborn(instructions: _Instructions, context: Context) -> str:
    """Continues after its cancellation, tries to write once the gate opens, and reports the result in a file."""
    if instructions.misbehaves(context):
        while not instructions.gate.exists():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(_POLL_SECONDS)
        try:
            await context.connection.execute(_EFFECT, _effect(context.event, context))
        except Exception as error:
            _report(instructions, context, error)
            raise
    return ACTION


async def _die(instructions: _Instructions, context: Context) -> str:
    if instructions.misbehaves(context):
        os.kill(os.getpid(), signal.SIGKILL)
    return ACTION


async def _abort(instructions: _Instructions, context: Context) -> str:
    if instructions.misbehaves(context):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.abort()
    return ACTION


async def _swallow(instructions: _Instructions, context: Context) -> str:
    if instructions.misbehaves(context):
        try:
            await context.connection.execute(text("SELECT 1 / 0"))
        except DBAPIError:
            return "swallowed"
    return ACTION


async def _raw_commit(_instructions: _Instructions, context: Context) -> str:
    await context.connection.exec_driver_sql("COMMIT")
    return "committed_by_itself"


async def _raw_commit_and_go_on(instructions: _Instructions, context: Context) -> str:
    connection = context.connection
    await connection.exec_driver_sql("COMMIT")
    await asyncio.sleep(instructions.seconds)
    await connection.execute(_EFFECT, _effect(context.event, context))
    return ACTION


async def _raw_rollback_and_write(_instructions: _Instructions, context: Context) -> str:
    await context.connection.exec_driver_sql("ROLLBACK")
    await context.connection.execute(_EFFECT, _effect(context.event, context))
    return ACTION


async def _commit(instructions: _Instructions, context: Context) -> str:
    if instructions.misbehaves(context):
        await context.connection.commit()
    return ACTION


async def _commit_and_go_on(instructions: _Instructions, context: Context) -> str:
    if instructions.misbehaves(context):
        with contextlib.suppress(Exception):
            await context.connection.commit()
    return ACTION


async def _rollback(instructions: _Instructions, context: Context) -> str:
    if instructions.misbehaves(context):
        await context.connection.rollback()
    return ACTION


async def _close(instructions: _Instructions, context: Context) -> str:
    if instructions.misbehaves(context):
        await context.connection.close()
    return ACTION


async def _exit(instructions: _Instructions, context: Context) -> str:
    if instructions.misbehaves(context):
        sys.exit(1)
    return ACTION


async def _exit_in_a_task(instructions: _Instructions, context: Context) -> str:
    """Ends the process once the gate is open: asyncio raises a SystemExit of a task out of the event loop."""

    async def leave() -> None:
        sys.exit(3)

    if instructions.misbehaves(context):
        await _hold(instructions, context)
        await asyncio.gather(leave())
    return ACTION


async def _block_a_thread(instructions: _Instructions, context: Context) -> str:
    """In the event loop's executor: its threads are not daemons."""
    if instructions.misbehaves(context):
        await asyncio.to_thread(time.sleep, instructions.seconds)
    return ACTION


async def _block_the_loop(instructions: _Instructions, context: Context) -> str:
    if instructions.misbehaves(context):
        time.sleep(instructions.seconds)  # noqa: ASYNC251
    return ACTION


async def _leave_a_thread(instructions: _Instructions, context: Context) -> str:
    if instructions.misbehaves(context):
        threading.Thread(target=time.sleep, args=(instructions.seconds,), daemon=False).start()
    return ACTION


async def _cancel(instructions: _Instructions, context: Context) -> str:
    if instructions.misbehaves(context):
        raise asyncio.CancelledError
    return ACTION


async def _bad_action(instructions: _Instructions, context: Context) -> object:
    return {"not": "an action"} if instructions.misbehaves(context) else ACTION


# -- sync ---------------------------------------------------------------------------------------------


def _plain_in_thread(_instructions: _Instructions, _context: Context) -> str:
    return ACTION


def _fail_in_thread(instructions: _Instructions, context: Context) -> str:
    if instructions.misbehaves(context):
        raise RuntimeError(f"attempt {context.attempt} was instructions to fail")
    return ACTION


def _hold_in_thread(instructions: _Instructions, _context: Context) -> str:
    while not instructions.gate.exists():
        time.sleep(_POLL_SECONDS)
    return ACTION


def _slow_in_thread(instructions: _Instructions, _context: Context) -> str:
    time.sleep(instructions.seconds)
    return ACTION


def _raw_commit_in_thread(instructions: _Instructions, context: Context) -> str:
    context.execute(text("COMMIT"))
    time.sleep(instructions.seconds)
    context.execute(_EFFECT, _effect(context.event, context))
    return ACTION


def _late_in_thread(instructions: _Instructions, context: Context) -> str:
    """Writes again once the gate opens, after its deadline, and reports the result in a file."""
    if instructions.misbehaves(context):
        _hold_in_thread(instructions, context)
        try:
            context.execute(_EFFECT, _effect(context.event, context))
        except Exception as error:
            _report(instructions, context, error)
            raise
    return ACTION


def _report(instructions: _Instructions, context: Context, error: Exception) -> None:
    (instructions.gate.parent / context.event.id).write_text(type(error).__name__)


ASYNC: Mapping[str, Callable[[_Instructions, Context], Awaitable[object]]] = {
    "plain": _plain,
    "fail": _fail,
    "retry": _retry,
    "permanent": _permanent,
    "hold": _hold,
    "hang": _hang,
    "slow": _slow,
    "slow_sql": _slow_sql,
    "stubborn": _stubborn,
    "die": _die,
    "abort": _abort,
    "swallow": _swallow,
    "raw_commit": _raw_commit,
    "raw_commit_and_go_on": _raw_commit_and_go_on,
    "raw_rollback_and_write": _raw_rollback_and_write,
    "commit": _commit,
    "commit_and_go_on": _commit_and_go_on,
    "rollback": _rollback,
    "close": _close,
    "exit": _exit,
    "exit_in_a_task": _exit_in_a_task,
    "block_a_thread": _block_a_thread,
    "block_the_loop": _block_the_loop,
    "leave_a_thread": _leave_a_thread,
    "cancel": _cancel,
    "bad_action": _bad_action,
}

SYNC: Mapping[str, Callable[[_Instructions, Context], str]] = {
    "plain": _plain_in_thread,
    "fail": _fail_in_thread,
    "hold": _hold_in_thread,
    "slow": _slow_in_thread,
    "late": _late_in_thread,
    "raw_commit_and_go_on": _raw_commit_in_thread,
}
