"""Notices, from a failure in the ledger to a receiver over real HTTP: what is told, how often, and what is kept."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable

import pytest
from pydantic import SecretStr
from structlog.testing import capture_logs

from firstclaim import Context, Event, Permanent, Retry
from firstclaim.backoff import Backoff
from firstclaim.notify import notifier as notifier_module
from firstclaim.notify import statements
from firstclaim.notify.notifier import Notifier
from firstclaim.notify.sender import Sender
from firstclaim.observability import metrics
from firstclaim.status import Status
from tests.canaries import STORY, assert_silent
from tests.integration.test_failure_groups import again, fail
from tests.integration.world import World, delivery, effect, explained, until
from tests.notice_receiver import SILENT, NoticeReceiver, receiving_notices, status

HERE = "tests.integration.test_notify"


async def refuses(event: Event, context: Context) -> None:
    raise Permanent(STORY)


async def refuses_too(event: Event, context: Context) -> None:
    raise Permanent(STORY)


async def declines(event: Event, context: Context) -> None:
    raise ValueError(STORY)


async def waits(event: Event, context: Context) -> None:
    raise Retry


@pytest.fixture
async def receiver() -> AsyncIterator[NoticeReceiver]:
    """Where notices go."""
    async with receiving_notices() as receiver:
        yield receiver


Make = Callable[[], Notifier]


@pytest.fixture
async def make_notifier(world: World, receiver: NoticeReceiver) -> Make:
    """Makes the notifier of one process, on a ledger from which nothing was told yet."""
    await world.database.execute("TRUNCATE firstclaim.operator_notices")
    return lambda: Notifier(world.ledger, SecretStr(receiver.url), Backoff(0.001, 0.002))


@pytest.fixture
async def notifier(make_notifier: Make) -> Notifier:
    """The notifier, which has looked at the ledger once."""
    notifier = make_notifier()
    await notifier.gather()
    return notifier


async def tell(notifier: Notifier, receiver: NoticeReceiver) -> None:
    """One round: look without delay, and send all that is due."""
    await notifier.gather(settled_seconds=0, failing_seconds=0)
    sender = Sender(receiver.url)
    try:
        while await notifier.send_next(sender):
            pass
    finally:
        await sender.close()


async def after_the_quiet(world: World) -> None:
    """Let the time go by in which nothing more is sent of the same subjects."""
    await world.database.execute(
        "UPDATE firstclaim.operator_notices SET due_at = clock_timestamp() WHERE content IS NULL"
    )


async def test_dead_events_are_told_once_for_their_group(
    world: World, notifier: Notifier, receiver: NoticeReceiver
) -> None:
    """One POST with their number, the group, and an example; nothing of a message or a payload, and no second POST."""
    event_ids = [await fail(world, refuses) for _ in range(3)]
    await tell(notifier, receiver)
    [notice] = receiver.notices
    assert (notice["kind"], notice["events"], notice["error_class"]) == ("event_dead", 3, "Permanent")
    assert (notice["handler"], notice["example_id"]) == (f"{HERE}.refuses", event_ids[-1])
    assert notice["place"].startswith("tests/integration/test_notify.py:")
    assert notice["text"].startswith(f"firstclaim: 3 events are dead in the handler {HERE}.refuses: Permanent at ")
    assert f"firstclaim events replay --group {notice['group']}" in notice["text"]
    assert_silent(str(receiver.notices) + str(await world.database.fetch("SELECT * FROM firstclaim.operator_notices")))
    assert f"idempotency-key: {notice['id']}" in receiver.requests[0].lower()
    await tell(notifier, receiver)
    await after_the_quiet(world)
    await tell(notifier, receiver)
    assert len(receiver.notices) == 1


async def test_what_follows_is_counted_and_told_after_the_quiet(
    world: World, notifier: Notifier, receiver: NoticeReceiver
) -> None:
    """For a time after a notice nothing is sent of its group; then one notice, with another id, counts the rest."""
    await fail(world, refuses)
    await tell(notifier, receiver)
    for _ in range(2):
        await fail(world, refuses)
        await tell(notifier, receiver)
    assert len(receiver.notices) == 1
    await after_the_quiet(world)
    await tell(notifier, receiver)
    first, second = receiver.notices
    assert (first["events"], second["events"]) == (1, 2)
    assert first["id"] != second["id"]


@pytest.mark.parametrize(
    "answer",
    [status(500), status(302, "Location: http://127.0.0.1:1/\r\n"), SILENT],
    ids=["refused", "redirected", "closed"],
)
async def test_what_the_receiver_does_not_take_is_sent_again(
    world: World, notifier: Notifier, receiver: NoticeReceiver, answer: bytes
) -> None:
    """The same notice under the same id; what happens meanwhile is in the next one, and a redirect is not followed."""
    await fail(world, refuses)
    receiver.answers = [answer]
    with capture_logs() as lines:
        await tell(notifier, receiver)
    [line] = [each for each in lines if each["event"] == "notify_failed"]
    assert "c4n4rypath" not in str(lines)
    assert line["notice_id"] == receiver.notices[0]["id"]
    await fail(world, refuses)

    async def told_again() -> bool:
        await tell(notifier, receiver)
        return len(receiver.notices) > 1

    await until(told_again)
    first, second = receiver.notices
    assert first == second
    await after_the_quiet(world)
    await tell(notifier, receiver)
    _, _, third = receiver.notices
    assert third["events"] == 1
    assert third["id"] != first["id"]


async def test_a_process_that_vanishes_while_it_sends_loses_nothing(
    world: World, make_notifier: Make, notifier: Notifier, receiver: NoticeReceiver
) -> None:
    """What was composed is sent by another process once its lease is over, under the same id."""
    await fail(world, refuses)
    await notifier.gather(settled_seconds=0)
    [taken] = await world.ledger.run(statements.TAKE, lease=60.0, topics=["event_dead"])
    other = make_notifier()
    await tell(other, receiver)
    assert receiver.notices == []
    await world.database.execute("UPDATE firstclaim.operator_notices SET due_at = clock_timestamp()")
    await tell(other, receiver)
    assert [each["id"] for each in receiver.notices] == [taken["notice_id"]]


async def test_many_processes_tell_it_once(
    world: World, make_notifier: Make, notifier: Notifier, receiver: NoticeReceiver
) -> None:
    """Eight that look and send at once: each event is counted once, and each group is told once."""
    for _ in range(5):
        await fail(world, refuses)
    await asyncio.gather(*(tell(make_notifier(), receiver) for _ in range(8)))
    assert [each["events"] for each in receiver.notices] == [5]


async def test_an_unreachable_receiver_does_not_fill_the_ledger(
    world: World, notifier: Notifier, receiver: NoticeReceiver
) -> None:
    """However many events die meanwhile: a row for each subject, and one request in each of its own backoffs."""
    slow = Notifier(world.ledger, SecretStr(receiver.url), Backoff(3600, 3600))
    receiver.answers = [status(503)] * 50
    for _ in range(10):
        for function in (refuses, refuses_too):
            await fail(world, function)
            await tell(slow, receiver)
    assert len(receiver.notices) == 1
    assert await world.database.fetchval("SELECT count(*) FROM firstclaim.operator_notices WHERE subject <> ''") == 2


async def test_no_more_requests_than_the_rate(
    world: World, notifier: Notifier, receiver: NoticeReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many groups at once are told up to the rate; the others wait in the ledger."""
    for number in range(25):
        await world.database.execute(
            "INSERT INTO firstclaim.operator_notices (topic, subject, events, detail, due_at) VALUES"
            ' (\'signatures\', $1, 1, \'{"kind": "signatures_refused", "reason": "x"}\', clock_timestamp())',
            str(number),
        )
    await tell(notifier, receiver)
    assert len(receiver.notices) == 20
    monkeypatch.setattr(notifier_module, "_RATE_SECONDS", 0.0)
    await tell(notifier, receiver)
    assert len(receiver.notices) == 25


async def test_topics_take_turns(world: World, notifier: Notifier, receiver: NoticeReceiver) -> None:
    """A thousand groups of dead events, all due before, hold up no notice of another topic."""
    dead = {"kind": "event_dead", "type": "x", "example_id": "evt_1"}
    refused = {"kind": "signatures_refused", "reason": "x"}
    await world.database.execute(
        """
        INSERT INTO firstclaim.operator_notices (topic, subject, events, detail, due_at)
        SELECT 'event_dead', n::text, 1, CAST($1 AS jsonb), timestamptz 'epoch' FROM generate_series(1, 1000) AS n
         UNION ALL SELECT 'signatures', '', 1, CAST($2 AS jsonb), clock_timestamp()
        """,
        json.dumps(dead),
        json.dumps(refused),
    )
    await tell(notifier, receiver)
    assert [each["kind"] for each in receiver.notices[:3]] == ["event_dead", "signatures_refused", "event_dead"]


async def test_events_that_were_dead_before_are_not_told(
    world: World, make_notifier: Make, receiver: NoticeReceiver
) -> None:
    """The first process with an address begins with what dies from then on."""
    await fail(world, refuses)
    await tell(make_notifier(), receiver)
    assert receiver.notices == []


async def test_an_event_without_a_failure_is_told_by_its_type(
    world: World, notifier: Notifier, receiver: NoticeReceiver
) -> None:
    """Dead by an operator's wish, an expired payload, or because it was abandoned too often; not if it goes on."""
    claim = await world.claim(delivery(type="invoice.paid"))
    await world.ledger.kill_if_held(claim, "its payload has expired")
    for abandoned in (0, world.settings.abandoned_most - 1):
        vanished = await world.claim(delivery(type="customer.created"))
        await world.change(vanished.event_id, due_at=-1.0, abandoned=abandoned)
    assert len(await world.ledger.return_abandoned(10)) == 2
    await tell(notifier, receiver)
    created, paid = sorted(receiver.notices, key=lambda each: str(each["type"]))
    assert (paid["type"], paid["events"], paid["example_id"]) == ("invoice.paid", 1, claim.event_id)
    assert "of no known failure" in paid["text"]  # not that none was: an older build records no group
    assert (created["type"], created["events"]) == ("customer.created", 1)
    assert "group" not in paid


async def test_a_handler_that_fails_and_recovers_is_told(
    world: World, notifier: Notifier, receiver: NoticeReceiver
) -> None:
    """Once when it begins, however often it fails, and once when no event of it waits for a retry any more."""
    event_ids = [await fail(world, declines) for _ in range(2)]
    await tell(notifier, receiver)
    [begins] = receiver.notices
    assert (begins["kind"], begins["handler"], begins["error_class"]) == (
        "handler_failing",
        f"{HERE}.declines",
        "ValueError",
    )
    assert begins["example_id"] == event_ids[0]
    assert "watched" not in begins
    await again(world, event_ids[0], declines)
    await after_the_quiet(world)
    await tell(notifier, receiver)
    assert len(receiver.notices) == 1
    await again(world, event_ids[0], effect)
    await tell(notifier, receiver)
    assert len(receiver.notices) == 1  # the other one fails still
    [claim] = await world.ledger.take_over([event_ids[1]])
    await tell(notifier, receiver)
    assert len(receiver.notices) == 1  # it is being tried
    await world.dispatch(effect, claim)
    await after_the_quiet(world)
    await tell(notifier, receiver)
    _, recovers = receiver.notices
    assert (recovers["kind"], recovers["handler"]) == ("handler_recovered", f"{HERE}.declines")
    assert recovers["first_at"] == begins["first_at"]
    await fail(world, declines)
    await after_the_quiet(world)
    await tell(notifier, receiver)
    assert receiver.notices[-1]["kind"] == "handler_failing"
    assert_silent(str(receiver.notices))


async def test_a_handler_whose_events_are_all_dead_has_not_recovered(
    world: World, notifier: Notifier, receiver: NoticeReceiver
) -> None:
    """The dead events are told, and when it fails again, that is told again."""
    event_id = await fail(world, declines)
    await tell(notifier, receiver)
    await again(world, event_id, refuses)
    await after_the_quiet(world)
    await tell(notifier, receiver)
    assert [each["kind"] for each in receiver.notices] == ["handler_failing", "event_dead"]
    await fail(world, declines)
    await after_the_quiet(world)
    await tell(notifier, receiver)
    assert receiver.notices[-1]["kind"] == "handler_failing"


async def test_a_recovery_before_its_failing_was_told_is_one_notice(
    world: World, notifier: Notifier, receiver: NoticeReceiver
) -> None:
    """The receiver was away: it learns that the handler failed, since when, and that it has recovered."""
    event_id = await fail(world, declines)
    await notifier.gather(settled_seconds=0, failing_seconds=0)
    await again(world, event_id, effect)
    await tell(notifier, receiver)
    [notice] = receiver.notices
    assert notice["kind"] == "handler_recovered"
    assert notice["first_at"] <= notice["last_at"]  # to the second


async def test_an_event_that_was_abandoned_before_and_fails_is_told(
    world: World, notifier: Notifier, receiver: NoticeReceiver
) -> None:
    """Such events wait in an index of their own."""
    event_id = await fail(world, declines)
    await world.change(event_id, abandoned=1)
    await tell(notifier, receiver)
    assert [each["example_id"] for each in receiver.notices] == [event_id]


async def test_a_failure_that_passes_is_not_told(world: World, notifier: Notifier, receiver: NoticeReceiver) -> None:
    """Neither an event that fails for less than the time, nor a retry that a handler asked for."""
    await fail(world, waits)
    await tell(notifier, receiver)
    event_id = await fail(world, declines)
    await notifier.gather(settled_seconds=0, failing_seconds=60)
    await again(world, event_id, effect)
    await tell(notifier, receiver)
    assert receiver.notices == []


async def test_a_handler_whose_events_are_behind_a_backlog_has_not_recovered(
    world: World, notifier: Notifier, receiver: NoticeReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The look reads a few rows of each type; the events that were seen failing are asked for by their ids."""
    event_id = await fail(world, declines)
    await tell(notifier, receiver)
    await world.change(event_id, due_at=-100.0)
    for _ in range(3):
        await world.ledger.record(delivery(), due_in_seconds=0)
    monkeypatch.setattr(notifier_module, "_MOST_LOOKED_AT", 2)
    await after_the_quiet(world)
    await tell(notifier, receiver)
    assert [each["kind"] for each in receiver.notices] == ["handler_failing"]
    await again(world, event_id, effect)
    await tell(notifier, receiver)
    assert [each["kind"] for each in receiver.notices] == ["handler_failing", "handler_recovered"]


async def test_refused_signatures_are_told_for_all_processes(
    world: World, make_notifier: Make, receiver: NoticeReceiver
) -> None:
    """Refusing costs no statement: what each process has counted is added up in one notice."""
    processes = [make_notifier() for _ in range(2)]
    for _ in range(4):
        metrics.rejected["signature_mismatch"].inc()  # each of them counts it: here they share a process
    for name, each in zip((None, "connect"), processes, strict=True):
        metrics.endpoint_requests(name)["signature_refused"].inc()
        await each.gather()
    await tell(processes[0], receiver)
    [notice] = receiver.notices
    assert (notice["kind"], notice["reason"], notice["events"]) == ("signatures_refused", "signature_mismatch", 8)
    assert notice["endpoints"] == ["-", "connect"]
    assert "at the endpoint connect:" in str(notice["text"])
    assert "STRIPE_WEBHOOK_SECRETS" in notice["text"]
    for _ in range(4):
        metrics.rejected["signature_mismatch"].inc()
    await tell(processes[0], receiver)
    assert len(receiver.notices) == 1


async def test_a_refusal_that_the_ledger_could_not_take_is_told_later(
    world: World, notifier: Notifier, receiver: NoticeReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Postgres may be unreachable in that round: the count is kept."""
    for _ in range(3):
        metrics.rejected["signature_stale"].inc()
    with monkeypatch.context() as patched:
        patched.setattr(world.ledger, "run", _unavailable)
        with pytest.raises(ConnectionError):
            await notifier.gather()
    await tell(notifier, receiver)
    assert [each["events"] for each in receiver.notices] == [3]


async def _unavailable(*_: object, **__: object) -> None:
    raise ConnectionError


async def test_the_loop_goes_on_after_an_error(
    world: World, notifier: Notifier, receiver: NoticeReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broken round is logged, and the next one tells what there is."""
    monkeypatch.setattr(notifier_module, "INTERVAL_SECONDS", 0.001)
    monkeypatch.setattr(notifier_module, "SETTLED_SECONDS", 0.0)
    gather, rounds = notifier.gather, 0

    async def breaks_once() -> None:
        nonlocal rounds
        rounds += 1
        if rounds == 1:
            raise ValueError("c4n4ryt3xt")
        await gather(settled_seconds=0)

    monkeypatch.setattr(notifier, "gather", breaks_once)
    event_id = await fail(world, refuses)
    with capture_logs() as lines:
        running = asyncio.create_task(notifier.run())
        try:
            await until(lambda: _value(receiver.notices))
        finally:
            running.cancel()
            await asyncio.wait({running})
    assert receiver.notices[0]["example_id"] == event_id
    [error] = [each["error"] for each in lines if each["event"] == "notify_broke"]
    assert error.startswith("ValueError at tests/integration/test_notify.py:")
    assert await world.status(event_id) is Status.DEAD


async def _value(value: object) -> object:
    return value


async def test_a_look_costs_the_same_in_a_large_ledger(world: World, notifier: Notifier) -> None:
    """The dead are read from the position on, the failing among the last of each type: both by an index."""
    await world.database.execute(
        """
        INSERT INTO firstclaim.stripe_event_attempts (event_id, attempt, outcome, ended_at, error)
        SELECT 'evt_' || n, 1, 'dead', now() - interval '1 day', '' FROM generate_series(1, 20000) AS n
        """
    )
    await world.database.execute(
        """
        INSERT INTO firstclaim.stripe_events
               (event_id, type, livemode, created_at, status, attempt, received_at, due_at, give_up_at)
        SELECT 'evt_' || n, 'invoice.paid', true, now(), 'pending', 1, now(), now(), now()
          FROM generate_series(1, 20000) AS n
        """
    )
    await world.database.execute("ANALYZE firstclaim.stripe_event_attempts, firstclaim.stripe_events")
    async with world.components.ingest.acquire(10) as connection:
        dead = await explained(connection, statements.GATHER_DEAD, settled=0.0, limit=100)
        failing = await explained(
            connection, statements.FAILING[False], types=["invoice.paid"], livemodes=[True], limit=50, for_seconds=0.0
        )
    assert "stripe_event_attempts_final" in dead
    assert "stripe_events_waiting" in failing, failing
    assert "Seq Scan on stripe_event" not in dead + failing
    await world.database.execute("DELETE FROM firstclaim.stripe_events")
