"""What is counted of each handler, on real stores: an outcome for each event, the time it took, and its slots."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
from structlog.testing import capture_logs

from firstclaim import BatchContext, Context, Event, Permanent, Retry
from firstclaim.observability.handler_metrics import AttemptOutcome
from firstclaim.observability.metrics import REGISTRY
from firstclaim.outcome import Kind
from firstclaim.postgres.handler_connections import HandlerConnection
from firstclaim.postgres.statement import Statement
from tests.integration.conftest import MakeWorld
from tests.integration.world import World, delivery, effect, effects, until

Counts = dict[tuple[str, ...], float]


def counts(pattern: str = "*") -> Counts:
    """The attempts, the durations and the slots of a handler, by name and label."""
    wanted = ("firstclaim_attempts_total", "firstclaim_handler_seconds_count", "firstclaim_slots")
    return {
        (each.name.removeprefix("firstclaim_"), *(each.labels[name] for name in each.labels if name != "handler")): (
            each.value
        )
        for family in REGISTRY.collect()
        for each in family.samples
        if each.labels.get("handler") == pattern and each.name.startswith(wanted)
    }


def grown(before: Counts, pattern: str = "*") -> Counts:
    """What has changed since, without what has not."""
    now = counts(pattern)
    return {name: value - before.get(name, 0) for name, value in now.items() if value != before.get(name, 0)}


async def completes(event: Event, context: Context) -> None:
    await effect(event, context)


async def raises(_event: Event, _context: Context) -> None:
    raise ValueError


async def asks_for_a_retry(_event: Event, _context: Context) -> None:
    raise Retry(after=60)


async def asks_in_a_group(_event: Event, _context: Context) -> None:
    raise ExceptionGroup("of a TaskGroup", [ValueError(), Retry(after=60)])


async def refuses(_event: Event, _context: Context) -> None:
    raise Permanent


async def asks_after_its_own_commit(_event: Event, context: Context) -> None:
    await context.connection.exec_driver_sql("COMMIT")
    raise Retry(after=60)


@pytest.mark.parametrize(
    ("function", "outcome"),
    [
        (completes, "completed"),
        (raises, "failed"),
        (asks_for_a_retry, "retry"),
        (asks_in_a_group, "retry"),
        (refuses, "dead"),
        (asks_after_its_own_commit, "failed"),
    ],
)
async def test_an_attempt_has_one_outcome(world: World, function: Any, outcome: AttemptOutcome) -> None:
    """An attempt and its duration are counted once, under its outcome: a retry that was asked for is no failure."""
    before = counts()
    await world.dispatch(function, await world.marked())
    assert grown(before) == {("attempts_total", outcome): 1, ("handler_seconds_count", outcome): 1}


@pytest.mark.parametrize(("arrived", "outcome"), [(True, "completed"), (False, "failed")])
async def test_an_unknown_commit_is_counted_once_it_is_known(
    world: World, monkeypatch: pytest.MonkeyPatch, arrived: bool, outcome: str
) -> None:
    """Where the answer to COMMIT is lost, the attempt counts as what the ledger says of it."""
    commit = HandlerConnection.commit

    async def lost(connection: HandlerConnection, last: Statement, **values: object) -> None:
        if arrived:
            await commit(connection, last, **values)
        raise ConnectionResetError

    before = counts()
    with monkeypatch.context() as patch:
        patch.setattr(HandlerConnection, "commit", lost)
        await world.dispatch(completes, await world.marked())
    assert grown(before) == {("attempts_total", outcome): 1}


async def test_an_attempt_that_did_not_begin_is_not_counted(world: World) -> None:
    """Nothing is counted for an event that another process has taken over: no handler was called."""
    claim = await world.marked()
    await world.change(claim.event_id, attempt=2)
    before = counts()
    assert (await world.dispatch(completes, claim)).kind is Kind.DUPLICATE
    assert grown(before) == {}


async def test_each_event_of_a_batch_counts(make_world: MakeWorld) -> None:
    """Of a batch, each event is counted; one that fails is counted when it has gone alone, and only that one."""
    given = [delivery() for _ in range(5)]
    poison = given[2].event.id

    async def work(events: list[Event], context: BatchContext) -> None:
        await effects(events, context)
        if any(event.id == poison for event in events):
            raise ValueError

    world = await make_world(batch_handlers={"*": work})
    before = counts()
    await asyncio.gather(*map(world.pipeline.deliver, given))
    assert grown(before) == {
        ("attempts_total", "completed"): 4,
        ("attempts_total", "failed"): 1,
        ("handler_seconds_count", "completed"): 4,
        ("handler_seconds_count", "failed"): 2,  # the batch, and then the one that it failed of
    }


async def test_a_batch_that_completes_or_asks_for_a_retry_counts_each_event(make_world: MakeWorld) -> None:
    """One call of the handler is one duration, and an outcome for each of its events."""
    asks = [True]

    async def work(events: list[Event], context: BatchContext) -> None:
        await effects(events, context)
        if asks[0]:
            raise Retry(after=60)

    world = await make_world(batch_handlers={"*": work})
    for outcome in ("retry", "completed"):
        before = counts()
        await asyncio.gather(*(world.pipeline.deliver(delivery()) for _ in range(3)))
        assert grown(before) == {("attempts_total", outcome): 3, ("handler_seconds_count", outcome): 1}
        asks[0] = False


@pytest.mark.parametrize("abandoned", [0, 1])
async def test_a_running_handler_uses_a_slot(world: World, abandoned: int) -> None:
    """While a handler runs, it uses a slot; one whose event was abandoned before is also counted as such."""
    seen: list[Counts] = []

    async def look(_event: Event, _context: Context) -> None:
        seen.append(grown(before))

    claim = await world.marked()
    object.__setattr__(claim, "abandoned", abandoned)
    before = counts()
    await world.dispatch(look, claim)
    held: Counts = {("slots_held", "previously_abandoned"): 1} if abandoned else {}
    assert seen == [{("slots_in_use",): 1, **held}]
    assert grown(before) == {("attempts_total", "completed"): 1, ("handler_seconds_count", "completed"): 1}


async def test_a_thread_past_its_deadline_holds_a_slot(make_world: MakeWorld) -> None:
    """A thread that runs on past its deadline is counted until it ends, and its slot stays in use until then."""
    world = await make_world(handler_deadline_seconds=0.2)
    opened = threading.Event()

    def hangs(_event: Event, _context: Context) -> None:
        opened.wait()

    before = counts()
    failed: Counts = {("attempts_total", "failed"): 1, ("handler_seconds_count", "failed"): 1}
    try:
        await world.dispatch(hangs, await world.marked())
        assert grown(before) == failed | {("slots_in_use",): 1, ("slots_held", "hung_thread"): 1}
    finally:
        opened.set()

    async def freed() -> bool:
        return grown(before) == failed

    await until(freed)


@pytest.mark.parametrize(("function", "outcome"), [(completes, Kind.PROCESSED), (raises, Kind.FAILED)])
async def test_recovery_names_the_handler(make_world: MakeWorld, function: Callable[..., Any], outcome: Kind) -> None:
    """The lines `recovered` and `handler_failed` have the type of the event and the name of the handler."""
    world = await make_world({"*": function})
    await world.ledger.record(delivery(), due_in_seconds=0)
    with capture_logs() as logged:
        await world.pipeline.recover()
        await until(lambda: recovered(logged))
    named = [line for line in logged if line["event"] in ("recovered", "handler_failed")]
    assert [line["event"] for line in named] == ["handler_failed"] * (outcome is Kind.FAILED) + ["recovered"]
    assert {(line["type"], line["handler"]) for line in named} == {
        ("invoice.payment_failed", f"{__name__}.{function.__name__}")
    }


async def recovered(logged: list[Any]) -> bool:
    """Whether recovery has finished an event."""
    return any(line["event"] == "recovered" for line in logged)
