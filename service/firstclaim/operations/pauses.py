"""Pausing the dispatch of types of events, and resuming it.

Guarantees: a pause loses nothing and charges nobody. An event that has waited has its whole time to give up again once
it is resumed, or it would be dead after its first failure. That time is written while the events are still paused, in
small batches that skip locked rows; the pause ends after that. An interrupted `resume` leaves the pause, and is
repeated.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from firstclaim.operations.commands import BATCH, Commands, OperatorAction
from firstclaim.operations.selection import like
from firstclaim.postgres.statement import statement
from firstclaim.registry import covers

_PAUSED = statement("SELECT pattern, operator, paused_at FROM firstclaim.operator_pauses ORDER BY paused_at, pattern")
_PENDING_TYPES = statement("""
SELECT type, count(*) AS events FROM firstclaim.stripe_events
 WHERE event_id = ANY(CAST(:event_ids AS text[])) AND status || '' = 'pending' GROUP BY type
""")
_PAUSE = statement("""
INSERT INTO firstclaim.operator_pauses (pattern, operator, paused_at) VALUES (:pattern, :operator, clock_timestamp())
ON CONFLICT (pattern) DO NOTHING RETURNING pattern
""")
_UNTIL = statement("SELECT clock_timestamp() + make_interval(secs => :give_up_in) AS until")
_PROLONG = statement("""
WITH waiting AS MATERIALIZED (
    SELECT event_id FROM firstclaim.stripe_events
     WHERE status IN ('pending', 'failed') AND give_up_at < :until AND type LIKE ANY(CAST(:types AS text[]))
     ORDER BY give_up_at LIMIT :limit
       FOR UPDATE SKIP LOCKED
)
UPDATE firstclaim.stripe_events e SET give_up_at = :until FROM waiting WHERE e.event_id = waiting.event_id
RETURNING e.event_id
""")
_RESUME = statement("DELETE FROM firstclaim.operator_pauses WHERE pattern = :pattern RETURNING pattern")


@dataclass(frozen=True, slots=True)
class Pause:
    """Types whose dispatch is paused: a type, `prefix.*` or `*`; who paused it (`user@host`), and when."""

    pattern: str
    operator: str
    paused_at: datetime


async def paused(operations: Commands) -> list[Pause]:
    """What is paused, the oldest pause first."""
    return [Pause(**row) for row in await operations.fetch(_PAUSED)]


@dataclass(frozen=True, slots=True)
class Paused:
    """So many events of those that were asked for are of paused types, by these pauses, the oldest first."""

    events: int
    pauses: list[Pause]


async def paused_among(operations: Commands, events: Mapping[str, int]) -> Paused:
    """What is paused of so many events of each type."""
    pauses = await paused(operations)
    number = sum(
        count for event_type, count in events.items() if any(covers(each.pattern, event_type) for each in pauses)
    )
    return Paused(number, [each for each in pauses if any(covers(each.pattern, event_type) for event_type in events)])


async def paused_pending(operations: Commands, event_ids: Sequence[str]) -> Paused:
    """What is paused of those of these events that are pending."""
    rows = await operations.fetch(_PENDING_TYPES, event_ids=event_ids)
    return await paused_among(operations, {row["type"]: row["events"] for row in rows})


@dataclass(frozen=True, slots=True)
class Overlapping:
    """The pauses that hold types of a pattern, the oldest first."""

    of_all: list[Pause]
    """They hold all of its types."""
    of_some: list[Pause]
    """They are narrower."""


async def overlapping(operations: Commands, pattern: str) -> Overlapping:
    """The pauses that hold types of this pattern."""
    pauses = await paused(operations)
    of_all = [each for each in pauses if covers(each.pattern, pattern)]
    return Overlapping(of_all, [each for each in pauses if covers(pattern, each.pattern) and each not in of_all])


async def pause(operations: Commands, operator: str, pattern: str) -> bool:
    """Pause the types of `pattern`: a type, `prefix.*` or `*`. False: exactly this pattern was paused already."""
    action = OperatorAction(operator, "pause", pattern)
    async with operations.audited(action):
        action.changed = len(await operations.fetch(_PAUSE, pattern=pattern, operator=operator))
    return bool(action.changed)


async def resume(operations: Commands, operator: str, pattern: str, *, give_up_seconds: float) -> int | None:
    """End the pause of exactly this pattern. Returns how many events waited; None: it was not paused."""
    if pattern not in {each.pattern for each in await paused(operations)}:
        return None
    action = OperatorAction(operator, "resume", pattern)
    async with operations.audited(action):
        [row] = await operations.fetch(_UNTIL, give_up_in=give_up_seconds)
        types = [like(pattern)]
        while rows := await operations.fetch(_PROLONG, until=row["until"], types=types, limit=BATCH):
            action.changed += len(rows)
        await operations.fetch(_RESUME, pattern=pattern)
    return action.changed
