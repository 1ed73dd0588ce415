"""What the row of a claim holds: an event of Stripe's, or what was enqueued for a task."""

from dataclasses import dataclass, field
from datetime import UTC, datetime

from firstclaim.event import Event, parse_event
from firstclaim.follow_up import TASK, TaskData, parse_task

_NO_INSTANT = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class TaskEvent(Event):
    """What was enqueued for a task, on the way of an event; its object is the payload. No user's function gets it."""

    name: str = ""
    data_of_task: TaskData = field(default_factory=lambda: TaskData(None, "", "", None, False))


def parse_row(row_id: str, row_type: str, body: bytes, endpoint: str | None = None) -> Event:
    """What the body of a row says. Raises `Rejected` or `ValueError`."""
    if not row_type.startswith(TASK):
        return parse_event(body, endpoint)
    data = parse_task(body)
    return TaskEvent(
        id=row_id,
        type=row_type,
        account=data.account,
        livemode=data.livemode,
        created=_NO_INSTANT,
        api_version=None,
        object_id=None,
        data={"object": data.payload},
        payload={},
        name=row_type.removeprefix(TASK),
        data_of_task=data,
    )
