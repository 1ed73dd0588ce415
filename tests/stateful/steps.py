"""How the state machine takes a step: arm a fault, begin something, let it go as far as it can, check everything."""

from collections.abc import Callable, Coroutine, Iterable
from typing import Any, TypeVar

from hypothesis.stateful import RuleBasedStateMachine

from firstclaim.outcome import Kind
from firstclaim.status import TAKEABLE, Status
from tests.stateful.oracle import Plan, Row, foreseen
from tests.stateful.process import Process, Run
from tests.stateful.system import Answer, System
from tests.stateful.wire import Effect, Fault

T = TypeVar("T")


class Steps(RuleBasedStateMachine):
    """Over a system that outlives it. `sound` until something was wrong: then the end is not played any more."""

    def __init__(self, system: System) -> None:
        super().__init__()
        self.system = system
        self.sound = True
        self.run(system.begin())

    # -- a step ---------------------------------------------------------------------------------------

    def arm(self, number: int, fault: Fault | None) -> None:
        """Have a fault happen to one process in this step, if it comes to that."""
        alone = len(self.system.processes) - len(self.system.frozen) == 1
        if fault is not None and fault.effect is Effect.FREEZE and alone:
            return  # somebody has to be awake
        self.system.awake(number).switch.armed = fault

    def begin_deliveries(self, shots: Iterable[tuple[Process, str]]) -> None:
        """All at the same moment."""
        self.act(lambda: [process.begin(self.system.deliver(process, event_id)) for process, event_id in shots])

    def begin_recovery(self, processes: Iterable[Process]) -> None:
        """A round of each at the same moment."""
        self.act(lambda: [process.begin(self.system.recover(process)) for process in processes])

    def let_go(self, run: Run, ending: Plan) -> None:
        """A handler that is held goes on, and ends so."""
        held = run.held
        assert held is not None
        self.act(lambda: held.set_result(ending))

    def settle(self, plan: Plan = Plan.WORK) -> list[Answer]:
        """The end of every step; `plan` is for the handlers that it starts."""
        self.system.plan = plan
        try:
            return self.run(self.system.settle())
        finally:
            self.system.plan = Plan.WORK
            for process in self.system.processes:
                process.switch.armed = None

    # -- whole deliveries -----------------------------------------------------------------------------

    def deliver(self, number: int, event_id: str, plan: Plan, fault: Fault | None) -> None:
        """One delivery to one process; where nothing stands in its way it comes to what the model foresees."""
        system, process = self.system, self.system.awake(number)
        before, key = system.seen.rows.get(event_id), system.seen.keys.get(event_id)
        dispatcher = process.world.dispatcher
        room = dispatcher.free_slots > 0 and (
            before is None or before.abandoned == 0 or dispatcher.previously_abandoned_slot_free
        )
        epoch = process.world.claims.epoch.current
        kind, status = foreseen(system.stories[event_id], before, key, epoch=epoch, plan=plan, room=room)
        self.arm(number, fault)
        self.begin_deliveries([(process, event_id)])
        said = [answer.outcome.kind for answer in self.settle(plan) if answer.event_id == event_id]
        if fault is None and not process.away:
            self.check(said == ([] if kind is None else [kind]), f"{event_id}: {said}, not {kind}; {before} {key}")
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
        self, new: str, shots: list[tuple[Process, str]], number: int, plan: Plan, fault: Fault | None
    ) -> None:
        """Copies of a new event among others: of the copies exactly one is dispatched."""
        calm = fault is None and not any(process.away for process, _ in shots)
        room = all(process.world.dispatcher.free_slots >= len(shots) for process, _ in shots)
        self.arm(number, fault)
        self.begin_deliveries(shots)
        kinds = [answer.outcome.kind for answer in self.settle(plan) if answer.event_id == new]
        if calm and room and plan is Plan.WORK:
            self.check(kinds.count(Kind.PROCESSED) == 1, f"{new}, delivered {len(kinds)} times at once: {kinds}")
            self.check(kinds.count(Kind.DUPLICATE) == len(kinds) - 1, f"{new}, delivered at once: {kinds}")

    # -- on the loop ----------------------------------------------------------------------------------

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Until it is done."""
        try:
            return self.system.run(work)
        except BaseException as error:
            self._fails(error)
            raise

    def act(self, act: Callable[[], object]) -> None:
        """Something that takes no time, but needs the loop."""

        async def now() -> None:
            act()

        self.run(now())

    def check(self, holds: bool, words: str) -> None:
        """Fail with these words if it does not hold."""
        if not holds:
            error = AssertionError(words)
            self._fails(error)
            raise error

    def _fails(self, error: BaseException) -> None:
        """Said at once: where a race decides, Hypothesis may not find it again, and says only that."""
        if self.sound:
            print(f"{type(error).__name__}: {error}")
        self.sound = False
