"""A build with two handlers for one type, which enqueue tasks, which enqueue tasks. In FIRSTCLAIM_HANDLERS.

Each handler and each run of a task writes one effect, and calls outside, under the id of its row: the checks of a run
then hold for each of them as for an event. `ROWS` says what there is for one event, its own row included, which has no
effect.
"""

from collections.abc import Mapping
from typing import Any, Final

from sqlalchemy import text

from firstclaim import Context, Event, TaskContext, on, task
from tests.chaos.trace import outside

SEVERAL: Final = "balance.available"
ROWS: Final[Mapping[str, int]] = {
    SEVERAL: 1,
    "handler:ledger": 1,
    "handler:crm": 1,
    "task:send": 2,
    "task:report": 2,
}

_EFFECT = (
    "INSERT INTO effects (event_id, attempt, pid, xid) VALUES ({}, {}, pg_backend_pid(), pg_current_xact_id()::text)"
)
_BY_NUMBER, _BY_NAME = _EFFECT.format("$1", "$2"), text(_EFFECT.format(":id", ":attempt"))


@on(SEVERAL, name="ledger")
async def keep(event: Event, context: Context) -> None:
    """Two follow-ups, one of them later."""
    await context.fetch(_BY_NUMBER, context.idempotency_key, context.attempt)
    outside(context.idempotency_key, context.attempt, context.idempotency_key)
    context.enqueue("send", {"report": True})
    context.enqueue("send", {"report": False}, after=0.3)


@on(SEVERAL, name="crm")
def tell(event: Event, context: Context) -> None:
    """In a thread, with one follow-up."""
    context.execute(_BY_NAME, {"id": context.idempotency_key, "attempt": context.attempt})
    outside(context.idempotency_key, context.attempt, context.idempotency_key)
    context.enqueue("report", event.id)


@task("send")
async def send(context: TaskContext) -> None:
    """The first of an event enqueues another task."""
    payload: dict[str, Any] = context.payload
    await context.fetch(_BY_NUMBER, context.id, context.attempt)
    outside(context.id, context.attempt, context.idempotency_key)
    if payload["report"]:
        context.enqueue("report", context.event_id)


@task("report")
def report(context: TaskContext) -> None:
    """In a thread."""
    context.execute(_BY_NAME, {"id": context.id, "attempt": context.attempt})
    outside(context.id, context.attempt, context.idempotency_key)
