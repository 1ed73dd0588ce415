"""Groups of failures, as the ledger's attempts have them: what fails, since when, and how much of it is left.

Guarantees: nothing here changes a row or waits for a lock. The groups are found by an index, one descent each, and only
the failures within the time that is asked for are counted. (On a large ledger the index is left to the operator, as
docs/how-to/large-ledger.md says; until then the attempts are read.)
"""

from dataclasses import asdict, dataclass
from datetime import datetime

from firstclaim.formatting import thousands
from firstclaim.postgres.statement import statement

# A walk over the index from group to group, then the newest failure of each, and its count. `left` are the events whose
# last failure is in the group: those that are tried again, and those that wait for an operator.
GROUPS = statement("""
WITH RECURSIVE known AS (
    (SELECT failure_group FROM firstclaim.stripe_event_attempts
      WHERE failure_group IS NOT NULL ORDER BY failure_group LIMIT 1)
    UNION ALL
    SELECT (SELECT a.failure_group FROM firstclaim.stripe_event_attempts a
             WHERE a.failure_group > known.failure_group ORDER BY a.failure_group LIMIT 1)
      FROM known WHERE known.failure_group IS NOT NULL
), since AS MATERIALIZED (
    SELECT coalesce(clock_timestamp() - make_interval(secs => CAST(:newer AS float8)), '-infinity') AS since
), seen AS MATERIALIZED (
    SELECT known.failure_group AS "group", newest.handler, newest.error_class, newest.place,
           (SELECT count(*) FROM firstclaim.stripe_event_attempts a
             WHERE a.failure_group = known.failure_group AND a.ended_at > since.since) AS failures,
           (SELECT ended_at FROM firstclaim.stripe_event_attempts a
             WHERE a.failure_group = known.failure_group ORDER BY ended_at LIMIT 1) AS first_seen_at,
           newest.ended_at AS last_seen_at, newest.event_id AS example_id
      FROM known CROSS JOIN since CROSS JOIN LATERAL (
           SELECT handler, error_class, place, ended_at, event_id FROM firstclaim.stripe_event_attempts a
            WHERE a.failure_group = known.failure_group ORDER BY ended_at DESC LIMIT 1) AS newest
     WHERE newest.ended_at > since.since
     ORDER BY newest.ended_at DESC LIMIT :limit
), remaining AS (
    SELECT a.failure_group, count(*) FILTER (WHERE e.status = 'failed') AS failed,
           count(*) FILTER (WHERE e.status = 'dead') AS dead
      FROM firstclaim.stripe_events e JOIN firstclaim.stripe_event_attempts a USING (event_id)
     WHERE e.status IN ('failed', 'dead') AND a.failure_group IS NOT NULL AND NOT EXISTS (
           SELECT FROM firstclaim.stripe_event_attempts later
            WHERE later.event_id = a.event_id AND (later.attempt, later.ended_at) > (a.attempt, a.ended_at))
     GROUP BY a.failure_group
)
SELECT seen.*, coalesce(remaining.failed, 0) AS events_failed, coalesce(remaining.dead, 0) AS events_dead
  FROM seen LEFT JOIN remaining ON remaining.failure_group = seen."group"
 ORDER BY seen.last_seen_at DESC
""")


# The events that no group has, of those that are failed or dead.
UNGROUPED = statement("""
SELECT count(*) FILTER (WHERE e.status = 'failed') AS failed, count(*) FILTER (WHERE e.status = 'dead') AS dead
  FROM firstclaim.stripe_events e
  LEFT JOIN LATERAL (
       SELECT failure_group FROM firstclaim.stripe_event_attempts a
        WHERE a.event_id = e.event_id ORDER BY attempt DESC, ended_at DESC LIMIT 1) AS last ON true
 WHERE e.status IN ('failed', 'dead') AND last.failure_group IS NULL
""")


@dataclass(frozen=True, slots=True)
class Ungrouped:
    """Events that are failed or dead and in no group of failures.

    The last attempt of each was recorded by an older build, or its handler has not raised: it asked for a retry, its
    process vanished, or the event could not be dispatched.
    """

    failed: int
    dead: int

    @property
    def words(self) -> str:
        """How many, and why. Empty if there are none."""
        counts = [f"{thousands(number)} {status}" for status, number in asdict(self).items() if number]
        if not counts:
            return ""
        events = "event is" if self.failed + self.dead == 1 else "events are"
        return (
            f"{' and '.join(counts)} {events} in no group: an older build recorded the last attempt, or no handler "
            "raised (a retry that was asked for, a process that vanished)."
        )


@dataclass(frozen=True, slots=True)
class FailureGroup:
    """Failures of one handler, of one class, from one line of the user's code.

    `failures` are attempts, within the time that was asked for. `events_failed` and `events_dead` are the events whose
    last failure is of this group, by their status now. `example_id` is the event that failed last.
    """

    group: str
    handler: str
    error_class: str
    place: str | None
    failures: int
    events_failed: int
    events_dead: int
    first_seen_at: datetime
    last_seen_at: datetime
    example_id: str
