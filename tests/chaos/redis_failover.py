"""`python -m tests.chaos.redis_failover --kills 5`: masters killed under load, in a Cluster and behind Sentinels.

Two services take deliveries with duplicates. A master is killed with `kill -9`, the group fails over by itself, and the
killed server comes back as a replica; then the next master is killed. At the end the checker over all invariants reads
both stores. It prints, for each kill, how long the group took, and how long after that an event was still deferred.
"""

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.acceptance.harness import DEFERRED, IGNORED, PROCESSED, Overrides, Sandbox, eventually
from tests.chaos.history import History
from tests.chaos.load import Load
from tests.chaos.redis_groups import Cluster, Group, Watched
from tests.chaos.servers import Servers, own_servers
from tests.chaos.verdict import verdict

NORMAL_SECONDS: Final = 5.0  # after the promotion, at most
DELIVERIES: Final = 300  # between two steps
_QUIET_SECONDS: Final = 1.5  # without a deferred event
SENDERS: Final = 6
# As shipped. The harness is more patient with Redis.
PATIENCE: Final[Overrides] = {"redis_timeout_seconds": 0.2, "redis_breaker_seconds": 1}


@dataclass(slots=True)
class Report:
    """What happened: seconds of each failover, and from there to the last event that was deferred."""

    acknowledged: int = 0
    answers: str = ""
    promoted_seconds: list[float] = field(default_factory=list)
    normal_seconds: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        shown = [
            f"killed: promoted after {promoted:.1f} s, the last event deferred {normal:.1f} s later"
            for promoted, normal in zip(self.promoted_seconds, self.normal_seconds, strict=True)
        ]
        return "\n".join([*shown, f"{self.acknowledged} acknowledged events, none lost or doubled; {self.answers}"])


async def masters_killed(
    history: History,
    group: Group,
    *,
    kills: int,
    rejoin: bool = True,
    before: Callable[[Load], Awaitable[object]] | None = None,
) -> Report:
    """Kill a master `kills` times under load, after `before`, and check every invariant. Raises AssertionError."""
    history.sandbox.redis_url = group.url
    services = [history.service(PATIENCE) for _ in range(2)]
    await asyncio.gather(*(service.start() for service in services))
    report = Report()
    load = Load(history, services, senders=SENDERS, copies=2)
    async with load.running():
        await load.more(DELIVERIES)
        if before is not None:
            await before(load)
        for number in range(kills):
            masters = await group.masters()
            killed = masters[number % len(masters)]
            began = time.monotonic_ns()
            await killed.kill()
            await group.has_failed_over(killed)
            promoted = time.monotonic_ns()
            report.promoted_seconds.append((promoted - began) / 1e9)
            await eventually(lambda: _deferred_at(history), _is_past, 30)
            report.normal_seconds.append(max(0.0, (await _deferred_at(history) - promoted) / 1e9))
            await load.more(DELIVERIES)
            if rejoin:
                await group.rejoined(killed)
                await load.more(DELIVERIES)
    report.answers = load.counts
    assert set(load.results) <= {PROCESSED, IGNORED, DEFERRED}, load.counts
    assert load.results[DEFERRED], "no master was missed"
    evidence = await verdict(history)
    report.acknowledged = len({each.event_id for each in history.deliveries})
    assert evidence.rows.keys() == {each.event_id for each in history.deliveries}
    return report


async def _deferred_at(history: History) -> int:
    """When an event was last deferred, by the monotonic clock, in nanoseconds."""
    return max((each.answered_at for each in history.deliveries if each.result == DEFERRED), default=0)


def _is_past(deferred_at: int) -> bool:
    """Whether that is over: each second has deliveries of all masters."""
    return time.monotonic_ns() - deferred_at > _QUIET_SECONDS * 1e9


async def _run(form: Callable[[Servers], Awaitable[Group]], kills: int) -> Report:
    async with own_servers() as servers:
        with tempfile.TemporaryDirectory() as folder:
            postgres = await servers.postgres()
            group = await form(servers)
            history = History(Sandbox(postgres.url, group.url, "failover:", Path(folder)))
            try:
                return await masters_killed(history, group, kills=kills)
            finally:
                await history.sandbox.end_services()


def main(given: list[str]) -> int:
    """Run both, and print the reports. Exit code 1 if an invariant is violated, or Redis is missed for too long."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.redis_failover", description=__doc__)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--kind", choices=["cluster", "sentinel"], action="append")
    chosen = parser.parse_args(given)
    forms: dict[str, Callable[[Servers], Awaitable[Group]]] = {"cluster": Cluster.form, "sentinel": Watched.form}
    slow = False
    for kind in chosen.kind or forms:
        print(f"\n{kind}")
        try:
            report = asyncio.run(_run(forms[kind], chosen.kills))
        except AssertionError as error:
            print(error)
            return 1
        print(report)
        slow = slow or max(report.normal_seconds) > NORMAL_SECONDS
    return int(slow)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        sys.exit(main(sys.argv[1:]))
