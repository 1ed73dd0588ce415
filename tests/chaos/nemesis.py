"""The nemesis run: three services of two builds under load and all kinds of faults, then recovery, then the checker.

Guarantees: every kind of fault happens at least once, however short the run is. Nothing is checked before all faults
have ended and every row has had its time to settle. A run that could not read the ledger, or observed too little,
fails. "Nothing lost" means: every event that was sent is completed with one effect, or `ignored` or `dead` as designed.
Each build has a handler that the other has not: an event that it acknowledged is never `ignored`. Of an event with
several handlers, each handler and each task is completed, once; events of one key were handled one after the other.
"""

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Final

import httpx

from firstclaim.status import Status
from tests.acceptance.harness import Overrides, Row, Sandbox, Service, eventually
from tests.chaos import follow_up_build, keyed_handlers
from tests.chaos.checker import Evidence, Violation, check
from tests.chaos.faults import LANES
from tests.chaos.history import TRACED_HANDLERS, History
from tests.chaos.load import looking
from tests.chaos.plan import faults, orders
from tests.chaos.sender import AnswerResult, Sender
from tests.chaos.servers import own_servers
from tests.chaos.testbed import Testbed
from tests.chaos.trace import BATCH_START, END, OUTSIDE, START, Line
from tests.chaos.verdict import collect, report, settle
from tests.proxy import before_postgres, before_redis

# Retries and recovery follow soon, and the order of the defaults holds: lease < handler deadline < idle in transaction.
SETTINGS: Final[Overrides] = {
    "lock_ttl_seconds": 2,
    "lease_seconds": 1.5,
    "handler_deadline_seconds": 3,
    "idle_in_transaction_seconds": 4,
    "answer_budget_seconds": 3,
    "postgres_timeout_seconds": 1.5,
    "redis_timeout_seconds": 0.3,
    "redis_breaker_seconds": 0.3,
    "recovery_interval_seconds": 0.2,
    "handler_slots": 5,
    "ingest_connections": 3,
    "shutdown_seconds": 6,
}
_BOTH_BUILDS: Final = f"{TRACED_HANDLERS},{keyed_handlers.__name__},{follow_up_build.__name__}"
# Of each service: its workers, and the module that only its build has.
_SERVICES: Final = ((1, "tests.chaos.old_build"), (1, "tests.chaos.new_build"), (2, "tests.chaos.old_build"))
_SETTLE_SECONDS: Final = 180.0
_KEEP_SECONDS: Final = 0.5

Say = Callable[[str], None]


@dataclass(slots=True)
class Result:
    """The result of a run."""

    seed: int
    history: History
    sender: Sender
    evidence: Evidence
    faults: Counter[str]
    violations: list[Violation]

    @property
    def compared(self) -> int:
        """The number of promises that were compared with the ledger as soon as they were made."""
        return sum(isinstance(each.seen, Row) for each in self.history.deliveries if each.promised)

    @property
    def promised(self) -> int:
        """The number of deliveries that were answered with a 2xx."""
        return sum(each.promised for each in self.history.deliveries)

    @property
    def acknowledged(self) -> set[str]:
        """The ids of the events that a build with a handler for them has acknowledged."""
        return {each.event_id for each in self.history.deliveries if each.promised and each.wanted}

    def tables(self) -> Iterator[tuple[str, dict[str, int]]]:
        """The counts, each table with its title."""
        rows = self.evidence.rows
        outcomes = Counter(
            f"{rows[order.event.id].status if order.event.id in rows else 'lost'}: {order.behaviour}, {order.type}"
            for order in self.sender.sent
        )
        yield "events by outcome", _sorted(outcomes)
        yield "answers", _sorted(Counter({_words(said): times for said, times in self.sender.results.items()}))
        yield "faults", _sorted(self.faults)
        yield "counts", self._counts()

    def _counts(self) -> dict[str, int]:
        rows, lines = self.evidence.rows.values(), self.evidence.lines
        one_build = {order.event.id for order in self.sender.sent if order.one_build}
        ends = Counter(row.status for event_id, row in self.evidence.rows.items() if event_id in one_build)
        promises = Counter(
            each.wanted for each in self.history.deliveries if each.promised and each.event_id in one_build
        )
        return {
            "events sent": len(self.sender.sent),
            "deliveries": len(self.history.deliveries),
            "promises (2xx)": self.promised,
            "promises compared with the ledger at once": self.compared,
            "attempts started": sum(line.what in (START, BATCH_START) for line in lines),
            "attempts still running when a later one of the same event had started": _overtaken(lines),
            "events that took several attempts": sum(row.attempt > 1 for row in rows),
            "abandoned attempts": sum(row.abandoned for row in rows),
            "calls to other systems": sum(line.what == OUTSIDE for line in lines),
            "events completed": sum(row.status is Status.COMPLETED for row in rows),
            "effects committed": len(self.evidence.effects),
            "events of one build": len(one_build),
            "of these, acknowledged by that build": len(self.acknowledged & one_build),
            "of these, completed": ends[Status.COMPLETED],
            "of these, ignored": ends[Status.IGNORED],
            "promises (2xx) for them, by that build": promises[True],
            "promises (2xx) for them, by the other build": promises[False],
            "events dead": sum(row.status is Status.DEAD for row in rows),
            "faults": self.faults.total(),
            "violations": len(self.violations),
        }

    def story(self) -> str:
        """The violations, and the history of each event that they name."""
        return f"seed {self.seed}: " + report(self.history, self.evidence, self.violations)


async def run(seed: int, minutes: float, folder: Path, say: Say = print) -> Result:
    """One whole run. The services' logs and the trace go to `folder`."""
    async with AsyncExitStack() as stack:
        testbed = await _build(folder, stack)
        history = testbed.history
        sender = Sender(history, testbed.serving, orders(seed))
        nemesis = _Nemesis(seed, testbed, sender, say, ends_at=time.monotonic() + 60 * minutes)
        async with looking(history):
            await nemesis.run()
        history.sandbox.waived |= {order.event.id for order in sender.sent if order.type == follow_up_build.SEVERAL}
        evidence = await collect(history)
        rows = await history.sandbox.fetch("SELECT type, status FROM firstclaim.stripe_events")
        violations = [*check(evidence), *_lost(sender, evidence), *_overlaps(sender, evidence)]
        violations += _follow_ups(sender, Counter((row["type"], row["status"]) for row in rows))
        return Result(seed, history, sender, evidence, nemesis.done, violations)


async def _build(folder: Path, stack: AsyncExitStack) -> Testbed:
    """Servers, proxies, and services that are ready; `stack` ends them."""
    servers = await stack.enter_async_context(own_servers())
    postgres, redis, spare = await servers.postgres(), await servers.redis(), await servers.redis()
    history = History(Sandbox(postgres.url, redis.url, "nemesis:", folder))
    testbed = Testbed(history, postgres, redis, spare)
    for workers, build in _SERVICES:
        postgres_proxy, postgres_url = await stack.enter_async_context(before_postgres(postgres.url))
        redis_proxy, redis_url = await stack.enter_async_context(before_redis(redis.url))
        own: Overrides = {
            "handlers": f"{_BOTH_BUILDS},{build}",
            "DATABASE_URL": postgres_url,
            "REDIS_URL": redis_url,
        }
        service = history.service(SETTINGS | own, workers=workers)
        stack.push_async_callback(service.kill)
        testbed.postgres_proxies.append(postgres_proxy)
        testbed.redis_proxies.append(redis_proxy)
        testbed.services.append(service)
    await asyncio.gather(*(service.start() for service in testbed.services))
    testbed.serving += testbed.services
    return testbed


@dataclass(slots=True)
class _Nemesis:
    seed: int
    testbed: Testbed
    sender: Sender
    say: Say
    ends_at: float
    done: Counter[str] = field(default_factory=Counter)
    _locks: dict[str, asyncio.Lock] = field(default_factory=lambda: {lane: asyncio.Lock() for lane in LANES})
    _now: set[str] = field(default_factory=set)
    _began_at: float = field(default_factory=time.monotonic)

    async def run(self) -> None:
        """Faults and load side by side; then all faults end, every event is accepted, and every row settles."""
        faults_over = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            background = [
                tasks.create_task(self._report_progress()),
                *(tasks.create_task(self._keep(lane)) for lane in LANES),
            ]
            with self.testbed.history.postgres_unreachable():
                sending = tasks.create_task(self.sender.run(faults_over))
                async with asyncio.TaskGroup() as lanes:
                    for lane in LANES:
                        lanes.create_task(self._lane(lane))
                faults_over.set()
                await self._all_healthy()
                await sending
            await settle(self.testbed.history, _SETTLE_SECONDS)
            for task in background:
                task.cancel()

    async def _lane(self, lane: str) -> None:
        for index, fault in enumerate(faults(self.seed, lane, list(LANES[lane]))):
            await asyncio.sleep(fault.quiet_seconds)
            if time.monotonic() > self.ends_at and index >= len(LANES[lane]):
                return
            name = f"{lane}: {fault.kind}"
            async with self._locks[lane]:
                self._now.add(name)
                await LANES[lane][fault.kind](self.testbed, fault)
                self._now.discard(name)
            self.done[name] += 1

    async def _keep(self, lane: str) -> None:
        """Start a service again that an event has killed: events that kill their process come until the very end."""
        while lane.startswith("service"):
            async with self._locks[lane]:
                service = self.testbed.service(lane)
                if not await service.pids():
                    self.done["killed by an event"] += 1
                    await self.testbed.start(service)
            await asyncio.sleep(_KEEP_SECONDS)

    async def _all_healthy(self) -> None:
        for service in self.testbed.services:

            async def components(service: Service = service) -> set[str]:
                with suppress(httpx.TransportError):
                    return set((await service.components())[1].values())
                return set()

            await eventually(components, lambda components: components == {"ok"}, _SETTLE_SECONDS)

    async def _report_progress(self) -> None:
        while True:
            sender = self.sender
            accepted = sum(times for said, times in sender.results.items() if said is not None and said[0] < 300)
            self.say(
                f"{time.monotonic() - self._began_at:4.0f} s  {len(sender.sent)} events ({sender.in_flight} in "
                f"flight)  {sender.results.total()} deliveries, {accepted} accepted  {self.done.total()} faults; "
                f"now {', '.join(sorted(self._now)) or 'none'}"
            )
            await asyncio.sleep(2)


def _lost(sender: Sender, evidence: Evidence) -> Iterator[Violation]:
    """Events with another outcome than designed. Any of them may be dead with its budget spent (I4 checks that)."""
    for order in sender.sent:
        row = evidence.rows.get(order.event.id)
        if row is None:
            yield Violation("LOST", order.event.id, f"there is no row of {order}")
        elif row.status is Status.IGNORED and order.one_build:
            continue  # the checker's I8: the build with its handler did not acknowledge it
        elif row.status is not order.expected and not (row.status is Status.DEAD and row.abandoned):
            yield Violation("LOST", order.event.id, f"{row.status} is the outcome of {order}")
    for order, answer in sender.unexplained:
        yield Violation("ANSWER", order.event.id, f"no fault explains {answer}")


def _follow_ups(sender: Sender, rows: Counter[tuple[str, str]]) -> Iterator[Violation]:
    """Rows of handlers and tasks that are missing. One that is dead, its budget spent (I4), has enqueued none."""
    events = sum(order.type == follow_up_build.SEVERAL for order in sender.sent)
    dead = sum(number for (row_type, status), number in rows.items() if status == Status.DEAD and ":" in row_type)
    for row_type, each in follow_up_build.ROWS.items():
        there = sum(number for (its_type, _), number in rows.items() if its_type == row_type)
        if not there <= events * each <= there + dead * sum(follow_up_build.ROWS.values()):
            yield Violation("FOLLOW-UP", row_type, f"{there} rows instead of {each} for each of {events} events")


def _overlaps(sender: Sender, evidence: Evidence) -> Iterator[Violation]:
    """Committed attempts at two events of one key that ran at the same time: both had the key's lock until COMMIT."""
    keys = {order.event.id: order.behaviour for order in sender.sent if order.type == keyed_handlers.KEYED}
    committed = {tuple(effect) for effect in evidence.effects if effect.event_id in keys}
    began = {(line.event_id, line.attempt): line.at for line in evidence.lines if line.what == START}
    runs: defaultdict[str, list[tuple[int, int, str]]] = defaultdict(list)
    for line in evidence.lines:
        if line.what == END and (run := (line.event_id, line.attempt)) in committed:
            runs[keys[line.event_id]].append((began[run], line.at, line.event_id))
    for one_key in runs.values():
        for (_, ended, first), (begun, _, second) in pairwise(sorted(one_key)):
            if begun < ended:
                yield Violation("KEY", second, f"it began while {first} of the same key ran")


def _overtaken(lines: Sequence[Line]) -> int:
    """Attempts that lost their row to a later one while their handler still ran: they must not commit."""
    started = {(line.event_id, line.attempt): line.at for line in lines if line.what in (START, BATCH_START)}
    ended = ((line.event_id, line.attempt, line.at) for line in lines if line.what == END)
    return sum(started.get((event_id, attempt + 1), at) < at for event_id, attempt, at in ended)


def _words(said: AnswerResult | None) -> str:
    if said is None:
        return "none: the connection ended"
    status, processed, action = said
    return f"{status} {'processed' if processed else 'not processed'}: {action}"


def _sorted(counted: Counter[str]) -> dict[str, int]:
    return dict(sorted(counted.items()))
