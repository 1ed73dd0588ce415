"""Claims, dispatch and recovery on real stores, under every fault in any order: Hypothesis looks for the worst.

Two runs of one state machine (`tests.stateful.machine`): a short one, the same each time, and with the chaos suite a
long one, another each time. A failure prints the shortest history that it was found with, and a blob to
reproduce it. TEST_STATEFUL_EXAMPLES makes either run as long as you like.
"""

import logging
import os
from collections.abc import Iterator

import pytest
import structlog
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from firstclaim.inbox import backlog
from firstclaim.outcome import Kind
from firstclaim.status import Status
from tests.stateful.machine import DELIVERY, ENDING, FAILING, RECOVERY, Machine
from tests.stateful.oracle import Plan
from tests.stateful.process import BATCH_TYPE
from tests.stateful.system import System, prepared
from tests.stateful.wire import POSTGRES, REDIS, Effect, Fault
from tests.stores import Stores

SHORT_EXAMPLES = 10
LONG_EXAMPLES = 120

CHOSEN = settings(
    stateful_step_count=30,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def system(stores: Stores) -> Iterator[System]:
    """One for the module: each run finds it empty."""
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    with prepared(stores) as system:
        yield system
    structlog.configure(**before)


@pytest.fixture(autouse=True)
def _every_look_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds follow one another at once here: one slow look would narrow those that settle everything."""
    monkeypatch.setattr(backlog, "_FULL_LOOK_SHARE", 0)


def play(system: System, examples: int, chosen: settings) -> None:
    """Run the machine over this system."""

    class Played(Machine):
        def __init__(self) -> None:
            super().__init__(system)

    many = int(os.environ.get("TEST_STATEFUL_EXAMPLES", examples))
    run_state_machine_as_test(Played, settings=settings(chosen, max_examples=many))


@pytest.mark.timeout(1200)
def test_whatever_happens_in_any_order(system: System) -> None:
    """A few hundred steps of deliveries, crashes, lost replies and recoveries: no invariant breaks, all settles."""
    play(system, SHORT_EXAMPLES, settings(CHOSEN, derandomize=True))


@pytest.mark.chaos
@pytest.mark.timeout(3000)
def test_whatever_happens_for_long(system: System) -> None:
    """Thousands of steps, others each time: no invariant breaks, all settles."""
    system.happened.clear()
    play(system, LONG_EXAMPLES, CHOSEN)
    print(system.happened)


# -- the faults are where they say --------------------------------------------------------------------


def test_every_message_has_its_turn() -> None:
    """No fault is listed that no step may come to, and none is named that is not listed."""
    named = {*DELIVERY, *RECOVERY, *FAILING, *(each for messages in ENDING.values() for each in messages)}
    assert named == {*REDIS, *POSTGRES}


# At which message, whether it was heard; the row and whether the lock is left by one that died there; the answer
# of one that only lost the connection.
PLACES = [
    ("lock", False, None, False, Kind.DEFERRED),
    ("lock", True, None, True, Kind.DEFERRED),
    ("insert", False, None, True, Kind.UNAVAILABLE),
    ("insert", True, Status.PROCESSING, True, Kind.UNAVAILABLE),
    ("marker", False, Status.PROCESSING, True, Kind.PROCESSED),
    ("marker", True, Status.PROCESSING, False, Kind.PROCESSED),
    ("hold", True, Status.PROCESSING, False, Kind.UNAVAILABLE),
    ("effect", True, Status.PROCESSING, False, Kind.FAILED),
    ("mark", True, Status.PROCESSING, False, Kind.FAILED),
    ("commit", False, Status.PROCESSING, False, Kind.FAILED),
    ("commit", True, Status.COMPLETED, False, Kind.PROCESSED),
]


@pytest.mark.parametrize(("message", "heard", "status", "locked", "_"), PLACES)
def test_a_death_happens_at_its_message(
    system: System, message: str, heard: bool, status: Status | None, locked: bool, _: Kind
) -> None:
    """The stores are left with what they had heard by then, and nobody was answered."""
    machine = Machine(system)
    system.happened.clear()
    event_id = system.new_story()
    machine.deliver(0, event_id, Plan.WORK, Fault(message, heard, Effect.DIE))
    row, key = system.seen.rows.get(event_id), system.seen.keys.get(event_id)
    assert (row and row.status, key is not None and key.claimed) == (status, locked)
    assert system.happened == {f"DIE {message}": 1}


@pytest.mark.parametrize(("message", "heard", "_", "__", "says"), PLACES)
def test_a_cut_happens_at_its_message(
    system: System, message: str, heard: bool, _: Status | None, __: bool, says: Kind
) -> None:
    """The process lives, and answers by what it can know."""
    machine = Machine(system)
    system.happened.clear()
    machine.deliver(0, system.new_story(), Plan.WORK, Fault(message, heard, Effect.CUT))
    assert system.happened == {f"CUT {message}": 1, f"answer {says}": 1}


@pytest.mark.parametrize("heard", [False, True])
@pytest.mark.parametrize("plan", [Plan.FAIL, Plan.RETRY])
@pytest.mark.parametrize("message", ["fail", "forget"])
def test_a_cut_happens_where_a_failure_is_noted(system: System, message: str, plan: Plan, heard: bool) -> None:
    """The process lives, and the event settles."""
    machine = Machine(system)
    system.happened.clear()
    machine.deliver(0, system.new_story(), plan, Fault(message, heard, Effect.CUT))
    assert system.happened[f"CUT {message}"] == 1
    machine.teardown()
    assert {row.status for row in system.seen.rows.values()} == {Status.COMPLETED}


@pytest.mark.parametrize("heard", [False, True])
@pytest.mark.parametrize("effect", [Effect.CUT, Effect.DIE])
@pytest.mark.parametrize("message", sorted({*RECOVERY} - {"lock"}))
def test_a_fault_happens_at_its_message_of_recovery(system: System, message: str, effect: Effect, heard: bool) -> None:
    """What a dead process has left is recovered, although recovery is cut off or dies at the message."""
    machine = Machine(system)
    event_id = system.new_story()
    machine.deliver(0, event_id, Plan.WORK, Fault("effect", True, Effect.DIE))
    system.happened.clear()
    for _ in range(2):  # its lease is over, then it is due; its marker is there
        machine.recover(7200.0, (0,), (Plan.WORK, Fault(message, heard, effect)))
    assert system.happened[f"{effect.name} {message}"] >= 1
    machine.teardown()
    assert system.seen.rows[event_id].status is Status.COMPLETED


def test_a_batch_goes_on_without_redis(system: System) -> None:
    """Its events were claimed: when it fails, each goes alone, although the process cannot reach Redis any more."""
    machine = Machine(system)
    first, second = (system.new_story(BATCH_TYPE) for _ in range(2))
    machine.deliver_together(0, [first, second], frozenset([first, second]), Plan.HOLD, None)
    machine.act(lambda: system.awake(0).reach("redis", again=False))
    machine.release(machine.held[0], Plan.FAIL)
    machine.settle()
    assert all(system.stories[each].started & system.stories[each].batched for each in (first, second))
    machine.teardown()
    assert {row.status for row in system.seen.rows.values()} == {Status.COMPLETED}


# The same of three events of a batch handler, of which the first may fail; what the others come to. Those that go alone
# afterwards may be released: they wait for each other, in real time.
BATCHES = [
    ("hold", True, Plan.WORK, {Status.PENDING}),
    ("mark", True, Plan.WORK, {Status.COMPLETED, Status.PENDING}),
    ("commit", False, Plan.WORK, {Status.COMPLETED, Status.PENDING}),
    ("commit", True, Plan.WORK, {Status.COMPLETED}),
    ("renew", False, Plan.FAIL, {Status.PENDING}),
    ("fail", False, Plan.FAIL, {Status.COMPLETED, Status.PENDING}),
]


@pytest.mark.parametrize(("message", "heard", "plan", "statuses"), BATCHES)
def test_a_batch_loses_a_connection_at_its_message(
    system: System, message: str, heard: bool, plan: Plan, statuses: set[Status]
) -> None:
    """Of all events of the batch only the one that fails is charged, and in the end each is completed once."""
    machine = Machine(system)
    system.happened.clear()
    first, *others = (system.new_story(BATCH_TYPE) for _ in range(3))
    guilty = frozenset([first]) if plan is Plan.FAIL else frozenset()
    machine.deliver_together(0, [first, *others], guilty, plan, Fault(message, heard, Effect.CUT))
    assert system.happened[f"CUT {message}"] == 1
    for event_id in others:
        row = system.seen.rows[event_id]
        assert row.status in statuses
        assert (row.failures, row.abandoned) == (0, 0)
        assert system.stories[event_id].batched == ({1} if message != "hold" else set())
    machine.teardown()
    assert {row.status for row in system.seen.rows.values()} == {Status.COMPLETED}


def test_what_a_dead_process_had_locked_settles_after_all(system: System) -> None:
    """Both processes have left the event out, because its lock was held: with the lock, that ends too."""
    machine = Machine(system)
    event_id = system.new_story()
    machine.deliver(0, event_id, Plan.WORK, Fault("insert", True, Effect.DIE))
    for _ in range(2):  # its lease is over, then it is due
        machine.recover(7200.0, (0, 1), (Plan.WORK, None))
    assert system.seen.rows[event_id].status is Status.PENDING
    machine.teardown()
    assert system.seen.rows[event_id].status is Status.COMPLETED


def test_a_batch_event_that_goes_alone_at_once_is_at_rest_while_it_is_held(system: System) -> None:
    """It runs in the task of its claim: a step ends while its handler is held, as while a batch is."""
    machine = Machine(system)
    event_id = system.new_story(BATCH_TYPE)
    machine.deliver(0, event_id, Plan.WORK, Fault("hold", False, Effect.DIE))
    machine.recover(7200.0, (0,), (Plan.WORK, None))
    machine.run(system.expire_locks())
    machine.recover(7200.0, (0,), (Plan.HOLD, None))
    [run] = machine.held
    assert (run.event_id, run.together, system.seen.rows[event_id].abandoned) == (event_id, 1, 1)
    machine.teardown()
    assert system.seen.rows[event_id].status is Status.COMPLETED
