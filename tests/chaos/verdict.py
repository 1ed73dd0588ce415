"""The end of every chaos test: collect the evidence, check it, and print the history of each event that failed.

history = History(sandbox)
service = await history.service(SHORT_LEASE).start()
...                                            # deliver through the history, inject faults, remove them
await verdict(history)
"""

import contextlib
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Final

import asyncpg
import redis

from firstclaim.postgres.connection import PinnedConnection
from firstclaim.postgres.epoch import read_epoch
from firstclaim.status import Status
from tests.acceptance.harness import SETTLE_SECONDS, Row, eventually
from tests.chaos import trace
from tests.chaos.checker import Effect, Evidence, Violation, check
from tests.chaos.history import History
from tests.stores import redis_client

_LISTED_MOST: Final = 50
_STORIES_MOST: Final = 10  # a broken rule tends to break many events in the same way

_UNSETTLED: Final = "SELECT count(*) FROM firstclaim.stripe_events WHERE status IN ('pending', 'processing', 'failed')"
_ROWS: Final = """
SELECT event_id, status, attempt, failures, abandoned, action, last_error,
       extract(epoch FROM due_at - clock_timestamp())::float8 AS due_in_seconds,
       coalesce(settled_at >= give_up_at, false) AS given_up
  FROM firstclaim.stripe_events
"""


async def verdict(
    history: History, *, waived: Collection[str] = (), seconds: float = SETTLE_SECONDS, settling: bool = True
) -> Evidence:
    """Wait until every row has settled (after `seconds`, I4 fails), and assert every invariant.

    `settling=False` is for a run that ends while its faults last: I4 is not checked.
    """
    if settling:
        await settle(history, seconds)
    evidence = await collect(history, waived=waived)
    found = [each for each in check(evidence) if settling or each.invariant != "I4"]
    assert not found, report(history, evidence, found)
    return evidence


async def settle(history: History, seconds: float) -> None:
    """Wait until every row has settled, but at most `seconds`: I4 reports those that have not."""
    connection = await asyncpg.connect(history.sandbox.database_url, timeout=SETTLE_SECONDS)
    try:
        with contextlib.suppress(AssertionError):
            await eventually(lambda: connection.fetchval(_UNSETTLED), lambda left: left == 0, seconds)
    finally:
        await connection.close()


async def collect(history: History, *, waived: Collection[str] = ()) -> Evidence:
    """Read both stores and the trace; both stores must be reachable.

    The markers are read first: a row never disappears, so one that is missing afterwards was missing then.
    """
    sandbox = history.sandbox
    markers = _markers(sandbox.redis_url, sandbox.redis_prefix)
    connection = await asyncpg.connect(sandbox.database_url, timeout=SETTLE_SECONDS, connection_class=PinnedConnection)
    try:
        async with connection.transaction(isolation="repeatable_read"):  # one snapshot of rows and effects
            rows = [dict(row) for row in await connection.fetch(_ROWS)]
            effects = await connection.fetch("SELECT event_id, attempt FROM effects")
        epoch = await read_epoch(connection)
    finally:
        await connection.close()
    since = history.lost
    given_up = {row["event_id"] for row in rows if row.pop("given_up")}
    return Evidence(
        deliveries=[each for each in history.deliveries if each.answered_at > since.get(each.event_id, 0)],
        rows={row.pop("event_id"): Row(**{**row, "status": Status(row["status"])}) for row in rows},
        effects=[Effect(*effect) for effect in effects],
        lines=[line for line in trace.read(history.trace) if line.at > since.get(line.event_id, 0)],
        markers=markers,
        epoch=epoch,
        given_up=given_up,
        waived={*waived, *sandbox.waived},
        abandoned_most=history.abandoned_most,
    )


def report(history: History, evidence: Evidence, found: list[Violation]) -> str:
    """The violations, and the history of each event that they name."""
    counted = Counter(each.invariant for each in found)
    named = list(dict.fromkeys(each.event_id for each in found))
    stories = ["\n".join([event_id, *story(history, evidence, event_id)]) for event_id in named[:_STORIES_MOST]]
    summary = ", ".join(f"{times} of {invariant}" for invariant, times in counted.items())
    violations = "\n".join(map(str, found[:_LISTED_MOST]))
    return "\n\n".join([f"{len(found)} violations ({summary}); the first of them:\n{violations}", *stories])


def story(history: History, evidence: Evidence, event_id: str) -> list[str]:
    """The history of an event, in the order of the monotonic clock, in milliseconds since the first delivery."""
    began = min((each.sent_at for each in history.deliveries), default=0)
    happenings = sorted(_happenings(history, event_id))
    return [
        *(f"  {(at - began) / 1e6:10.1f} ms  {what}" for at, what in happenings),
        f"  at the end: {evidence.rows.get(event_id, 'no row')}",
        f"  effects of attempts {[each.attempt for each in evidence.effects if each.event_id == event_id]}",
        f"  in Redis: {evidence.markers.get(event_id)} (epoch {evidence.epoch})",
    ]


def _happenings(history: History, event_id: str) -> Iterator[tuple[int, str]]:
    for each in history.deliveries:
        if each.event_id == event_id:
            yield each.sent_at, f"sent to {each.service}"
            seen = f"{each.seen.status} {each.seen.counts}" if isinstance(each.seen, Row) else each.seen.value
            yield each.answered_at, f"{each.service} answered {each.result or 'nothing'}; the ledger's row: {seen}"
    for line in trace.read(history.trace):
        if line.event_id == event_id:
            took = f" (took {(line.at - line.began) / 1e6:.1f} ms)" if line.at > line.began else ""
            yield line.at, f"process {line.pid}: {line.what} of attempt {line.attempt}{took}"
    if event_id in history.lost:
        yield history.lost[event_id], "the ledger was restored to a moment before it"


def _markers(url: str, prefix: str) -> dict[str, str]:
    with redis_client(url, SETTLE_SECONDS) as client:
        keys = list(client.scan_iter(f"{prefix}*", count=1000))
        mget = client.mget_nonatomic if isinstance(client, redis.RedisCluster) else client.mget
        values = mget(keys) if keys else []
    return {
        key.decode().removeprefix(prefix): value.decode(errors="replace")
        for key, value in zip(keys, values, strict=True)
        if value is not None
    }
