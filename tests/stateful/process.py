"""One "process" of the service: its parts, behind two proxies that can take everything from it at once.

Guarantees: dead means that nothing of it reaches a store any more, at whatever instruction it was: both proxies
refuse, so its code may run on and changes nothing, as little as a killed one's. Frozen means that nothing
passes in either direction until it thaws, and the stores keep what it had open, as with SIGSTOP. Its handlers
do as the test planned, and tell the witness.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Coroutine
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

SETTINGS: dict[str, Any] = {
    "lease_seconds": 1.0,  # of the injected clock, and in real time twice what a claim waits for a slot
    "lock_ttl_seconds": 300.0,  # in real time: ended by a rule, never by waiting
    "redis_breaker_seconds": 0.0,  # each command finds out anew: what happens does not hang on real time
    "abandoned_most": 3,
    "handler_slots": 3,
    "ingest_connections": 3,
}


# Handlers run in tasks that were made on behalf of a call, and a new task inherits this.
_caller: ContextVar["asyncio.Task[None] | None"] = ContextVar("_caller", default=None)


class State(Enum):
    """What a process is doing."""

    AWAKE = auto()
    FROZEN = auto()
    DEAD = auto()


@dataclass(eq=False, slots=True)
class Run:
    """One call of a handler. `caller`: the test's own call into the process that it came of, and that may wait for it.

    `severed`: its transaction's connection is gone, so it can commit nothing.
    """

    event_id: str
    attempt: int
    caller: asyncio.Task[None] | None = field(repr=False)
    severed: bool = False
    held: asyncio.Future[Plan] | None = None


class Witness(Protocol):
    """Who is told what handlers do."""

    plan: Plan  # of the handlers that are started now
    happened: Counter[str]

    def started(self, process: "Process", run: Run, status: str, attempt: int) -> None:
        """A handler was called, and this is its row."""

    def breaks(self, run: Run, plan: Plan) -> None:
        """It is about to commit by itself, or to raise Permanent."""


@dataclass(eq=False, slots=True)
class Process:
    """Use `spawn`. `busy` are the test's own calls into it."""

    witness: Witness
    state: State = State.AWAKE
    away: set[str] = field(default_factory=set)  # which stores it cannot reach: "redis", "postgres"
    runs: list[Run] = field(default_factory=list)
    busy: set[asyncio.Task[None]] = field(default_factory=set)
    switch: Switch = field(init=False)
    world: World = field(init=False)
    postgres: Proxy = field(init=False)
    redis: Proxy = field(init=False)
    _stack: contextlib.AsyncExitStack = field(default_factory=contextlib.AsyncExitStack)

    @classmethod
    async def spawn(cls, witness: Witness, database_url: str, redis_url: str, prefix: str) -> "Process":
        """A new one; nothing of an earlier one is in it."""
        self = cls(witness)
        self.switch = Switch(self._meet)
        self.postgres, database_url = await self._stack.enter_async_context(before_postgres(database_url))
        self.redis, redis_url = await self._stack.enter_async_context(before_redis(redis_url))
        self.postgres.tap = partial(postgres_tap, self.switch)
        self.redis.tap = partial(redis_tap, self.switch)
        self.world = await build(database_url, redis_url, prefix, {TYPE: self._handle}, **SETTINGS)
        return self

    # -- what befalls it ------------------------------------------------------------------------------

    def die(self) -> None:
        """Now, wherever it is."""
        self._become(State.DEAD)

    def freeze(self) -> None:
        """Now, wherever it is, until it thaws."""
        self._become(State.FROZEN)

    def thaw(self) -> None:
        """What was held back is forwarded."""
        self._become(State.AWAKE)

    def reach(self, store: str, *, again: bool) -> None:
        """A store is away for this process, or back."""
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
        """The server ends all of its sessions: as its time-outs do with those of a frozen process."""
        for run in self.runs:
            run.severed = True
        self.postgres.cut()

    async def bury(self) -> None:
        """Take away what is left; awake it releases its work first, dead it can do nothing."""
        await self.world.pipeline.drain(0)
        for task in self.busy:
            task.cancel()
        await asyncio.gather(*self.busy, return_exceptions=True)
        await self.world.close()
        await self._stack.aclose()

    def _meet(self, fault: Fault) -> None:
        self.witness.happened[f"{fault.effect.name} {fault.message}"] += 1
        if fault.effect is Effect.DIE:
            self.die()
        elif fault.effect is Effect.FREEZE:
            self.freeze()

    # -- what it does ---------------------------------------------------------------------------------

    def begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Call into it; `quiet` says when that has come as far as it can."""

        async def call() -> None:
            _caller.set(asyncio.current_task())
            await work

        task = asyncio.create_task(call())
        self.busy.add(task)
        return task

    @property
    def quiet(self) -> bool:
        """Whether it does nothing but hold handlers that were told to wait, or stands still altogether."""
        if self.state is State.FROZEN:
            return True
        for task in [task for task in self.busy if task.done()]:
            self.busy.discard(task)
            task.result()
        held = [run for run in self.runs if run.held is not None]
        # Its own tasks are what waits there; no other way shows that a claim is on its way to a handler.
        at_rest = len(self.world.pipeline._tasks) == len(held) == len(self.runs)
        return at_rest and self.busy <= {run.caller for run in held}

    async def _handle(self, event: Event, context: Context) -> str:
        run = Run(event.id, context.attempt, _caller.get())
        self.runs.append(run)
        try:
            plan = self.witness.plan
            query = text("SELECT status, attempt FROM stripe_events WHERE event_id = :event_id")
            row = (await context.connection.execute(query, {"event_id": event.id})).one()
            self.witness.started(self, run, row.status, row.attempt)
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
            self.witness.breaks(run, plan)
            raise Permanent("as planned")
        if plan is Plan.SWALLOW:
            with contextlib.suppress(DBAPIError):
                await context.connection.execute(text("SELECT 1 / 0"))
        if plan is Plan.COMMIT:
            self.witness.breaks(run, plan)
            await context.connection.execute(text("COMMIT"))
