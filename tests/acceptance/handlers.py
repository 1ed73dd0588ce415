"""The handlers of the processes under test: every one leaves a row in `effects`, calls outside, does as its event says.

The event chooses: `data.object.metadata.behaviour` names a function of `ASYNC` or `SYNC`, the other metadata
are its parameters: `until` is the last attempt on which it misbehaves, `fixed` a file whose existence ends
that instead, `gate` a file that it waits for, `seconds` how long a slow one takes.
"""

import asyncio
import contextlib
import os
import resource
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from firstclaim import Context, Event, Permanent, Retry, on
from tests.chaos.trace import outside

ACTION = "effect_recorded"
_POLL_SECONDS = 0.01
_FOR_EVER = 1_000_000

_EFFECT = text("""
INSERT INTO effects (event_id, attempt, pid, xid) VALUES (:event_id, :attempt, :pid, pg_current_xact_id()::text)
""")


class _Wish:
    """What the event asks of its handler."""

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
    wish = _Wish(event)
    return await ASYNC[wish.behaviour](wish, context)


@on("invoice.paid")
def act_in_thread(event: Event, context: Context) -> Any:
    """The sync handler."""
    context.execute(_EFFECT, _effect(event, context))
    outside(event.id, context.attempt, context.idempotency_key)
    wish = _Wish(event)
    return SYNC[wish.behaviour](wish, context)


# -- async --------------------------------------------------------------------------------------------


async def _plain(_wish: _Wish, _context: Context) -> str:
    return ACTION


async def _fail(wish: _Wish, context: Context) -> str:
    return _fail_in_thread(wish, context)


async def _retry(wish: _Wish, context: Context) -> str:
    if wish.misbehaves(context):
        raise Retry("not yet", after=wish.after)
    return ACTION


async def _permanent(wish: _Wish, context: Context) -> str:
    if wish.misbehaves(context):
        raise Permanent("never")
    return ACTION


async def _hold(wish: _Wish, _context: Context) -> str:
    while not wish.gate.exists():  # noqa: ASYNC110  (another process opens it)
        await asyncio.sleep(_POLL_SECONDS)
    return ACTION


async def _hang(wish: _Wish, context: Context) -> str:
    if wish.misbehaves(context):
        await asyncio.Event().wait()
    return ACTION


async def _slow(wish: _Wish, _context: Context) -> str:
    await asyncio.sleep(wish.seconds)
    return ACTION


async def _slow_sql(wish: _Wish, context: Context) -> str:
    if wish.misbehaves(context):
        await context.connection.execute(text("SELECT pg_sleep(100)"))
    return ACTION


async def _stubborn(wish: _Wish, context: Context) -> str:
    """Goes on after its cancellation, tries to write once the gate opens, and leaves word of how that went."""
    if wish.misbehaves(context):
        while not wish.gate.exists():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(_POLL_SECONDS)
        try:
            await context.connection.execute(_EFFECT, _effect(context.event, context))
        except Exception as error:
            _leave_word(wish, context, error)
            raise
    return ACTION


async def _die(wish: _Wish, context: Context) -> str:
    if wish.misbehaves(context):
        os.kill(os.getpid(), signal.SIGKILL)
    return ACTION


async def _abort(wish: _Wish, context: Context) -> str:
    if wish.misbehaves(context):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.abort()
    return ACTION


async def _swallow(wish: _Wish, context: Context) -> str:
    if wish.misbehaves(context):
        try:
            await context.connection.execute(text("SELECT 1 / 0"))
        except DBAPIError:
            return "swallowed"
    return ACTION


async def _raw_commit(_wish: _Wish, context: Context) -> str:
    await context.connection.exec_driver_sql("COMMIT")
    return "committed_by_itself"


async def _raw_rollback_and_write(_wish: _Wish, context: Context) -> str:
    await context.connection.exec_driver_sql("ROLLBACK")
    await context.connection.execute(_EFFECT, _effect(context.event, context))
    return ACTION


async def _commit(wish: _Wish, context: Context) -> str:
    if wish.misbehaves(context):
        await context.connection.commit()
    return ACTION


async def _commit_and_go_on(wish: _Wish, context: Context) -> str:
    if wish.misbehaves(context):
        with contextlib.suppress(Exception):
            await context.connection.commit()
    return ACTION


async def _rollback(wish: _Wish, context: Context) -> str:
    if wish.misbehaves(context):
        await context.connection.rollback()
    return ACTION


async def _close(wish: _Wish, context: Context) -> str:
    if wish.misbehaves(context):
        await context.connection.close()
    return ACTION


async def _exit(wish: _Wish, context: Context) -> str:
    if wish.misbehaves(context):
        sys.exit(1)
    return ACTION


async def _cancel(wish: _Wish, context: Context) -> str:
    if wish.misbehaves(context):
        raise asyncio.CancelledError
    return ACTION


async def _bad_action(wish: _Wish, context: Context) -> object:
    return {"not": "an action"} if wish.misbehaves(context) else ACTION


# -- sync ---------------------------------------------------------------------------------------------


def _plain_in_thread(_wish: _Wish, _context: Context) -> str:
    return ACTION


def _fail_in_thread(wish: _Wish, context: Context) -> str:
    if wish.misbehaves(context):
        raise RuntimeError(f"attempt {context.attempt} was told to fail")
    return ACTION


def _hold_in_thread(wish: _Wish, _context: Context) -> str:
    while not wish.gate.exists():
        time.sleep(_POLL_SECONDS)
    return ACTION


def _slow_in_thread(wish: _Wish, _context: Context) -> str:
    time.sleep(wish.seconds)
    return ACTION


def _late_in_thread(wish: _Wish, context: Context) -> str:
    """Writes again once the gate opens, which is after its deadline, and leaves word of how that went."""
    if wish.misbehaves(context):
        _hold_in_thread(wish, context)
        try:
            context.execute(_EFFECT, _effect(context.event, context))
        except Exception as error:
            _leave_word(wish, context, error)
            raise
    return ACTION


def _leave_word(wish: _Wish, context: Context, error: Exception) -> None:
    (wish.gate.parent / context.event.id).write_text(type(error).__name__)


ASYNC: Mapping[str, Callable[[_Wish, Context], Awaitable[object]]] = {
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
    "raw_rollback_and_write": _raw_rollback_and_write,
    "commit": _commit,
    "commit_and_go_on": _commit_and_go_on,
    "rollback": _rollback,
    "close": _close,
    "exit": _exit,
    "cancel": _cancel,
    "bad_action": _bad_action,
}

SYNC: Mapping[str, Callable[[_Wish, Context], str]] = {
    "plain": _plain_in_thread,
    "fail": _fail_in_thread,
    "hold": _hold_in_thread,
    "slow": _slow_in_thread,
    "late": _late_in_thread,
}
