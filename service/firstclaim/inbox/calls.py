"""Calls of handlers and tasks: each gets a context on a connection that is in a transaction.

Guarantees: while the function runs, the rules of a handler's transaction hold for its connection. Once it has ended,
its context refuses everything. The test kit calls the functions of users in the same way.
"""

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from firstclaim.context import BatchContext, Context, TaskContext
from firstclaim.event import Event
from firstclaim.follow_up import Outbox
from firstclaim.inbox.handler_call import HandlerCall
from firstclaim.inbox.task_event import TaskEvent
from firstclaim.postgres.handler_connections import HandlerConnection

T = TypeVar("T")


async def call_handler(
    call: HandlerCall,
    event: Event,
    attempt: int,
    body: bytes,
    connection: HandlerConnection,
    deadline_seconds: float,
    outbox: Outbox,
) -> str:
    """Let the handler of `call` work on a connection that is in a transaction; returns its action.

    `body`: what Stripe has signed.

    Raises what the handler or `HandlerCall.end` gives, `DeadlineExceeded`, and `HandlerRuleBroken`.
    """
    loop = asyncio.get_running_loop()
    context = Context(connection, loop, loop.time() + deadline_seconds, attempt, outbox, event, body)
    return await _within_its_rules(connection, outbox, call.run(event, context))


async def call_task(
    call: HandlerCall,
    task: TaskEvent,
    attempt: int,
    connection: HandlerConnection,
    deadline_seconds: float,
    outbox: Outbox,
) -> str:
    """Let the task of `call` work on a connection that is in a transaction; returns its action.

    Raises as `call_handler` does.
    """
    loop = asyncio.get_running_loop()
    data = task.data_of_task
    context = TaskContext(
        connection,
        loop,
        loop.time() + deadline_seconds,
        attempt,
        outbox,
        task.id,
        task.name,
        data.payload,
        data.event_id,
        data.parent_id,
        data.account,
        data.livemode,
    )
    return await _within_its_rules(connection, outbox, call.run_task(context))


async def call_batch_handler(
    call: HandlerCall,
    events: Sequence[Event],
    attempts: Mapping[str, int],
    connection: HandlerConnection,
    deadline_seconds: float,
    outbox: Outbox,
) -> list[str]:
    """Let the handler of `call` work on a connection that is in a transaction; returns the action for each event.

    Raises as `call_handler` does.
    """
    loop = asyncio.get_running_loop()
    context = BatchContext(connection, loop, loop.time() + deadline_seconds, attempts, outbox)
    return await _within_its_rules(connection, outbox, call.run_batch(events, context))


async def _within_its_rules(connection: HandlerConnection, outbox: Outbox, work: Coroutine[Any, Any, T]) -> T:
    connection.start(outbox)
    try:
        result = await work
    finally:
        outbox.close()
        connection.stop()
    connection.check_rules()
    return result
