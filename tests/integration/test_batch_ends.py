"""Batches that do not end by themselves: threads that hang, exits and stops. And the spans of batches."""

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from sqlalchemy import text
from starlette.applications import Starlette
from starlette.routing import Route

from firstclaim import BatchContext, Event
from firstclaim.event import Delivery
from firstclaim.inbox.claim import Claim
from firstclaim.inbox.claims import Claims
from firstclaim.inbox.due import Survey
from firstclaim.inbox.lanes import MAX_EVENTS, MAX_LANES
from firstclaim.inbox.ledger import Ledger
from firstclaim.inbox.pipeline import Pipeline
from firstclaim.inbox.slots import Place
from firstclaim.observability import metrics, tracing
from firstclaim.outcome import Kind, Outcome
from firstclaim.shutdown import Shutdown
from firstclaim.status import Status
from firstclaim.web.health import Liveness
from firstclaim.web.readiness_checks import readiness_checks
from tests.integration.conftest import MakeWorld
from tests.integration.test_batches import Recorder, deliver, deliveries, ids, lanes, poisoned, waiting_for
from tests.integration.world import World, delivery, effects, until

DEADLINE_SECONDS = 0.2


# -- threads that ignore their deadline ---------------------------------------------------------------


class Hanging:
    """A sync batch handler that hangs on the events of `poison` until `finish` is set."""

    def __init__(self) -> None:
        self.poison: set[str] = set()
        self.finish = threading.Event()
        self.sizes: list[int] = []

    def handle(self, events: list[Event], context: BatchContext) -> None:
        self.sizes.append(len(events))
        for event in events:
            context.execute(
                text(
                    "INSERT INTO effects (event_id, attempt, pid, xid) VALUES (:id, 1, 0, pg_current_xact_id()::text)"
                ),
                {"id": event.id},
            )
        if self.poison & {event.id for event in events}:
            self.finish.wait(60)


@pytest.fixture
def hanging() -> Iterator[Hanging]:
    handler = Hanging()
    yield handler
    handler.finish.set()


async def recovered(world: World) -> None:
    """A round of recovery, and all that it has started."""
    await world.pipeline.recover()
    while world.pipeline._work.tasks:
        await asyncio.wait(world.pipeline._work.tasks)


async def livez(world: World) -> int:
    app = Starlette(routes=[Route("/livez", Liveness(world.slots).report)])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as client:
        return (await client.get("/livez")).status_code


async def handlers_are(world: World) -> str | None:
    """What readiness says about the handlers."""
    shutdown = Shutdown(drain_seconds=60, shutdown_seconds=90)
    parts = world.components
    *_, handlers = readiness_checks(shutdown, parts.lock, parts.ingest, parts.recovery, parts.slots)
    finding, _ = await handlers.run()
    return finding.detail


async def no_thread_hangs(world: World) -> bool:
    return not world.slots.hung


async def test_an_event_that_hangs_its_batch_is_charged_alone(make_world: MakeWorld, hanging: Hanging) -> None:
    """The thread of the batch is counted, and that of the event alone: this one is charged, and not tried again here.

    The others of the batch are processed at their first attempt. Once the threads have ended, the event is tried again.
    """
    counted = metrics.hung_handlers._value.get()
    world = await make_world(
        batch_handlers={"*": hanging.handle}, handler_slots=4, handler_deadline_seconds=DEADLINE_SECONDS
    )
    given = deliveries(3)
    poison = ids(given)[1]
    hanging.poison.add(poison)
    outcomes = await deliver(world, given)
    assert [each.kind for each in outcomes] == [Kind.PROCESSED, Kind.FAILED, Kind.PROCESSED]
    assert hanging.sizes == [3, 1, 1, 1]
    for event_id in ids(given):
        row = await world.row(event_id)
        charged = (row["status"], row["failures"], row["abandoned"])
        assert charged == (("pending", 0, 1) if event_id == poison else ("completed", 0, 0))
        assert await world.effects(event_id) == (0 if event_id == poison else 1)
    assert len(world.slots.hung) == metrics.hung_handlers._value.get() - counted == 2
    assert poison in world.slots.hung
    assert await livez(world) == 200
    assert f"{poison})" in (await handlers_are(world) or "").replace(",", ")")

    await world.change(poison, due_at=-1.0)
    assert (await world.pipeline.deliver(given[1])).kind is Kind.DEFERRED
    await recovered(world)
    assert (await world.row(poison))["attempt"] == 1, "not tried again beside its thread"
    hanging.finish.set()
    await until(lambda: no_thread_hangs(world))
    await recovered(world)
    row = await world.row(poison)
    assert (row["status"], row["attempt"], await world.effects(poison)) == ("completed", 2, 1)


async def test_a_batch_that_hangs_the_last_slot(make_world: MakeWorld, hanging: Hanging) -> None:
    """Nobody is charged: no event has run alone. The process fails its liveness, because only a restart helps."""
    world = await make_world(
        batch_handlers={"*": hanging.handle},
        handler_slots=1,
        handler_deadline_seconds=DEADLINE_SECONDS,
        lease_seconds=1.0,
    )
    given = deliveries(2)
    hanging.poison.update(ids(given))
    outcomes = await deliver(world, given)
    assert {each.kind for each in outcomes} == {Kind.DEFERRED}
    assert hanging.sizes == [2]
    for event_id in ids(given):
        row = await world.row(event_id)
        assert (row["status"], row["failures"], row["abandoned"]) == ("pending", 0, 0)
    assert await livez(world) == 503
    assert "and its batch): restart" in (await handlers_are(world) or "")
    await world.pipeline.recover()
    assert {(await world.row(event_id))["attempt"] for event_id in ids(given)} == {1}, "not claimed in vain"
    hanging.finish.set()
    await until(lambda: no_thread_hangs(world))
    assert await livez(world) == 200


# -- lanes that are full ------------------------------------------------------------------------------


async def test_full_lanes_do_not_make_recovery_look_in_vain(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each delivery that gets no place is recorded, and none of them wakes recovery before there is one."""
    world = await make_world(batch_handlers={"*": effects}, recovery_interval_seconds=60.0)
    looks: list[int] = []
    recover = Pipeline.recover

    async def counted(pipeline: Pipeline, survey: Survey) -> bool:
        more = await recover(pipeline, survey)
        looks.append(1)
        return more

    monkeypatch.setattr(Pipeline, "recover", counted)
    reserved = [Place(lanes(world).places, for_delivery=True) for _ in range(MAX_LANES * MAX_EVENTS)]
    recovering = asyncio.create_task(world.components.recovery.run())

    async def looked() -> bool:
        return bool(looks)

    await until(looked)
    given = deliveries(20)
    for each in given:
        assert (await world.pipeline.deliver(each)).kind is Kind.DEFERRED
    assert len(looks) == 1
    for place in reserved:
        place.release()

    async def completed() -> bool:
        return {await world.status(event_id) for event_id in ids(given)} == {Status.COMPLETED}

    await until(completed)
    recovering.cancel()
    await asyncio.wait({recovering})


# -- exits and stops ----------------------------------------------------------------------------------


async def test_an_exit_releases_what_waits_for_a_lane(make_world: MakeWorld) -> None:
    """The batch that runs may have ended the process, and is charged later; what waits for a lane is not charged."""
    opened = asyncio.Event()
    seen = Recorder(waiting_for(opened))
    world = await make_world(batch_handlers={"*": seen.handler}, handler_slots=1)
    given, late = deliveries(2), deliveries(3)
    running = [asyncio.create_task(world.pipeline.deliver(each)) for each in given]

    async def began() -> bool:
        return bool(seen.batches)

    await until(began)
    running += [asyncio.create_task(world.pipeline.deliver(each)) for each in late]

    async def gathered() -> bool:
        return len(world.pipeline.unstarted) == len(late)

    await until(gathered)
    claims = world.pipeline.unstarted
    assert sorted(claim.event_id for claim in claims) == sorted(ids(late))
    await world.pipeline.release_unstarted(claims)
    for event_id in ids(late):
        row = await world.row(event_id)
        assert (row["status"], row["failures"], row["abandoned"]) == ("pending", 0, 0)
        assert await world.value(event_id) is None  # its lock is released too
    assert {await world.status(event_id) for event_id in ids(given)} == {Status.PROCESSING}
    opened.set()
    await asyncio.gather(*running)
    assert {await world.status(event_id) for event_id in ids(late)} == {Status.PENDING}


async def handles(event: Event, context: Any) -> None:
    """An ordinary handler that does nothing."""


@pytest.mark.parametrize("batch", [False, True], ids=["ordinary", "batch"])
async def test_a_claim_that_a_stop_overtakes_is_released(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch, batch: bool
) -> None:
    """Inserted while the drain ends: the row is ours, and is released, although nothing was dispatched by then."""
    inserted, answered = asyncio.Event(), asyncio.Event()
    claim = Ledger.claim

    async def slow(ledger: Ledger, given: Delivery) -> Any:
        made = await claim(ledger, given)
        inserted.set()
        await answered.wait()
        return made

    monkeypatch.setattr(Ledger, "claim", slow)
    world = await make_world(**{"batch_handlers" if batch else "handlers": {"*": effects if batch else handles}})
    given = delivery()
    delivering = asyncio.create_task(world.pipeline.deliver(given))
    await inserted.wait()
    await released_by_a_stop(world, given, answered)
    assert (await delivering).kind is Kind.DEFERRED


async def test_a_take_over_that_a_stop_overtakes_is_released(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same of what recovery claims while the drain ends."""
    taken, answered = asyncio.Event(), asyncio.Event()
    take_over = Ledger.take_over

    async def slow(ledger: Ledger, event_ids: list[str]) -> list[Claim]:
        claims = await take_over(ledger, event_ids)
        taken.set()
        await answered.wait()
        return claims

    world = await make_world(batch_handlers={"*": effects})
    given = await world.state_of(delivery(), Status.PENDING)
    monkeypatch.setattr(Ledger, "take_over", slow)
    recovering = asyncio.create_task(world.pipeline.recover())
    await taken.wait()
    await released_by_a_stop(world, given, answered)
    await recovering


async def released_by_a_stop(world: World, given: Delivery, answered: asyncio.Event) -> None:
    """Stop without time to finish; the claim is answered once everything else has been cancelled."""
    draining = asyncio.create_task(world.pipeline.drain(0))

    async def releasing() -> bool:
        return world.pipeline._work.releasing

    await until(releasing)
    answered.set()
    await draining
    row = await world.row(given.event.id)
    assert (row["status"], row["failures"], row["abandoned"]) == ("pending", 0, 0)
    assert row["due_in"] <= 0
    assert await world.value(given.event.id) is None
    assert await world.effects(given.event.id) == 0


@pytest.mark.parametrize("batch", [False, True], ids=["ordinary", "batch"])
async def test_a_claim_whose_task_has_not_begun_is_released(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch, batch: bool
) -> None:
    """The time of a drain is over in the same turn of the loop in which recovery starts what it has claimed."""
    taken = asyncio.Event()
    recover = Claims.recover

    async def slow(claims: Claims, event_ids: list[str]) -> Any:
        made = await recover(claims, event_ids)
        taken.set()
        await asyncio.sleep(0.05)
        return made

    monkeypatch.setattr(Claims, "recover", slow)
    world = await make_world(**{"batch_handlers" if batch else "handlers": {"*": effects if batch else handles}})
    given = await world.state_of(delivery(), Status.PENDING)
    recovering = asyncio.create_task(world.pipeline.recover())
    await taken.wait()
    asyncio.get_running_loop().call_later(0.01, time.sleep, 0.3)  # both timers are due after it
    await world.pipeline.drain(0.1)
    await recovering
    row = await world.row(given.event.id)
    assert (row["status"], row["failures"], row["abandoned"]) == ("pending", 0, 0)
    assert await world.effects(given.event.id) == 0


async def test_an_event_that_is_about_to_go_alone_is_released(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time of a drain is over in the turn of the loop in which the events of a failed batch are to go alone."""
    mark = Claims.mark

    async def slow(claims: Claims, marked: list[Claim]) -> None:
        await mark(claims, marked)
        if not failed.is_set():
            failed.set()
            await asyncio.sleep(0.05)

    failed = asyncio.Event()
    given = [delivery() for _ in range(3)]
    seen = Recorder(poisoned([given[0].event.id], ValueError))
    world = await make_world(batch_handlers={"*": seen.handler})
    monkeypatch.setattr(Claims, "mark", slow)
    delivering = asyncio.create_task(deliver(world, given))
    await failed.wait()
    asyncio.get_running_loop().call_later(0.01, time.sleep, 0.3)
    await world.pipeline.drain(0.1)
    await delivering
    assert seen.sizes == [3]
    for event_id in ids(given):
        row = await world.row(event_id)
        assert (row["status"], row["failures"], row["abandoned"]) == ("pending", 0, 0)


async def test_a_stop_during_the_release_of_what_has_waited(make_world: MakeWorld) -> None:
    """A drain that is over while the release waits for a connection: it is not cancelled, as nobody would repeat it."""
    opened = asyncio.Event()

    async def work(events: list[Event], context: BatchContext) -> None:
        await opened.wait()

    seen = Recorder(work)
    world = await make_world(batch_handlers={"*": seen.handler}, lease_seconds=1.0)
    running = []
    for count in range(1, MAX_LANES + 1):
        running.append(asyncio.create_task(world.pipeline.deliver(delivery())))
        await until(lambda count=count: _has_begun(seen, count))  # type: ignore[misc]
    late = delivery()
    running.append(asyncio.create_task(world.pipeline.deliver(late)))

    async def waits() -> bool:
        return bool(lanes(world)._waiting)

    async def expired() -> bool:
        return not lanes(world)._waiting

    await until(waits)
    async with AsyncExitStack() as busy:
        for _ in range(4):
            await busy.enter_async_context(world.components.ingest.acquire(5))
        await until(expired)
        await asyncio.sleep(0.05)
        draining = asyncio.create_task(world.pipeline.drain(0))
        await asyncio.sleep(0.1)
    await draining
    await asyncio.gather(*running)
    row = await world.row(late.event.id)
    assert (row["status"], row["abandoned"]) == ("pending", 0)


async def _has_begun(seen: Recorder, count: int) -> bool:
    return len(seen.batches) == count


# -- spans --------------------------------------------------------------------------------------------


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """What is exported."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing, "_tracer", provider.get_tracer("test"))
    yield exporter
    provider.shutdown()


async def traced(world: World, given: list[Delivery]) -> list[Outcome]:
    """Deliver them at once, each in a span of its own."""

    async def one(each: Delivery) -> Outcome:
        with tracing.span("delivery", event_id=each.event.id):
            return await world.pipeline.deliver(each)

    return list(await asyncio.gather(*map(one, given)))


def named(spans: InMemorySpanExporter, name: str) -> list[ReadableSpan]:
    return [span for span in spans.get_finished_spans() if span.name == f"firstclaim.{name}"]


def span_ids(spans: list[ReadableSpan]) -> list[int]:
    return sorted(span.context.span_id for span in spans)


async def test_a_batch_links_to_its_deliveries(make_world: MakeWorld, spans: InMemorySpanExporter) -> None:
    """It belongs to all of them alike: a trace of its own, with a link to each. The handler's span is its child."""
    world = await make_world(batch_handlers={"*": effects})
    assert {each.kind for each in await traced(world, deliveries(3))} == {Kind.PROCESSED}
    [batch], [handler] = named(spans, "batch"), named(spans, "handler")
    assert batch.parent is None
    assert sorted(link.context.span_id for link in batch.links) == span_ids(named(spans, "delivery"))
    assert handler.parent is not None
    assert handler.parent.span_id == batch.context.span_id
    assert dict(batch.attributes or {}) == {"firstclaim.events": 3}


async def test_an_event_that_goes_alone_is_in_its_deliverys_trace(
    make_world: MakeWorld, spans: InMemorySpanExporter
) -> None:
    """Alone from the start, or after its batch has failed: its attempt is a child of its delivery."""
    poison: list[str] = []
    world = await make_world(batch_handlers={"*": poisoned(poison, ValueError)})
    await traced(world, deliveries(1))
    [delivered], [attempt] = named(spans, "delivery"), named(spans, "attempt")
    assert attempt.parent is not None
    assert attempt.parent.span_id == delivered.context.span_id

    spans.clear()
    given = deliveries(3)
    poison.append(ids(given)[0])
    await traced(world, given)
    parents = [attempt.parent.span_id for attempt in named(spans, "attempt") if attempt.parent is not None]
    assert sorted(parents) == span_ids(named(spans, "delivery"))
    [batch] = named(spans, "batch")
    assert batch.status.description == "ValueError"
    assert lanes(world).unstarted == []
