"""The state machine: everything that can happen to an event, in any order, one step at a time.

Guarantees: after every step all invariants hold (`oracle.broken`), every answer was true, and a delivery without a
fault had the outcome that the reference model expects. At the end faults stop, time passes and recovery runs: every
row settles, with one effect if it is completed and else none, and an event that was never promised is processed when
it is sent again.

No rule has a precondition. What can be drawn next must not depend on the races of a step, or Hypothesis would report
a run that it cannot repeat exactly. A rule that has nothing to act on does nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Final

from hypothesis import strategies as st
from hypothesis.stateful import Bundle, MultipleResults, initialize, multiple, rule

from firstclaim.status import Status
from tests.stateful.oracle import SETTLED, Plan
from tests.stateful.process import BATCH_TYPE, NEW_TYPE, TYPE, Process, Run
from tests.stateful.steps import Steps
from tests.stateful.system import PROCESSES
from tests.stateful.wire import Effect, Fault

# The messages that can occur in a step, and the plans by which handlers end.
DELIVERY: Final = ("lock", "insert", "take over", "lock taken over", "marker", "hold", "effect")
RECOVERY: Final = ("return abandoned", "lock", "lock taken over", "take over", "take over", "marker", "hold", "effect")
ENDING: Final[Mapping[Plan, Sequence[str]]] = {Plan.WORK: ("mark", "commit"), Plan.HOLD: ()}
FAILING: Final = ("fail", "forget", "renew")

# Every insert of the event waits for an uncommitted mark, up to the statement's timeout: correct, and slow.
_SLOW = {("mark", True), ("commit", False)}

UNKNOWN_TYPE: Final = "invoice.paid"  # that no process has a handler for
DAY_SECONDS: Final = 24 * 3600.0


@st.composite
def turns(
    draw: st.DrawFn, messages: Sequence[str], plans: Sequence[Plan] = (*Plan, *[Plan.WORK] * 4, *[Plan.HOLD] * 2)
) -> tuple[Plan, Fault | None]:
    """The plan of the handlers that a step starts, and a fault at a message that may occur in it."""
    plan = draw(st.sampled_from(plans))
    if draw(st.booleans()):
        return plan, None
    ending = ENDING.get(plan, FAILING)
    message = draw(st.sampled_from([*messages, *ending, *ending]))
    fault = Fault(message, draw(st.booleans()), draw(st.sampled_from(Effect)))
    slow = fault.effect is Effect.FREEZE and (fault.message, fault.heard) in _SLOW
    return plan, replace(fault, effect=Effect.DIE) if slow else fault


Turn = tuple[Plan, Fault | None]

events = Bundle[str]("events")
numbers = st.integers(0, PROCESSES - 1)
deliveries = turns(DELIVERY)
batches = turns((*DELIVERY, "renew", "renew"), (*Plan, *[Plan.WORK] * 2, *[Plan.FAIL] * 3, Plan.HOLD))
recoveries = turns(RECOVERY)
endings = turns((), [*(plan for plan in Plan if plan is not Plan.HOLD), *[Plan.WORK] * 3])


class Machine(Steps):
    """The rules, and the teardown."""

    # -- deliveries -----------------------------------------------------------------------------------

    @initialize(target=events, number=numbers, turn=deliveries)
    def deliver_first(self, number: int, turn: Turn) -> str:
        event_id = self.system.new_story()
        self.deliver(number, event_id, *turn)
        return event_id

    @rule(
        target=events,
        number=numbers,
        turn=deliveries,
        kind=st.sampled_from([TYPE, TYPE, BATCH_TYPE, NEW_TYPE, UNKNOWN_TYPE]),
    )
    def deliver_new(self, number: int, turn: Turn, kind: str) -> str:
        event_id = self.system.new_story(kind)
        self.deliver(number, event_id, *turn)
        return event_id

    @rule(event_id=events, number=numbers, turn=deliveries)
    def deliver_again(self, event_id: str, number: int, turn: Turn) -> None:
        self.deliver(number, event_id, *turn)

    @rule(
        target=events,
        copies=st.lists(numbers, min_size=1, max_size=4),
        others=st.lists(st.tuples(numbers, events), max_size=3),
        number=numbers,
        turn=deliveries,
    )
    def deliver_many(self, copies: list[int], others: list[tuple[int, str]], number: int, turn: Turn) -> str:
        new = self.system.new_story()
        posts = [*((at, new) for at in copies), *others]
        self.deliver_at_once(new, [(self.system.awake(at), each) for at, each in posts], number, *turn)
        return new

    @rule(target=events, number=numbers, fails=st.lists(st.booleans(), min_size=2, max_size=4), turn=batches)
    def deliver_a_batch(self, number: int, fails: list[bool], turn: Turn) -> MultipleResults[str]:
        new = [self.system.new_story(BATCH_TYPE) for _ in fails]
        guilty = frozenset(event_id for event_id, failing in zip(new, fails, strict=True) if failing)
        self.deliver_together(number, new, guilty, *turn)
        return multiple(*new)

    # -- handlers that are held -----------------------------------------------------------------------

    @property
    def held(self) -> list[Run]:
        return [run for process in self.system.processes for run in process.runs if run.held is not None]

    @rule(which=st.integers(0, 9), number=numbers, turn=endings)
    def a_handler_goes_on(self, which: int, number: int, turn: Turn) -> None:
        ending, fault = turn
        if held := self.held:
            self.arm(number, fault)
            self.release(held[which % len(held)], ending)
            self.settle()

    # -- recovery -------------------------------------------------------------------------------------

    @rule(
        after_seconds=st.sampled_from([0.0, 1.0, 1.0, 10.0, 7200.0, 7200.0, 3 * DAY_SECONDS]),
        chosen=st.sampled_from([(0,), (1,), (0, 1)]),
        turn=recoveries,
    )
    def recover(self, after_seconds: float, chosen: tuple[int, ...], turn: Turn) -> None:
        plan, fault = turn
        self.run(self.system.clock.advance(after_seconds))
        self.arm(chosen[0], fault)
        self.begin_recovery({self.system.awake(number): None for number in chosen})
        self.settle(plan)

    # -- processes ------------------------------------------------------------------------------------

    @rule(number=numbers, fate=st.sampled_from(["thaws", "thaws", "crashes", "is stopped", "loses its sessions"]))
    def a_process(self, number: int, fate: str) -> None:
        process = self.system.processes[number]
        if fate == "is stopped":
            self._stop(self.system.awake(number))
        elif fate == "thaws":
            self._thaw()
        else:
            self.act(process.die if fate == "crashes" else process.sever)
            self.settle()

    def _thaw(self) -> None:
        for process in self.system.frozen:
            self.act(process.thaw)
            self.settle()

    def _stop(self, process: Process) -> None:
        """A graceful shutdown without time to finish: claims are released, and nothing is charged."""
        mine = {run.event_id for run in process.runs if not run.severed}
        before = self.system.seen.rows
        self.run(self.system.replace(self.system.processes.index(process)))
        self.settle()
        for event_id in mine:
            row, was = self.system.seen.rows[event_id], before[event_id]
            charged = (row.failures, row.abandoned, row.attempt) != (was.failures, was.abandoned, was.attempt)
            self.check(row.status is Status.PENDING and not charged, f"{event_id} was not released: {was}, {row}")

    # -- stores and operators -------------------------------------------------------------------------

    @rule(number=numbers, what=st.sampled_from(["Redis flushed", "locks expire", "redis", "redis", "postgres"]))
    def a_store(self, number: int, what: str) -> None:
        """`redis`, `postgres`: unreachable for one process, or reachable again."""
        process = self.system.awake(number)
        if what == "Redis flushed":
            self.run(self.system.flush())
        elif what == "locks expire":
            self.run(self.system.expire_locks())
        else:
            self.act(lambda: process.reach(what, again=what in process.away))
        self.settle()

    @rule(event_id=events)
    def replay(self, event_id: str) -> None:
        before = self.system.seen.rows.get(event_id)
        replayed = self.run(self.system.replay([event_id]))
        self.settle()
        expected = before is not None and before.status not in (Status.PROCESSING, Status.COMPLETED)
        self.check(replayed == [event_id] * expected, f"replayed {replayed}: {before}")

    @rule(event_ids=st.sets(events, max_size=3))
    def rotate(self, event_ids: set[str]) -> None:
        """A new epoch. With events: the ledger is restored to a moment before them, and Redis keeps its keys."""
        if event_ids:
            for number, process in enumerate(self.system.processes):
                self.act(process.die)
                self.run(self.system.replace(number))
            self.run(self.system.forget(sorted(event_ids)))
        self.run(self.system.rotate())
        self.settle()

    # -- the end --------------------------------------------------------------------------------------

    def teardown(self) -> None:
        if self.sound:
            self._heal()
            self._all_settle()
            self._all_are_known()
            self.system.happened["a run to its end"] += 1

    def _heal(self) -> None:
        self._thaw()
        for process in self.system.processes:
            for store in list(process.away):
                self.act(partial(process.reach, store, again=True))
        for run in self.held:
            self.release(run, Plan.WORK)
        self.settle()

    def _all_settle(self) -> None:
        """I4. Abandoned events come one at a time, so as many rounds as there are events are fair, and a few."""
        for _ in range(len(self.system.stories) + 3):
            stories = self.system.stories
            if all(row.status in SETTLED for each, row in self.system.seen.rows.items() if stories[each].wanted_by):
                return
            self.run(self.system.expire_locks())
            self.run(self.system.clock.advance(7200))
            for process in self.system.processes:
                self.begin_recovery([process])
                self.settle()
        self.check(False, f"I4: not settled: {self.system.seen.rows}")

    def _all_are_known(self) -> None:
        """Sent once more: what is there stays as it is, and what was never promised is processed."""
        self.run(self.system.expire_locks())
        self.settle()
        for event_id in self.system.stories:
            self.deliver(0, event_id, Plan.WORK, None)
