"""What the row of a claim holds: an event of Stripe's, or what was enqueued for a task."""

from dataclasses import dataclass, field
from datetime import UTC, datetime

from firstclaim.event import Event, parse_event
from firstclaim.follow_up import TASK, TaskData, parse_task
from firstclaim.inbox.claim import Claim

_NO_INSTANT = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class TaskEvent(Event):
    """What was enqueued for a task, on the way of an event. No function of users' gets it."""

    name: str = ""
    data_of_task: TaskData = field(default_factory=lambda: TaskData(None, "", "", None, False))


def parse_row(claim: Claim) -> Event:
    """What the body of the claim's row says. Raises `Rejected` or `ValueError`."""
    body = claim.body or b""
    if not claim.type.startswith(TASK):
        return parse_event(body, claim.endpoint)
    data = parse_task(body)
    return TaskEvent(
        id=claim.event_id,
        type=claim.type,
        account=data.account,
        livemode=data.livemode,
        created=_NO_INSTANT,
        api_version=None,
        object_id=None,
        data={},
        payload={},
        name=claim.type.removeprefix(TASK),
        data_of_task=data,
    )
