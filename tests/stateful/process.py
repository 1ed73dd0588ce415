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

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from firstclaim import Context, Event, Permanent, Retry
from tests.integration.world import World, build, effect
from tests.proxy import Mode, Proxy, before_postgres, before_redis
from tests.stateful.oracle import Plan
from tests.stateful.wire import Effect, Fault, Switch, postgres_tap, redis_tap

TYPE = "invoice.payment_failed"
NEW_TYPE = "customer.created"  # of a newer build

SETTINGS: dict[str, Any] = {
    "lease_seconds": 0.5,  # on the injected clock; in real time, a claim waits half of it for a slot
    "lock_ttl_seconds": 300.0,  # in real time: a rule ends it, never a wait
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
    """One call of a handler. `caller`: the test's call into the process that led to it, and may wait for it.

    `severed`: its transaction's connection is gone, so it can commit nothing.
    """

    event_id: str
    attempt: int
    caller: asyncio.Task[None] | None = field(repr=False)
    severed: bool = False
    held: asyncio.Future[Plan] | None = None


class Observer(Protocol):
    """Observes what handlers do."""

    plan: Plan  # of the handlers that start now
    happened: Counter[str]

    def started(self, process: "Process", run: Run, status: str, attempt: int) -> None:
        """A handler was called; `status` and `attempt` are those of its row."""

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
        self.world = await build(database_url, redis_url, prefix, dict.fromkeys(types, self._handle), **SETTINGS)
        return self

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
        # Only its own tasks show whether a claim is on its way to a handler.
        at_rest = len(self.world.pipeline._tasks) == len(held) == len(self.runs)
        return at_rest and self.busy <= {run.caller for run in held}

    async def _handle(self, event: Event, context: Context) -> str:
        run = Run(event.id, context.attempt, _caller.get())
        self.runs.append(run)
        try:
            plan = self.observer.plan
            query = text("SELECT status, attempt FROM firstclaim.stripe_events WHERE event_id = :event_id")
            row = (await context.connection.execute(query, {"event_id": event.id})).one()
            self.observer.started(self, run, row.status, row.attempt)
            await effect(event, context)
            if plan is Plan.HOLD:
                run.held = asyncio.get_running_loop().create_future()
                plan = await run.held
                run.held = None
            await self._end(run, plan, context)
        finally:
            self.runs.remove(run)
        return "worked"

    async def _end(self, run: Run, plan: Plan, context: Context) -> None:
        if plan is Plan.FAIL:
            raise RuntimeError("as planned")
        if plan is Plan.RETRY:
            raise Retry("as planned", after=1)
        if plan is Plan.PERMANENT:
            self.observer.breaks(run, plan)
            raise Permanent("as planned")
        if plan is Plan.SWALLOW:
            with contextlib.suppress(DBAPIError):
                await context.connection.execute(text("SELECT 1 / 0"))
        if plan is Plan.COMMIT:
            self.observer.breaks(run, plan)
            await context.connection.execute(text("COMMIT"))
