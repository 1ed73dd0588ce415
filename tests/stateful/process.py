"""One "process" of the service: its components, behind two proxies that can cut it off from both stores at once.

Guarantees: dead means that nothing from it reaches a store any more, at whatever instruction it was. Both proxies
refuse, so its code may continue and changes nothing, like that of a killed process. Frozen means that no data passes
in either direction until it is resumed, and the stores keep its sessions open, as with SIGSTOP. Its handlers follow
the plan of the test, and report to the observer.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Coroutine, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import partial
from typing import Any, Protocol

import asyncpg
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from firstclaim import BatchContext, Context, Event, Permanent, Retry
from firstclaim.context import TransactionContext
from firstclaim.inbox.claim import Claim
from firstclaim.inbox.lanes import Lanes
from firstclaim.inbox.slots import Place
from firstclaim.outcome import Outcome
from tests.integration.world import BatchFunction, Function, World, build, effect, effects
from tests.proxy import Mode, Proxy, before_postgres, before_redis
from tests.stateful.oracle import Plan
from tests.stateful.wire import Effect, Fault, Switch, postgres_tap, redis_tap

TYPE = "invoice.payment_failed"
NEW_TYPE = "customer.created"  # of a newer build
BATCH_TYPE = "checkout.session.completed"  # of a batch handler

SETTINGS: dict[str, Any] = {
    "lease_seconds": 0.5,  # on the injected clock; in real time, a claim waits half of it for a slot
    "lock_ttl_seconds": 300.0,  # in real time: a rule ends it, never a wait
    "recovery_interval_seconds": 0.0,  # every look is a full one, however soon it follows the last
    "redis_breaker_seconds": 0.0,  # each command tries again: nothing depends on real time
    "abandoned_most": 3,
    "handler_slots": 3,
    "ingest_connections": 3,
}


# Handlers run in tasks that a call has created, and a new task inherits this.
_caller: ContextVar["asyncio.Task[None] | None"] = ContextVar("_caller", default=None)


class State(Enum):
    """The state of a process."""

    AWAKE = auto()
    FROZEN = auto()
    DEAD = auto()


@dataclass(eq=False, slots=True)
class Run:
    """An event in a call of a handler. `caller`: the test's call into the process that led to it, and may wait for it.

    `together`: the events of the call, or 0 if it is an ordinary handler's. `severed`: its transaction's connection is
    gone, so it can commit nothing.
    """

    event_id: str
    attempt: int
    caller: asyncio.Task[None] | None = field(repr=False)
    together: int = 0
    severed: bool = False
    held: asyncio.Future[Plan] | None = None


class Observer(Protocol):
    """Observes what handlers do."""

    plan: Plan  # of the handlers that start now
    guilty: frozenset[str] | None  # the events that it is for; None: all
    happened: Counter[str]

    def started(self, process: "Process", run: Run, status: str, attempt: int, abandoned: int) -> None:
        """A handler was called with this event; `status`, `attempt` and `abandoned` are those of its row."""

    def breaks(self, run: Run, plan: Plan) -> None:
        """The handler is about to commit its transaction itself, or to raise Permanent."""


@dataclass(eq=False, slots=True)
class Process:
    """Use `spawn`. `busy` are the test's calls into it."""

    observer: Observer
    types: Sequence[str]  # that it has a handler for
    state: State = State.AWAKE
    away: set[str] = field(default_factory=set)  # the stores that it cannot reach: "redis", "postgres"
    runs: list[Run] = field(default_factory=list)
    busy: set[asyncio.Task[None]] = field(default_factory=set)
    switch: Switch = field(init=False)
    world: World = field(init=False)
    postgres: Proxy = field(init=False)
    redis: Proxy = field(init=False)
    _callers: dict[tuple[str, int], "asyncio.Task[None] | None"] = field(default_factory=dict)  # by event and attempt
    _at_once: set[tuple[str, int]] = field(default_factory=set)  # those of these attempts that go alone from the start
    _stack: contextlib.AsyncExitStack = field(default_factory=contextlib.AsyncExitStack)

    @classmethod
    async def spawn(
        cls, observer: Observer, types: Sequence[str], database_url: str, redis_url: str, prefix: str
    ) -> "Process":
        """A new process with handlers for `types`, without any state of an earlier one."""
        self = cls(observer, types)
        self.switch = Switch(self._meet)
        self.postgres, database_url = await self._stack.enter_async_context(before_postgres(database_url))
        self.redis, redis_url = await self._stack.enter_async_context(before_redis(redis_url))
        self.postgres.tap = partial(postgres_tap, self.switch)
        self.redis.tap = partial(redis_tap, self.switch)
        single: dict[str, Function] = dict.fromkeys([each for each in types if each != BATCH_TYPE], self._handle)
        batch: dict[str, BatchFunction] = {BATCH_TYPE: self._handle_batch} if BATCH_TYPE in types else {}
        self.world = await build(database_url, redis_url, prefix, single, batch, **SETTINGS)
        for lanes in self.world.pipeline._batches:
            self._note_callers(lanes)
        return self

    def _note_callers(self, lanes: Lanes) -> None:
        """A batch runs in a task that belongs to none of its callers; an event that goes alone at once, in its own."""
        whole = lanes.run

        async def run(claim: Claim, event: Event, place: Place) -> Outcome:
            self._callers[claim.event_id, claim.attempt] = _caller.get()
            if claim.alone or claim.abandoned:
                self._at_once.add((claim.event_id, claim.attempt))
            return await whole(claim, event, place)

        lanes.run = run  # type: ignore[method-assign]

    # -- faults ---------------------------------------------------------------------------------------

    def die(self) -> None:
        """Kill it now, whatever it is doing."""
        self._become(State.DEAD)

    def freeze(self) -> None:
        """Freeze it now, whatever it is doing."""
        self._become(State.FROZEN)

    def thaw(self) -> None:
        """Resume it: data that was held back is forwarded."""
        self._become(State.AWAKE)

    def reach(self, store: str, *, again: bool) -> None:
        """Make a store unreachable for this process, or reachable again."""
        (self.away.discard if again else self.away.add)(store)
        if store == "postgres" and not again:
            self.sever()
        self._become(self.state)

    def _become(self, state: State) -> None:
        self.state = state
        for store, proxy in (("postgres", self.postgres), ("redis", self.redis)):
            if state is State.DEAD or store in self.away:
                proxy.switch(Mode.REFUSE)
            else:
                proxy.switch(Mode.FROZEN if state is State.FROZEN else Mode.OPEN)

    def sever(self) -> None:
        """The server ends all of its sessions, as its timeouts do with those of a frozen process."""
        for run in self.runs:
            run.severed = True
        self.postgres.cut()

    async def clean_up(self) -> None:
        """Remove it. A running process releases its work first; a dead one can do nothing."""
        await self.world.pipeline.drain(0)
        for task in self.busy:
            task.cancel()
        await asyncio.gather(*self.busy, return_exceptions=True)
        await self.world.close()
        await self._stack.aclose()

    def _meet(self, fault: Fault) -> None:
        self.observer.happened[f"{fault.effect.name} {fault.message}"] += 1
        if fault.effect is Effect.DIE:
            self.die()
        elif fault.effect is Effect.FREEZE:
            self.freeze()

    # -- calls ----------------------------------------------------------------------------------------

    def begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Call into the process. `quiet` tells when the call can make no further progress."""

        async def call() -> None:
            _caller.set(asyncio.current_task())
            await work

        task = asyncio.create_task(call())
        self.busy.add(task)
        return task

    @property
    def quiet(self) -> bool:
        """Whether it does nothing, except for handlers that the test holds; or is frozen."""
        if self.state is State.FROZEN:
            return True
        for task in [task for task in self.busy if task.done()]:
            self.busy.discard(task)
            task.result()
        held = [run for run in self.runs if run.held is not None]
        # Only its own tasks show whether a claim is on its way to a handler. A call of a batch handler has one of its
        # own, besides that of each event.
        apart = [run for run in held if run.together and (run.event_id, run.attempt) not in self._at_once]
        calls = len({id(run.held) for run in apart})
        at_rest = len(self.world.pipeline._work.tasks) == len(held) + calls and len(held) == len(self.runs)
        return at_rest and self.busy <= {run.caller for run in held}

    @property
    def knows_its_connections(self) -> bool:
        """Whether it knows which of its connections are lost, and that Postgres answers. True if it is frozen or away.

        Until then its next statement may be sent on a lost connection, or be refused at once.
        """
        if self.state is not State.AWAKE or "postgres" in self.away:
            return True
        components, open_ports = self.world.components, self.postgres.client_ports
        free = [*components.ingest._free, *(each.driver for each in components.handler_connections._free)]
        noticed = all(each.is_closed() or _port(each) in open_ports for each in free)
        return noticed and not components.probe.doubted and not components.probe.unreachable

    async def _handle(self, event: Event, context: Context) -> str:
        run = Run(event.id, context.attempt, _caller.get())
        self.runs.append(run)
        try:
            plan = self.observer.plan
            await self._note_started([run], context)
            await effect(event, context)
            await self._end([run], await self._held([run], plan), context)
        finally:
            self.runs.remove(run)
        return "worked"

    async def _handle_batch(self, events: list[Event], context: BatchContext) -> str:
        attempts = [(event.id, context.attempts[event.id]) for event in events]
        runs = [Run(*each, self._callers.get(each), len(events)) for each in attempts]
        self.runs += runs
        try:
            plan, guilty = self.observer.plan, self.observer.guilty
            if guilty is not None and not guilty & {event.id for event in events}:
                plan = Plan.WORK
            await self._note_started(runs, context)
            await effects(events, context)
            await self._end(runs, await self._held(runs, plan), context)
        finally:
            for run in runs:
                self.runs.remove(run)
        return "worked"

    async def _note_started(self, runs: Sequence[Run], context: TransactionContext) -> None:
        query = text("SELECT status, attempt, abandoned FROM firstclaim.stripe_events WHERE event_id = :event_id")
        for run in runs:
            row = (await context.connection.execute(query, {"event_id": run.event_id})).one()
            self.observer.started(self, run, row.status, row.attempt, row.abandoned)

    async def _held(self, runs: Sequence[Run], plan: Plan) -> Plan:
        """The plan, once the test ends the call if it is to be held."""
        if plan is Plan.HOLD:
            held: asyncio.Future[Plan] = asyncio.get_running_loop().create_future()
            for run in runs:
                run.held = held
            plan = await held
            for run in runs:
                run.held = None
        return plan

    async def _end(self, runs: Sequence[Run], plan: Plan, context: TransactionContext) -> None:
        if plan is Plan.FAIL:
            raise RuntimeError("as planned")
        if plan is Plan.RETRY:
            raise Retry("as planned", after=1)
        if plan is Plan.PERMANENT:
            if len(runs) == 1:  # else each goes alone
                self.observer.breaks(runs[0], plan)
            raise Permanent("as planned")
        if plan is Plan.SWALLOW:
            with contextlib.suppress(DBAPIError):
                await context.connection.execute(text("SELECT 1 / 0"))
        if plan is Plan.COMMIT:
            for run in runs:
                self.observer.breaks(run, plan)
            await context.connection.execute(text("COMMIT"))


def _port(connection: asyncpg.Connection) -> int:
    """Our end's port."""
    port: int = connection._transport.get_extra_info("sockname")[1]  # type: ignore[attr-defined]
    return port
