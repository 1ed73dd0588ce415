"""Handlers that put all they know into their errors: that text must reach nothing but the ledger, redacted.

`data.object.metadata.how` names the way in which a handler fails.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from sqlalchemy import text

from firstclaim import Context, Event, Permanent, Retry, on
from tests.canaries import STORY


class MuteError(Exception):
    """An exception without a readable text."""

    def __str__(self) -> str:
        raise RuntimeError(STORY)

    __repr__ = __str__


def _all(event: Event) -> str:
    return f"{STORY} {event.data} {event}"


async def _raise(event: Event, _: Context) -> object:
    raise RuntimeError(_all(event))


async def _caused(event: Event, _: Context) -> object:
    try:
        raise KeyError(_all(event))
    except KeyError as error:
        raise ValueError(STORY) from error


async def _group(event: Event, _: Context) -> object:
    raise ExceptionGroup(STORY, [ValueError(_all(event)), KeyError(STORY)])


async def _base_group(event: Event, _: Context) -> object:
    raise BaseExceptionGroup(STORY, [asyncio.CancelledError(_all(event))])


async def _mute(_: Event, __: Context) -> object:
    raise MuteError


async def _permanent(event: Event, _: Context) -> object:
    raise Permanent(_all(event))


async def _retry(event: Event, _: Context) -> object:
    raise Retry(_all(event), after=3600)


async def _exit(event: Event, _: Context) -> object:
    raise SystemExit(_all(event))


async def _cancelled(event: Event, _: Context) -> object:
    raise asyncio.CancelledError(_all(event))


async def _parameter(event: Event, context: Context) -> object:
    await context.connection.execute(text("SELECT CAST(:story AS integer)"), {"story": _all(event)})
    return None


async def _argument(event: Event, context: Context) -> object:
    await context.connection.execute(text("SELECT 1 + :story"), {"story": _all(event)})
    return None


async def _statement(event: Event, context: Context) -> object:
    await context.connection.exec_driver_sql(f"SELECT $story${_all(event).replace('%', '')}$story$::integer")
    return None


async def _broken(event: Event, context: Context) -> object:
    await context.connection.exec_driver_sql(f"SELECT '{STORY}")
    return None


async def _row(event: Event, context: Context) -> object:
    await context.connection.execute(text("CREATE TEMPORARY TABLE once (story text UNIQUE) ON COMMIT DROP"))
    for _ in range(2):
        await context.connection.execute(text("INSERT INTO once VALUES (:story)"), {"story": _all(event)})
    return None


async def _selected(event: Event, context: Context) -> object:
    found = await context.connection.execute(text("SELECT CAST(:story AS text) AS story"), {"story": _all(event)})
    raise RuntimeError(found.one())


async def _forgotten(event: Event, context: Context) -> object:
    task = asyncio.ensure_future(_raise(event, context))
    await asyncio.wait({task})
    del task
    return None


async def _unhandled(event: Event, _: Context) -> object:
    loop = asyncio.get_running_loop()
    loop.call_soon(_fail, event)
    await asyncio.sleep(0.01)
    return None


def _fail(event: Event) -> None:
    raise RuntimeError(_all(event))


async def _logged(event: Event, _: Context) -> object:
    try:
        _fail(event)
    except RuntimeError:
        logging.getLogger("shop").exception("it broke")
    return None


async def _returned(event: Event, _: Context) -> object:
    return dict(event.data)


async def _long_action(event: Event, _: Context) -> object:
    return _all(event)


ASYNC: Mapping[str, Callable[[Event, Context], Awaitable[object]]] = {
    "raise": _raise,
    "caused": _caused,
    "group": _group,
    "base group": _base_group,
    "mute": _mute,
    "permanent": _permanent,
    "retry": _retry,
    "exit": _exit,
    "cancelled": _cancelled,
    "parameter": _parameter,
    "argument": _argument,
    "statement": _statement,
    "broken": _broken,
    "row": _row,
    "selected": _selected,
    "forgotten": _forgotten,
    "unhandled": _unhandled,
    "logged": _logged,
    "returned": _returned,
    "long action": _long_action,
}


def _thread_raise(event: Event, _: Context) -> object:
    raise RuntimeError(_all(event))


def _thread_exit(event: Event, _: Context) -> object:
    raise SystemExit(_all(event))


def _thread_stop(event: Event, _: Context) -> object:
    raise StopIteration(_all(event))


def _thread_parameter(event: Event, context: Context) -> object:
    context.execute(text("SELECT CAST(:story AS integer)"), {"story": _all(event)})
    return None


SYNC: Mapping[str, Callable[[Event, Context], object]] = {
    "raise": _thread_raise,
    "exit": _thread_exit,
    "stop": _thread_stop,
    "parameter": _thread_parameter,
}


@on("charge.refunded")
async def tell(event: Event, context: Context) -> Any:
    """In a task."""
    return await ASYNC[event.data["object"]["metadata"]["how"]](event, context)


@on("customer.created")
def tell_in_thread(event: Event, context: Context) -> Any:
    """In a thread."""
    return SYNC[event.data["object"]["metadata"]["how"]](event, context)
