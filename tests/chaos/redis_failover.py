"""Masters of Redis killed under load, in a Cluster or behind Sentinels.

Two services take deliveries with duplicates. A master is killed with `kill -9`, the group fails over by itself, and the
killed server comes back as a replica; then the next master is killed. At the end the checker over all invariants reads
both stores.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from tests.acceptance.harness import DEFERRED, IGNORED, PROCESSED, Overrides, eventually
from tests.chaos.failovers import FAILOVERS, NORMAL_SECONDS, Failover, Failovers, now
from tests.chaos.history import History
from tests.chaos.load import Load
from tests.chaos.redis_groups import Group

DELIVERIES: Final = 300  # between two steps
_QUIET_SECONDS: Final = 1.5  # without a deferred event
SENDERS: Final = 6
# As shipped. The harness is more patient with Redis.
PATIENCE: Final[Overrides] = {"redis_timeout_seconds": 0.2, "redis_breaker_seconds": 1}


async def masters_killed(
    failovers: Failovers,
    kind: str,
    group: Group,
    *,
    rejoin: bool = True,
    before: Callable[[Load], Awaitable[object]] | None = None,
) -> None:
    """Kill masters under load, after `before`, and check every invariant. Raises AssertionError."""
    history = failovers.history
    history.sandbox.redis_url = group.url
    services = [history.service(PATIENCE) for _ in range(2)]
    await asyncio.gather(*(service.start() for service in services))
    load = Load(history, services, senders=SENDERS, copies=2)
    async with load.running():
        await load.more(DELIVERIES)
        if before is not None:
            await before(load)
        for left in reversed(range(FAILOVERS)):
            masters = await group.masters()
            killed = masters[left % len(masters)]
            began = now()
            await killed.kill()
            await group.has_failed_over(killed)
            promoted = now()
            await eventually(lambda: _deferred_at(history), _is_past, 30)
            deferred_at = max(began, await _deferred_at(history))  # `began`: the Sentinels had chosen another by then
            failovers.done.append(
                Failover(
                    kind,
                    began,
                    interrupted_seconds=deferred_at - began,
                    back_seconds=max(0.0, deferred_at - promoted),
                    back_most_seconds=NORMAL_SECONDS,
                )
            )
            await load.more(DELIVERIES)
            if left or rejoin:
                await group.rejoined(killed)
                await load.more(DELIVERIES)
    assert set(load.results) == {PROCESSED, IGNORED, DEFERRED}, load.counts  # no 503
    evidence = await failovers.verdict()
    assert evidence.rows.keys() == {each.event_id for each in history.deliveries}


async def _deferred_at(history: History) -> float:
    """When an event was last deferred, on the clock of the record."""
    return max((each.answered_at / 1e9 for each in history.deliveries if each.result == DEFERRED), default=0.0)


def _is_past(deferred_at: float) -> bool:
    """Whether that is over: each second has deliveries of all masters."""
    return now() - deferred_at > _QUIET_SECONDS
