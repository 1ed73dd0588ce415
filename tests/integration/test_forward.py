"""Forwarding on real stores and over real HTTP: what each answer of a target means, and that no event is lost."""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from firstclaim.handlers import forward
from firstclaim.handlers.forward import breaker
from firstclaim.handlers.forward import delivery as forwarding
from firstclaim.outcome import Kind
from firstclaim.registry import Registry
from firstclaim.settings import Settings
from firstclaim.status import Status
from tests.canaries import STORY, assert_silent
from tests.forward_target import (
    ENDLESS,
    FROZEN,
    OK,
    SECRET,
    SILENT,
    SLOW_HEAD,
    ForwardTarget,
    Received,
    status,
    targets_file,
)
from tests.integration.conftest import MakeWorld
from tests.integration.world import World, delivery, until

DEADLINE_SECONDS = 30.0
Start = Callable[..., Awaitable[World]]


@pytest.fixture
async def target() -> AsyncIterator[ForwardTarget]:
    """A target that takes everything."""
    async with ForwardTarget().listening() as target:
        yield target


@pytest.fixture
async def start(make_world: MakeWorld, tmp_path: Path, target: ForwardTarget) -> AsyncIterator[Start]:
    """Starts a process that forwards to these targets; without any, to `target`."""
    started: list[World] = []

    async def process(*targets: dict[str, Any], **changes: Any) -> World:
        path = targets_file(tmp_path / "targets.toml", *(targets or ({"name": "crm", "url": target.url},)))
        settings = Settings.model_construct(forward_targets=path, handler_deadline_seconds=DEADLINE_SECONDS)
        Registry.load([forward.__name__], settings)
        declared = vars(forward)["__firstclaim_handlers__"]
        started.append(await make_world(declared=declared, handler_deadline_seconds=DEADLINE_SECONDS, **changes))
        return started[-1]

    yield process
    for world in started:
        await world.database.execute("DELETE FROM firstclaim.operator_pauses; DELETE FROM firstclaim.operator_actions")


async def recovered(world: World, *event_ids: str, seconds: float = 20) -> None:
    """Rounds of recovery, until these events are completed."""

    async def completed() -> bool:
        survey = await world.ledger.survey()
        world.pipeline.pause(survey)
        await world.pipeline.recover(survey)
        left = await world.database.fetchval(
            "SELECT count(*) FROM firstclaim.stripe_events WHERE event_id = ANY($1) AND status <> 'completed'",
            event_ids,
        )
        return bool(left == 0)

    await until(completed, seconds)


# -- a target that takes it ---------------------------------------------------------------------------


async def test_the_signed_bytes_arrive(start: Start, target: ForwardTarget) -> None:
    """The target gets the very bytes, both signatures and the event's id; the event is completed."""
    world = await start()
    given = delivery("evt_1", "invoice.paid")
    result = await world.pipeline.deliver(given)
    assert (result.kind, result.action) == (Kind.PROCESSED, "forwarded")
    [received] = target.received
    assert received.body == given.body
    received.check(SECRET)
    assert received.event_id == "evt_1"
    assert received.path == "/hooks/c4n4rypath"
    assert received.headers["content-type"] == "application/json; charset=utf-8"
    assert await world.status("evt_1") is Status.COMPLETED


async def test_several_targets_fail_for_themselves(start: Start, target: ForwardTarget) -> None:
    """Each target has a row, attempts and an outcome of its own, and gets what its types cover."""
    async with ForwardTarget().listening() as other:
        broken = [status(500)]
        other.respond = lambda _: broken.pop() if broken else OK
        world = await start(
            {"name": "all", "url": target.url, "types": ["*"]},
            {"name": "crm", "url": other.url, "types": ["invoice.paid"]},
            backoff_first_seconds=0.01,
        )
        assert (await world.pipeline.deliver(delivery("evt_1", "invoice.paid"))).action == "fanned_out"
        assert (await world.pipeline.deliver(delivery("evt_2", "charge.refunded"))).action == "forwarded"
        rows = await world.database.fetch(
            "SELECT event_id, type FROM firstclaim.stripe_events WHERE type LIKE 'handler:%'"
        )
        assert {row["type"] for row in rows} == {"handler:forward:all", "handler:forward:crm"}
        await recovered(world, *(row["event_id"] for row in rows))
        assert [each.event_id for each in target.received].count("evt_1") == 1
        assert target.ids == {"evt_1", "evt_2"}
        assert [each.event_id for each in other.received] == ["evt_1", "evt_1"]
        for each in (*target.received, *other.received):
            each.check()


async def test_no_more_at_once_than_it_is_asked_for(start: Start, target: ForwardTarget) -> None:
    """`concurrency` limits the requests to a target; the others wait."""
    world = await start({"name": "crm", "url": target.url, "concurrency": 2}, handler_slots=8)
    target.hold = asyncio.Event()
    work = [asyncio.create_task(world.pipeline.deliver(delivery(f"evt_{n}", "invoice.paid"))) for n in range(8)]

    async def two() -> bool:
        return target.at_once == 2

    await until(two)
    target.hold.set()
    assert {(await each).kind for each in work} <= {Kind.PROCESSED, Kind.DEFERRED}
    await recovered(world, *(f"evt_{n}" for n in range(8)))
    assert target.at_once_most == 2


# -- a target that does not ---------------------------------------------------------------------------


NOT_TAKEN = {
    "500": (status(500, STORY.encode()), "TargetFailed: crm answered 500: "),
    "404": (status(404, b"no \x1b[31m\nroute"), "TargetFailed: crm answered 404: no [31m route"),
    "503": (status(503), "TargetFailed: crm answered 503"),
    "redirect": (status(307, b"", "Location: http://127.0.0.1:9/\r\n"), "TargetFailed: crm answered 307"),
    "silent": (SILENT, "TargetFailed: crm gave no answer: RemoteProtocolError"),
    "garbage": (b"\x00\xffgarbage\r\n\r\n", "TargetFailed: crm gave no answer: RemoteProtocolError"),
    "frozen": (FROZEN, "TargetFailed: crm did not answer within 0.3 s"),
    "slow head": (SLOW_HEAD, "TargetFailed: crm "),
    "gzip": (status(500, b"\x1f\x8b", "Content-Encoding: gzip\r\n"), "TargetFailed: crm answered 500"),
}


@pytest.mark.parametrize("name", NOT_TAKEN)
async def test_what_is_no_success(
    start: Start, target: ForwardTarget, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The attempt fails with a short reason, and is tried again; no address and no text of the answer is logged."""
    world = await start({"name": "crm", "url": target.url, "timeout_seconds": 0.3}, backoff_first_seconds=0.01)
    answer, reason = NOT_TAKEN[name]
    answers = [answer]
    target.respond = lambda _: answers.pop() if answers else OK
    assert (await world.pipeline.deliver(delivery("evt_1", "invoice.paid"))).kind is Kind.FAILED
    row = await world.row("evt_1")
    assert (row["status"], row["failures"]) == (Status.FAILED, 1)
    assert row["last_error"].startswith(reason)
    assert len(row["last_error"]) < 200
    printed = "".join(capsys.readouterr())
    assert_silent(printed)
    for text in ("127.0.0.1", "c4n4rypath", SECRET, "garbage"):
        assert text not in printed
        assert text not in row["last_error"]
    await recovered(world, "evt_1")
    assert target.ids == {"evt_1"}


async def test_a_body_without_an_end_is_a_success(start: Start, target: ForwardTarget) -> None:
    """The head of a 2xx has said it; the rest is not waited for."""
    world = await start()
    target.respond = lambda _: ENDLESS
    assert (await world.pipeline.deliver(delivery("evt_1", "invoice.paid"))).kind is Kind.PROCESSED


@pytest.mark.parametrize(("number", "kind"), [(200, Kind.PROCESSED), (500, Kind.FAILED)])
async def test_a_body_that_stalls_ends_at_the_time_limit(
    start: Start, target: ForwardTarget, monkeypatch: pytest.MonkeyPatch, number: int, kind: Kind
) -> None:
    """The time limit is that of head and body together, and what the head has said stands."""
    monkeypatch.setattr(forwarding, "_DRAIN_SECONDS", 3600.0)
    world = await start({"name": "crm", "url": target.url, "timeout_seconds": 0.3})
    target.respond = lambda _: f"HTTP/1.1 {number} Reason\r\nContent-Length: 10\r\n\r\nhalf".encode()
    async with asyncio.timeout(20):
        assert (await world.pipeline.deliver(delivery("evt_1", "invoice.paid"))).kind is kind
    error = None if kind is Kind.PROCESSED else "TargetFailed: crm answered 500: half"
    assert (await world.row("evt_1"))["last_error"] == error


@pytest.mark.parametrize(
    ("origin", "cause"), [("http://127.0.0.1:9", "ConnectionRefusedError"), ("http://nobody.invalid", "gaierror")]
)
async def test_a_target_that_nobody_serves(start: Start, origin: str, cause: str) -> None:
    """It is a failure like any other, and says whether it was the name or the connection."""
    world = await start({"name": "crm", "url": f"{origin}/c4n4rypath"})
    assert (await world.pipeline.deliver(delivery("evt_1", "invoice.paid"))).kind is Kind.FAILED
    assert (await world.row("evt_1"))["last_error"] == f"TargetFailed: crm gave no answer: {cause}"


@pytest.mark.parametrize("number", [429, 503])
async def test_a_pause_that_a_target_asks_for(start: Start, target: ForwardTarget, number: int) -> None:
    """The event is due then; until then no other one is tried, and each of them is still there."""
    world = await start()
    target.respond = lambda _: status(number, b"", "Retry-After: 40\r\n")
    assert (await world.pipeline.deliver(delivery("evt_1", "invoice.paid"))).kind is Kind.FAILED
    assert 38 < (await world.row("evt_1"))["due_in"] <= 40
    assert (await world.pipeline.deliver(delivery("evt_2", "invoice.paid"))).kind is Kind.FAILED
    assert target.ids == {"evt_1"}
    row = await world.row("evt_2")
    assert (row["status"], row["last_error"]) == (
        Status.FAILED,
        "Retry: crm fails, or has asked for a pause: not tried",
    )


@pytest.mark.parametrize(
    ("number", "asked"), [(429, "0"), (503, "0"), (503, "Wed, 21 Oct 2015 07:28:00 GMT"), (503, "-1"), (503, "soon")]
)
async def test_a_pause_that_names_no_time_to_come(
    start: Start, target: ForwardTarget, monkeypatch: pytest.MonkeyPatch, number: int, asked: str
) -> None:
    """It is a failure like any other: tried again after the backoff, and the breaker counts it."""
    monkeypatch.setattr(breaker, "_FIRST_PAUSE_SECONDS", 60.0)
    world = await start()
    target.respond = lambda _: status(number, b"", f"Retry-After: {asked}\r\n")
    assert (await world.pipeline.deliver(delivery("evt_1", "invoice.paid"))).kind is Kind.FAILED
    row = await world.row("evt_1")
    assert row["last_error"] == f"TargetFailed: crm answered {number}"
    assert row["due_in"] > 1
    for other in range(2, 8):
        await world.pipeline.deliver(delivery(f"evt_{other}", "invoice.paid"))
    assert len(target.received) == 5


async def test_a_target_that_is_gone_pauses_its_type(start: Start, target: ForwardTarget) -> None:
    """410: the event is not completed and not charged, its type is paused, and what comes later waits too."""
    world = await start()
    target.respond = lambda _: status(410)
    result = await world.pipeline.deliver(delivery("evt_1", "invoice.paid"))
    assert (result.kind, result.reason) == (Kind.DEFERRED, "Recorded; dispatched when its type is no longer paused")
    row = await world.row("evt_1")
    assert (row["status"], row["failures"]) == (Status.PENDING, 0)
    paused = await world.database.fetch("SELECT pattern, operator FROM firstclaim.operator_pauses")
    assert [tuple(each) for each in paused] == [("invoice.paid", "handler forward:crm")]
    audit = await world.database.fetch("SELECT operator, action, selection, changed FROM firstclaim.operator_actions")
    assert [tuple(each) for each in audit] == [("handler forward:crm", "pause", "invoice.paid", 1)]
    world.pipeline.pause(await world.ledger.survey())
    assert (await world.pipeline.deliver(delivery("evt_2", "invoice.paid"))).kind is Kind.DEFERRED
    assert target.ids == {"evt_1"}
    target.respond = lambda _: OK
    assert (await world.pipeline.deliver(delivery("evt_3", "charge.refunded"))).kind is Kind.PROCESSED
    await world.database.execute("DELETE FROM firstclaim.operator_pauses")
    await world.change("evt_1", due_at=-1)
    await recovered(world, "evt_1", "evt_2")


async def test_one_of_several_targets_that_is_gone(start: Start, target: ForwardTarget) -> None:
    """It alone is paused: the other target goes on to get the same types."""
    async with ForwardTarget(lambda _: status(410)).listening() as gone:
        world = await start(
            {"name": "crm", "url": target.url},
            {"name": "old", "url": gone.url},
        )
        await world.pipeline.deliver(delivery("evt_1", "invoice.paid"))

        async def paused() -> bool:
            await world.pipeline.recover(await world.ledger.survey())
            found = await world.database.fetch("SELECT pattern FROM firstclaim.operator_pauses")
            return [str(row["pattern"]) for row in found] == ["handler:forward:old"] and target.ids == {"evt_1"}

        await until(paused)
        world.pipeline.pause(await world.ledger.survey())
        await world.pipeline.deliver(delivery("evt_2", "invoice.paid"))

        async def forwarded() -> bool:
            await world.pipeline.recover(await world.ledger.survey())
            return target.ids == {"evt_1", "evt_2"}

        await until(forwarded)
        assert gone.ids == {"evt_1"}


# -- the breaker --------------------------------------------------------------------------------------


async def test_an_outage_costs_a_few_requests(
    start: Start, target: ForwardTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After five failures the target is left alone: the other events fail at once, and wait in the ledger."""
    monkeypatch.setattr(breaker, "_FIRST_PAUSE_SECONDS", 60.0)
    world = await start()
    target.respond = lambda _: status(502)
    for number in range(20):
        assert (await world.pipeline.deliver(delivery(f"evt_{number}", "invoice.paid"))).kind is Kind.FAILED
    assert len(target.received) == 5
    waiting = await world.database.fetchval("SELECT count(*) FROM firstclaim.stripe_events WHERE status = 'failed'")
    assert waiting == 20


async def test_an_outage_is_logged_once(start: Start, target: ForwardTarget) -> None:
    """Eight requests fail together: one line says so, and one that the target is back."""
    world = await start({"name": "crm", "url": target.url, "timeout_seconds": 20}, handler_slots=8)
    target.respond = lambda _: status(502)
    target.hold = asyncio.Event()
    with capture_logs() as logged:
        work = [asyncio.create_task(world.pipeline.deliver(delivery(f"evt_{n}", "invoice.paid"))) for n in range(8)]

        async def all_at_once() -> bool:
            return target.at_once == 8

        await until(all_at_once)
        target.hold.set()
        await asyncio.gather(*work)
        target.respond = lambda _: OK
        await recovered(world, "evt_0")
    changes = [line["event"] for line in logged if line["event"].startswith("forward_target")]
    assert changes == ["forward_target_failing", "forward_target_back"]


async def test_1200_events_of_a_target_that_fails_part_of_the_time(
    start: Start, target: ForwardTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It errs, is silent, hangs up, limits the rate and loses answers: each of 1,200 events arrives, under its id."""
    world = await start(
        {"name": "crm", "url": target.url, "timeout_seconds": 0.2},
        backoff_first_seconds=0.02,
        backoff_most_seconds=0.2,
        handler_slots=8,
    )
    monkeypatch.setattr(breaker, "_FIRST_PAUSE_SECONDS", 0.02)
    monkeypatch.setattr(breaker, "_LONGEST_PAUSE_SECONDS", 0.04)
    choice = random.Random(7)
    answers = {"taken": 0}

    def respond(_: Received) -> bytes:
        if len(target.received) % 200 < 15:  # an outage: so many requests in a row
            return choice.choice((status(500), status(503), SILENT))
        if choice.random() < 0.03:
            return choice.choice((status(500), status(429, b"", "Retry-After: 0\r\n"), SILENT, FROZEN))
        answers["taken"] += 1
        return OK

    target.respond = respond
    ids = [f"evt_{number:04}" for number in range(1200)]
    for first in range(0, 1200, 100):
        events = [delivery(event_id, "invoice.paid") for event_id in ids[first : first + 100]]
        await asyncio.gather(*(world.pipeline.deliver(each) for each in events))
    await recovered(world, *ids, seconds=90)
    assert target.ids == set(ids)
    assert len(target.ids) == 1200
    assert answers["taken"] >= 1200  # a SILENT one may have been taken too: the target dedupes by webhook-id
    counts = await world.database.fetch("SELECT status, count(*) FROM firstclaim.stripe_events GROUP BY 1")
    assert [tuple(row) for row in counts] == [("completed", 1200)]
