"""A step of the state machine: arm a fault, start an action, wait until nothing happens any more, check everything."""

from collections.abc import Callable, Coroutine, Iterable
from typing import Any, TypeVar

from hypothesis.stateful import RuleBasedStateMachine

from firstclaim.outcome import Kind
from firstclaim.status import TAKEABLE, Status
from tests.stateful.oracle import ENDINGS, Plan, Row, expected
from tests.stateful.process import Process, Run
from tests.stateful.system import Answer, System
from tests.stateful.wire import Effect, Fault

T = TypeVar("T")


class Steps(RuleBasedStateMachine):
    """The steps, on a system that outlives the machine. `sound` until a check fails: then the teardown is skipped."""

    def __init__(self, system: System) -> None:
        super().__init__()
        self.system = system
        self.sound = True
        self.run(system.begin())

    # -- a step ---------------------------------------------------------------------------------------

    def arm(self, number: int, fault: Fault | None) -> None:
        """Inject a fault into one process in this step, if its message occurs."""
        alone = len(self.system.processes) - len(self.system.frozen) == 1
        if fault is not None and fault.effect is Effect.FREEZE and alone:
            return  # one process has to run
        self.system.awake(number).switch.armed = fault

    def begin_deliveries(self, posts: Iterable[tuple[Process, str]]) -> None:
        """Start all deliveries at the same moment."""
        self.act(lambda: [process.begin(self.system.deliver(process, event_id)) for process, event_id in posts])

    def begin_recovery(self, processes: Iterable[Process]) -> None:
        """Start a round of recovery in each process at the same moment."""
        self.act(lambda: [process.begin(self.system.recover(process)) for process in processes])

    def release(self, run: Run, ending: Plan) -> None:
        """Release a handler that is held; it ends as planned. The events of a batch are held, and released, as one."""
        held = run.held
        if held is not None and not held.done():
            self.act(lambda: held.set_result(ending))

    def settle(self, plan: Plan = Plan.WORK, guilty: frozenset[str] | None = None) -> list[Answer]:
        """The end of every step. `plan` applies to handlers that it starts, if they get one of `guilty`; None: to all.

        A batch that has none of them works.
        """
        self.system.plan, self.system.guilty = plan, guilty
        try:
            return self.run(self.system.settle())
        finally:
            self.system.plan, self.system.guilty = Plan.WORK, None
            for process in self.system.processes:
                process.switch.armed = None

    # -- whole deliveries -----------------------------------------------------------------------------

    def deliver(self, number: int, event_id: str, plan: Plan, fault: Fault | None) -> None:
        """One delivery to one process. Without a fault, its outcome must be the one that the model expects."""
        system, process = self.system, self.system.awake(number)
        before, key = system.seen.rows.get(event_id), system.seen.keys.get(event_id)
        slots, wanted = process.world.slots, system.stories[event_id].delivery.event.type in process.types
        capacity = slots.free > 0 and (before is None or before.abandoned == 0 or slots.previously_abandoned_free)
        # Under a backlog, which real time decides, a delivery may have no place: then it is recorded for recovery.
        known = fault is None and not process.away and not slots.backlog
        epoch = process.world.claims._epoch.current
        kind, status = expected(wanted, before, key, epoch=epoch, plan=plan, capacity=capacity)
        self.arm(number, fault)
        self.begin_deliveries([(process, event_id)])
        outcomes = [answer.outcome for answer in self.settle(plan) if answer.event_id == event_id]
        kinds = [outcome.kind for outcome in outcomes]
        if known:
            self.check(kinds == ([] if kind is None else [kind]), f"{event_id}: {outcomes}, not {kind}; {before} {key}")
            self._compare(event_id, before, kind, status)

    def _compare(self, event_id: str, before: Row | None, kind: Kind | None, status: Status | None) -> None:
        row, key = self.system.seen.rows.get(event_id), self.system.seen.keys.get(event_id)
        if status is None:
            self.check(row == before, f"{event_id}: {row} was changed from {before}")
            return
        in_time = row is not None and not row.given_up
        self.check(row is not None and (row.status is status or not in_time), f"{event_id}: {row}, not {status}")
        if row is not None and row.status in TAKEABLE and kind is not Kind.DUPLICATE:
            self.check(key is None, f"{event_id}: {key} keeps the next delivery from {row}")

    def deliver_at_once(
        self, new: str, posts: list[tuple[Process, str]], number: int, plan: Plan, fault: Fault | None
    ) -> None:
        """Copies of a new event, together with other events: exactly one copy is dispatched."""
        no_fault = fault is None and not any(process.away for process, _ in posts)
        capacity = all(
            process.world.slots.free >= len(posts) and not process.world.slots.backlog for process, _ in posts
        )
        self.arm(number, fault)
        self.begin_deliveries(posts)
        kinds = [answer.outcome.kind for answer in self.settle(plan) if answer.event_id == new]
        if no_fault and capacity and plan is Plan.WORK:
            self.check(kinds.count(Kind.PROCESSED) == 1, f"{new}, delivered {len(kinds)} times at once: {kinds}")
            self.check(kinds.count(Kind.DUPLICATE) == len(kinds) - 1, f"{new}, delivered at once: {kinds}")

    def deliver_together(
        self, number: int, event_ids: list[str], guilty: frozenset[str], plan: Plan, fault: Fault | None
    ) -> None:
        """New events of a batch handler, to one process at the same moment. The guilty fail, and nobody else."""
        process = self.system.awake(number)
        capacity = process.world.slots.free >= len(event_ids)
        self.arm(number, fault)
        self.begin_deliveries([(process, event_id) for event_id in event_ids])
        kinds = {answer.event_id: answer.outcome.kind for answer in self.settle(plan, guilty)}
        if fault is not None or process.away or not capacity or plan is Plan.HOLD:
            return
        for event_id in event_ids:
            row = self.system.seen.rows.get(event_id)
            ends = {(Kind.PROCESSED, Status.COMPLETED)} if event_id not in guilty else set()
            if event_id in guilty or (guilty and plan is Plan.COMMIT):  # what was committed is not tried again
                ends.add(ENDINGS[plan])
            if guilty and plan is Plan.RETRY:  # of a batch: it moves all of it
                ends.add((Kind.FAILED, Status.PENDING))
            if guilty:  # those that go alone wait for each other, in real time
                ends.add((Kind.DEFERRED, Status.PENDING))
            end = (kinds.get(event_id), row and row.status)
            self.check(end in ends, f"{event_id} of {event_ids}, {guilty=}: {end}, not {ends}")
            charged = row is not None and (row.failures, row.abandoned) != (0, 0)
            self.check(not charged or event_id in guilty or plan is Plan.COMMIT, f"{event_id} was charged: {row}")

    # -- the event loop ------------------------------------------------------------------------------

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run on the event loop until it is done."""
        try:
            return self.system.run(work)
        except BaseException as error:
            self._fails(error)
            raise

    def act(self, act: Callable[[], object]) -> None:
        """Call a function that needs the event loop."""

        async def now() -> None:
            act()

        self.run(now())

    def check(self, holds: bool, words: str) -> None:
        """Fail with this message if the condition does not hold."""
        if not holds:
            error = AssertionError(words)
            self._fails(error)
            raise error

    def _fails(self, error: BaseException) -> None:
        """Print it at once: if a race decides, Hypothesis may not reproduce the error, and then reports only that."""
        if self.sound:
            print(f"{type(error).__name__}: {error}")
        self.sound = False
