"""The system under the state machine: one database with a stopped clock, one Redis prefix, two processes.

Guarantees: between two steps nothing happens. Each call has been answered, or waits for a handler that is held or in
a process that is frozen, and the server has detected every lost connection. So one look at both stores sees one
moment, and a run that failed can be repeated.
"""

import asyncio
import contextlib
import secrets
from collections import Counter
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from redis.asyncio import Redis

from firstclaim.errors import LedgerUnavailable
from firstclaim.outcome import Outcome
from firstclaim.status import Status
from tests import operator
from tests.clock import Clock, installed
from tests.integration.world import World, build, delivery, until
from tests.stateful import oracle
from tests.stateful.oracle import Key, Limits, Plan, Row, Seen, Story
from tests.stateful.process import BATCH_TYPE, NEW_TYPE, TYPE, Process, Run, State
from tests.stores import Stores, clone, drop

# Each process is a build of its own: both handle TYPE and, in batches, BATCH_TYPE, the first also NEW_TYPE, and none
# handles other types.
BUILDS: Final = ((TYPE, BATCH_TYPE, NEW_TYPE), (TYPE, BATCH_TYPE))
PROCESSES: Final = len(BUILDS)
_OWN_SESSIONS: Final = 3  # the clock's, and the operator's two

_LOOK = """
SELECT coalesce(e.event_id, f.event_id) AS event_id, e.status, e.attempt, e.failures, e.abandoned,
       coalesce(e.settled_at >= e.give_up_at, false) AS given_up, coalesce(f.attempts, '{}') AS attempts
  FROM firstclaim.stripe_events e
  FULL JOIN (SELECT event_id, array_agg(attempt ORDER BY attempt) AS attempts FROM effects GROUP BY event_id) f
 USING (event_id)
"""
_SESSIONS = """
SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND backend_type = 'client backend'
"""
_FORGET = "DELETE FROM {} WHERE event_id = ANY($1)"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Answer:
    """The outcome of a delivery.

    `wanted`: its process has a handler for the event. `replayed`: an operator replayed the event while the delivery was
    in flight.
    """

    event_id: str
    outcome: Outcome
    wanted: bool
    replayed: bool


class System:
    """Use `prepared`. It observes the handlers, and only it and the service use the stores."""

    limits: Limits
    clock: Clock
    operator: World
    redis: Redis

    def __init__(self, runner: asyncio.Runner, stores: Stores) -> None:
        self._runner = runner
        self._stores = stores
        self._prefix = f"test:{secrets.token_hex(6)}:"
        self._stack = contextlib.AsyncExitStack()
        self._url = ""
        self._epoch: str | None = None
        self.processes: list[Process] = []
        self.stories: dict[str, Story] = {}
        self.answers: list[Answer] = []
        self.violations: list[str] = []
        self.plan = Plan.WORK
        self.guilty: frozenset[str] | None = None
        self.seen = Seen({}, {}, None)
        self.happened: Counter[str] = Counter()  # over all runs: the number of each fault and answer

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run on the one event loop; nothing runs on it between two calls."""
        return self._runner.run(work)

    # -- setting up -----------------------------------------------------------------------------------

    async def open(self) -> None:
        """Create the database, and start the processes."""
        self._url = await clone(self._stores)
        self._stack.push_async_callback(drop, self._url)
        self.clock = await self._stack.enter_async_context(installed(self._url, standing=True))
        self.operator = await build(self._url, self._stores.redis_url, self._prefix)
        self._stack.push_async_callback(self.operator.close)
        self._epoch = await self.operator.ledger.read_epoch()
        self.redis = Redis.from_url(self._stores.redis_url)
        self._stack.push_async_callback(self.redis.aclose)
        self.processes = [await self._spawn(number) for number in range(PROCESSES)]
        settings = self.processes[0].world.settings
        self.limits = Limits(settings.lock_ttl_seconds, settings.marker_ttl_seconds, settings.abandoned_most)

    async def close(self) -> None:
        """Close everything that `open` has opened."""
        for process in self.processes:
            process.die()  # a frozen one, left by a failed run, would never end
            await process.clean_up()
        await self._stack.aclose()

    async def begin(self) -> None:
        """Empty stores and running processes for another run. Processes that are in order are kept."""
        for number, process in enumerate(self.processes):
            if process.state is not State.AWAKE or process.runs or process.busy:
                process.die()
                await self.replace(number)
            for store in list(process.away):
                process.reach(store, again=True)
            process.switch.armed = None
        await self.forget(list(self.stories))
        await self.flush()
        self.stories.clear()
        self.answers.clear()
        self.violations.clear()
        self.plan = Plan.WORK
        self.seen = await self._look()

    async def replace(self, number: int) -> None:
        """Replace a process that is dead or was stopped."""
        await self.processes[number].clean_up()
        self.processes[number] = await self._spawn(number)

    async def _spawn(self, number: int) -> Process:
        return await Process.spawn(self, BUILDS[number], self._url, self._stores.redis_url, self._prefix)

    # -- what the processes do ------------------------------------------------------------------------

    def new_story(self, event_type: str = TYPE) -> str:
        """A new event of this type."""
        event_id = f"evt_{len(self.stories)}"
        wanted_by = frozenset(number for number, types in enumerate(BUILDS) if event_type in types)
        self.stories[event_id] = Story(delivery(event_id, event_type), wanted_by)
        return event_id

    async def deliver(self, process: Process, event_id: str) -> None:
        """One delivery. Its answer counts unless the process is dead by then."""
        story = self.stories[event_id]
        replays = story.replays
        outcome = await process.world.pipeline.deliver(story.delivery)
        if process.state is not State.DEAD:
            wanted = story.delivery.event.type in process.types
            self.answers.append(Answer(event_id, outcome, wanted, story.replays != replays))

    async def recover(self, process: Process) -> None:
        """One round of recovery, as the loop runs it."""
        with contextlib.suppress(LedgerUnavailable):
            process.world.claims._epoch.confirm(await process.world.ledger.read_epoch())
            await process.world.pipeline.return_abandoned(9)
            await process.world.pipeline.recover()

    def started(self, process: Process, run: Run, status: str, attempt: int, abandoned: int) -> None:
        """Check I3 and I5 when a handler is called. An attempt goes alone once, after its batch at the latest."""
        story = self.stories[run.event_id]
        if run.together > 1 and abandoned:
            self.violations.append(f"I3: {run} was abandoned before, and may drag others along")
        if (status, attempt) != (Status.PROCESSING, run.attempt):
            self.violations.append(f"I5: started {run}, and the row is {status} at attempt {attempt}")
        if run.attempt in story.started:
            self.violations.append(f"I3: {run} was started before")
        if "redis" in process.away and run.attempt not in story.batched:  # a batch had the lock for each of its events
            self.violations.append(f"I5: started {run} without the lock: Redis is unreachable")
        (story.batched if run.together > 1 else story.started).add(run.attempt)
        others = [other for each in self.processes if each.state is not State.DEAD for other in each.runs]
        if any(other.event_id == run.event_id and not other.severed for other in others if other is not run):
            self.violations.append(f"I3: {run} is the second of that event that can commit")

    def breaks(self, run: Run, plan: Plan) -> None:
        """Note an attempt for which the model makes an exception."""
        story = self.stories[run.event_id]
        (story.rogue if plan is Plan.COMMIT else story.permanent).add(run.attempt)

    # -- faults of the stores -------------------------------------------------------------------------

    async def flush(self) -> None:
        """Redis loses every key of this system."""
        if self.stories:
            await self.redis.delete(*(self._prefix + event_id for event_id in self.stories))

    async def expire_locks(self) -> None:
        """The remaining locks expire. Their owners are dead or have ended.

        Recovery leaves out what it could not lock for as long as a lock lives: that time is over with them.
        """
        for process in self.processes:
            pipeline = process.world.pipeline
            for backlog in (pipeline._backlog, pipeline._singles, *(lanes.backlog for lanes in pipeline._batches)):
                backlog._left_out.clear()
        locks = [self._prefix + event_id for event_id, key in self.seen.keys.items() if key.claimed]
        if locks:
            await self.redis.delete(*locks)

    async def forget(self, event_ids: list[str]) -> None:
        """Remove these events from the ledger, as a restore would: promises about them no longer count."""
        for event_id in event_ids:
            story = self.stories[event_id]
            self.stories[event_id] = Story(story.delivery, story.wanted_by)
        for table in ("firstclaim.stripe_events", "firstclaim.stripe_event_payloads", "effects"):
            await self.operator.database.execute(_FORGET.format(table), event_ids)

    async def rotate(self) -> None:
        """Rotate the epoch, as the command does."""
        _, self._epoch = await operator.rotate(self._url)

    async def replay(self, event_ids: list[str]) -> list[str]:
        """Replay, as an operator does; returns the events that were changed."""
        replayed = await operator.replay(self._url, event_ids)
        for event_id in replayed:
            self.stories[event_id].replays += 1
        return replayed

    def awake(self, number: int) -> Process:
        """This process, or the next one that is running."""
        order = self.processes[number:] + self.processes[:number]
        return next(process for process in order if process.state is State.AWAKE)

    @property
    def frozen(self) -> list[Process]:
        """The frozen processes."""
        return [process for process in self.processes if process.state is State.FROZEN]

    # -- checks ---------------------------------------------------------------------------------------

    async def settle(self) -> list[Answer]:
        """Wait until nothing happens any more, then check everything; returns the answers of this step."""
        await until(self._quiet)
        await until(self._lost_sessions_are_over)
        self.seen = await self._look()
        answers, self.answers = self.answers, []
        violations, self.violations = self.violations, []
        for answer in answers:
            self.happened[f"answer {answer.outcome.kind}"] += 1
            story, row = self.stories[answer.event_id], self.seen.rows.get(answer.event_id)
            if said := oracle.dishonest(story, answer.outcome, row, wanted=answer.wanted, replayed=answer.replayed):
                violations.append(f"{said}: {answer} {row}")
        violations += oracle.broken(self.stories, self.seen, self.limits)
        assert not violations, "\n".join(violations)
        return answers

    async def _quiet(self) -> bool:
        for number, process in enumerate(self.processes):
            if process.state is State.DEAD:
                await self.replace(number)
        return all(process.quiet and process.knows_its_connections for process in self.processes)

    async def _lost_sessions_are_over(self) -> bool:
        """The server rolls back a session's transaction only when it detects that the client is gone."""
        known = _OWN_SESSIONS + sum(process.postgres.connections for process in self.processes)
        return bool(await self.operator.database.fetchval(_SESSIONS) <= known)

    async def _look(self) -> Seen:
        found = await self.operator.database.fetch(_LOOK)
        rows = {
            r["event_id"]: Row(
                Status(r["status"]), r["attempt"], r["failures"], r["abandoned"], r["given_up"], tuple(r["attempts"])
            )
            for r in found
            if r["status"] is not None
        }
        stray = tuple(r["event_id"] for r in found if r["status"] is None)
        return Seen(rows, await self._keys(), self._epoch, stray)

    async def _keys(self) -> dict[str, Key]:
        async with self.redis.pipeline(transaction=False) as pipe:
            for event_id in self.stories:
                pipe.get(self._prefix + event_id)
                pipe.pttl(self._prefix + event_id)
            replies = await pipe.execute()
        found = zip(self.stories, replies[::2], replies[1::2], strict=True)
        return {event_id: Key(value, ttl_ms) for event_id, value, ttl_ms in found if value is not None}


@contextlib.contextmanager
def prepared(stores: Stores) -> Iterator[System]:
    """A system on an event loop of its own, for the duration of the block."""
    with asyncio.Runner() as runner:
        system = System(runner, stores)
        runner.run(system.open())
        try:
            yield system
        finally:
            runner.run(system.close())
