"""How events came in lately, and how the handlers fare: what the overview reads from the ledger.

Guarantees: it holds for all workers and replicas, because it is read from their ledger. A query reads the events that
were received in a range, by an index, and at most `EVENTS_MOST` of them for the handlers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from firstclaim.operations.queries import REQUESTED, Queries
from firstclaim.postgres.statement import statement
from firstclaim.status import Status

EVENTS_MOST: Final = 50_000  # of the newest: about 0.2 s
_BARS_MOST: Final = 62
# The lengths of a bar: divisors of a day, so that bars begin at round times; then days and weeks.
_STEPS_SECONDS: Final = (60, 300, 900, 1800, 3600, 7200, 10_800, 21_600, 43_200, 86_400, 7 * 86_400)

_NOW = statement("SELECT clock_timestamp() AS now")
# The start is a value: for an expression, the planner assumes that a third of all rows is later. Bars begin at whole
# steps since an origin, a Monday, whatever the range.
_COUNTS = statement("""
SELECT date_bin(make_interval(secs => :step), received_at, timestamptz '2001-01-01 00:00Z') AS began_at, status,
       count(*) AS events
  FROM firstclaim.stripe_events
 WHERE received_at >= :since AND received_at < :until AND parent_id IS NULL
 GROUP BY 1, 2
""")
_RECENT = """
(SELECT * FROM firstclaim.stripe_events WHERE received_at >= :since AND received_at < :until
  ORDER BY received_at DESC, event_id DESC LIMIT :limit)
"""
_TYPES = statement(f"SELECT DISTINCT type, livemode FROM {_RECENT} e")
# A retry that the handler asked for is no failure: by the event's last attempt, which its primary key finds (the LIMIT
# keeps it one descent for each failed event).
# What a handler took: from the last claim to the completion mark, so it includes the wait for a slot.
_HANDLERS = statement(f"""
SELECT nullif(m.handler, '') AS handler, count(*) AS events, min(e.received_at) AS oldest_at,
       count(*) FILTER (WHERE e.status = 'completed') AS completed,
       count(*) FILTER (WHERE e.status = 'failed' AND last.requested IS NULL) AS failed,
       count(*) FILTER (WHERE e.status = 'dead') AS dead,
       count(*) FILTER (WHERE last.requested) AS retries,
       percentile_cont(ARRAY[0.5, 0.95, 0.99]) WITHIN GROUP
           (ORDER BY CAST(extract(epoch FROM e.settled_at - e.claimed_at) AS float8))
           FILTER (WHERE e.status = 'completed' AND e.settled_at >= e.claimed_at) AS seconds,
       (array_agg(e.last_error ORDER BY e.received_at DESC)
           FILTER (WHERE e.status IN ('failed', 'dead') AND last.requested IS NULL AND e.last_error IS NOT NULL))[1]
           AS last_error
  FROM {_RECENT} e
  LEFT JOIN LATERAL (
       SELECT true AS requested FROM firstclaim.stripe_event_attempts a
        WHERE e.status = 'failed' AND a.event_id = e.event_id AND a.attempt = e.attempt AND {REQUESTED}
        LIMIT 1) AS last ON true
  JOIN unnest(CAST(:types AS text[]), CAST(:livemodes AS bool[]), CAST(:handlers AS text[]))
       AS m (type, livemode, handler) ON m.type = e.type AND m.livemode = e.livemode
 GROUP BY 1
""")
HandlerOf = Callable[[str, bool], str | None]  # of a type and a mode: the handler's pattern, None if there is none


@dataclass(frozen=True, slots=True)
class TimeRange:
    """A range of instants. `until` is excluded."""

    since: datetime
    until: datetime

    @property
    def seconds(self) -> float:
        """Its length."""
        return (self.until - self.since).total_seconds()

    @property
    def step(self) -> timedelta:
        """The length of a bar: the shortest with which at most `_BARS_MOST` bars cover the range."""
        fits = (each for each in _STEPS_SECONDS if self.seconds / each <= _BARS_MOST - 2)
        return timedelta(seconds=next(fits, _STEPS_SECONDS[-1]))


@dataclass(frozen=True, slots=True)
class Counts:
    """Events by when they were received and by their current status, with the bars that have none."""

    step: timedelta
    bars: list[tuple[datetime, dict[Status, int]]]


@dataclass(slots=True)
class HandlerTraffic:
    """The events of one handler in a range, and what is due of it now, unless paused. `handler` None: without one.

    `failed` are those whose last attempt failed, and `retries` those whose last attempt asked for a retry.
    """

    handler: str | None
    events: int = 0
    completed: int = 0
    failed: int = 0
    dead: int = 0
    seconds: tuple[float, float, float] | None = None  # p50, p95, p99
    last_error: str | None = None
    oldest_due_seconds: float | None = None
    retries: int = 0

    @property
    def unsuccessful(self) -> int:
        """The events whose last attempt failed. A retry that was asked for is none."""
        return self.failed + self.dead

    @property
    def success(self) -> float | None:
        """The share of the events that are completed, of those that are completed, failed or dead."""
        ended = self.completed + self.unsuccessful
        return self.completed / ended if ended else None


@dataclass(frozen=True, slots=True)
class Traffic:
    """The handlers' traffic. `seconds` is how far back it was read: less than the range if there were too many."""

    handlers: list[HandlerTraffic]
    seconds: float
    all_read: bool


class TrafficQueries(Queries):
    """Queries of the overview on one connection."""

    async def last(self, seconds: float) -> TimeRange:
        """The range that ends now, by the database's clock."""
        [clock] = await self.fetch(_NOW)
        return TimeRange(clock["now"] - timedelta(seconds=seconds), clock["now"])

    async def counts(self, within: TimeRange) -> Counts:
        """Events by bar. The first and the last bar may begin before, and end after, the range; both are whole."""
        step = within.step
        origin = datetime(2001, 1, 1, tzinfo=UTC)
        first = origin + (within.since - origin) // step * step
        bars: dict[datetime, dict[Status, int]] = {}
        at = first
        while at < within.until:
            bars[at] = {}
            at += step
        rows = await self.fetch(_COUNTS, since=first, until=at, step=step.total_seconds())
        for row in rows:
            bars[row["began_at"]][Status(row["status"])] = row["events"]
        return Counts(step, list(bars.items()))

    async def traffic(
        self, within: TimeRange, handler_of: HandlerOf, is_paused: Callable[[str], bool] = lambda event_type: False
    ) -> Traffic:
        """The events of each handler in the range, and what is due, without paused types, as in the metric."""
        given = {"since": within.since, "until": within.until, "limit": EVENTS_MOST}
        known = {
            (row["type"], row["livemode"]): handler_of(row["type"], row["livemode"]) or ""
            for row in await self.fetch(_TYPES, **given)
        }
        rows = await self.fetch(
            _HANDLERS,
            **given,
            types=[kind for kind, _ in known],
            livemodes=[livemode for _, livemode in known],
            handlers=list(known.values()),
        )
        found: dict[str | None, HandlerTraffic] = {}
        for row in rows:
            names = ("handler", "events", "completed", "failed", "dead", "retries", "last_error")
            values = {name: row[name] for name in names}
            seconds = None if row["seconds"] is None else tuple(row["seconds"])
            found[row["handler"]] = HandlerTraffic(**values, seconds=seconds)
        for queue, due_seconds in (await self.oldest_due()).items():
            if is_paused(queue[0]):
                continue
            handler = handler_of(*queue)
            entry = found.setdefault(handler, HandlerTraffic(handler))
            entry.oldest_due_seconds = max(entry.oldest_due_seconds or 0.0, due_seconds)
        all_read = sum(row["events"] for row in rows) < EVENTS_MOST
        oldest = within.since if all_read else min(row["oldest_at"] for row in rows)
        return Traffic(list(found.values()), (within.until - oldest).total_seconds(), all_read)
