"""Which events an operator means.

Guarantees: a `Selection` and the condition `SELECTED` mean the same events to a list, a count, a replay and a pruning.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from firstclaim.status import Status

# The condition of a group of failures, on `stripe_events e`: the last attempt that did not succeed belongs to it, and
# the event is not completed.
IN_GROUP = """(CAST(:group AS text) IS NULL OR e.status <> 'completed' AND e.event_id IN (
       SELECT a.event_id FROM firstclaim.stripe_event_attempts a
        WHERE a.failure_group = CAST(:group AS text) AND NOT EXISTS (
              SELECT FROM firstclaim.stripe_event_attempts later
               WHERE later.event_id = a.event_id AND (later.attempt, later.ended_at) > (a.attempt, a.ended_at))))"""

# The conditions of a `Selection`, on `stripe_events e`. The clock is read in a subquery, because a volatile function by
# itself cannot be an index condition.
SELECTED = f"""
      (CAST(:event_ids AS text[]) IS NULL OR e.event_id = ANY(CAST(:event_ids AS text[])))
  AND (CAST(:statuses AS text[]) IS NULL OR e.status = ANY(CAST(:statuses AS text[])))
  AND (CAST(:types AS text[]) IS NULL OR e.type LIKE ANY(CAST(:types AS text[])))
  AND (CAST(:account AS text) IS NULL OR e.account = CAST(:account AS text))
  AND (CAST(:endpoint AS text) IS NULL OR coalesce(e.endpoint, '') = CAST(:endpoint AS text))
  AND (CAST(:older AS float8) IS NULL
       OR e.received_at <= (SELECT clock_timestamp()) - make_interval(secs => CAST(:older AS float8)))
  AND (CAST(:newer AS float8) IS NULL
       OR e.received_at > (SELECT clock_timestamp()) - make_interval(secs => CAST(:newer AS float8)))
  AND (CAST(:since AS timestamptz) IS NULL OR e.received_at >= CAST(:since AS timestamptz))
  AND (CAST(:until AS timestamptz) IS NULL OR e.received_at < CAST(:until AS timestamptz))
  AND (CAST(:follow_ups AS bool) IS NULL OR (e.parent_id IS NOT NULL) = CAST(:follow_ups AS bool))
  AND {IN_GROUP}
"""


@dataclass(frozen=True, slots=True)
class Selection:
    """Selects events: every given condition must hold.

    `type` is a type, `prefix.*`, `*`, that of follow-ups (`task:name`, `task:*`), or several of them with commas
    between; ages count from `received_at`, which lies in `since` <= `received_at` < `until`. `group`: the id of a group
    of failures. An event is in that of its last failure, until it is completed. `endpoint`: the name of the endpoint
    that first received it; "" is the one without. `follow_ups`: whether to select follow-ups, or Stripe's events; None:
    both.
    """

    event_ids: Sequence[str] | None = None
    statuses: Sequence[Status] | None = None
    type: str | None = None
    account: str | None = None
    older_than_seconds: float | None = None
    newer_than_seconds: float | None = None
    group: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    endpoint: str | None = None
    follow_ups: bool | None = None

    @property
    def is_empty(self) -> bool:
        """Whether it selects all events."""
        return self == Selection()

    def __str__(self) -> str:
        """As options of the command line, for the audit."""
        return " ".join((*(self.event_ids or ()), *([self.filters] if self.filters else ()))) or "all"

    @property
    def filters(self) -> str:
        """The same without ids. Empty if there is no other condition."""
        given = {
            "status": None if self.statuses is None else ",".join(self.statuses),
            "type": self.type,
            "account": self.account,
            "endpoint": "-" if self.endpoint == "" else self.endpoint,
            "older-than": None if self.older_than_seconds is None else f"{self.older_than_seconds:.0f}s",
            "newer-than": None if self.newer_than_seconds is None else f"{self.newer_than_seconds:.0f}s",
            "group": self.group,
            "since": None if self.since is None else self.since.isoformat(),
            "until": None if self.until is None else self.until.isoformat(),
            "kind": None if self.follow_ups is None else "follow-ups" if self.follow_ups else "events",
        }
        return " ".join(f"{name}={value}" for name, value in given.items() if value is not None)

    def parameters(self) -> dict[str, Any]:
        """The parameters of a statement with `SELECTED`."""
        return {
            "event_ids": self.event_ids,
            "statuses": self.statuses,
            "types": None if self.type is None else [like(each.strip()) for each in self.type.split(",")],
            "account": self.account,
            "endpoint": self.endpoint,
            "older": self.older_than_seconds,
            "newer": self.newer_than_seconds,
            "group": self.group,
            "since": self.since,
            "until": self.until,
            "follow_ups": self.follow_ups,
        }


def like(pattern: str) -> str:
    """One type, `prefix.*`, `task:*`, `handler:*` or `*`, as a pattern of LIKE."""
    escaped = pattern.replace("\\", "\\\\").replace("_", "\\_").replace("%", "\\%")
    return escaped[:-1] + "%" if escaped == "*" or escaped.endswith((".*", ":*")) else escaped
