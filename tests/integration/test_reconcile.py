"""Reconciliation over real HTTP and a real ledger: a missing event is recorded once."""

import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import orjson
import pytest

from firstclaim.errors import OperatorError, StripeRefused, StripeUnavailable
from firstclaim.event import Delivery, parse_event
from firstclaim.operations import reconcile as reconcile_module
from firstclaim.operations.commands import Commands
from firstclaim.operations.reconcile import ReconcileOptions, ReconcileProgress, Reconciliation
from firstclaim.operations.stripe_api import StripeEvents
from firstclaim.postgres.connection import UNAVAILABLE
from firstclaim.status import Status
from tests.fixtures import MISSING, event_body
from tests.integration.test_ledger import near, unchanged
from tests.integration.world import World, every_event
from tests.operator import GIVE_UP_SECONDS, OPERATOR
from tests.stripe_api import FROZEN, KEY, StripeApi, answer, error

HOUR, DAY = 3600, 86_400
THREE_DAYS = ReconcileOptions(3 * DAY)


@pytest.fixture
async def api(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[StripeApi]:
    """Stripe's API without events; requests bypass any proxy of the environment."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    async with StripeApi().listening() as api:
        yield api


@dataclass(slots=True)
class Scenario:
    """The ledger, Stripe, and pauses that are noted instead of waited for."""

    world: World
    api: StripeApi
    slept: list[float] = field(default_factory=list)

    async def reconcile(
        self,
        options: ReconcileOptions = THREE_DAYS,
        *,
        key: str = KEY,
        dry_run: bool = False,
        timeout_seconds: float = 20,
    ) -> tuple[ReconcileProgress, OperatorError | None]:
        """One run: its progress, and the error that ended it early."""

        async def sleep(seconds: float) -> None:
            self.slept.append(seconds)

        async with (
            Commands.connect(self.world.url, 5) as operations,
            StripeEvents.connect(self.api.base, key, sleep=sleep, timeout_seconds=timeout_seconds) as events,
        ):
            run = Reconciliation(
                operations,
                events,
                options,
                wants=lambda event_type, _: event_type != "charge.refunded",
                body_most_bytes=100_000,
                give_up_seconds=GIVE_UP_SECONDS,
            )
            try:
                async for _ in run.run(OPERATOR, dry_run=dry_run):
                    pass
            except OperatorError as failure:
                return run.progress, failure
            return run.progress, None

    async def reconciled(
        self, options: ReconcileOptions = THREE_DAYS, *, dry_run: bool = False
    ) -> tuple[int, int, int]:
        """A complete run: found, already here, recorded."""
        progress, failure = await self.reconcile(options, dry_run=dry_run)
        assert failure is None
        assert (progress.covered, progress.refused) == (1, [])
        return progress.found, progress.already_here, progress.recorded

    def event(
        self, age_seconds: int, *, delivered: bool = False, event_type: str = "invoice.paid", **changes: object
    ) -> str:
        """Add an event of that age to Stripe's list; its id."""
        event_id = f"evt_{secrets.token_hex(12)}"
        created = int(time.time()) - age_seconds
        body = event_body(event_type, event_id, **{"created": created, **changes})
        self.api.add(body, created, event_id, delivered=delivered)
        return event_id

    async def recorded(self) -> list[str]:
        """Ids of pending events in the order in which recovery takes them up; no two are due at the same instant."""
        rows = await self.world.database.fetch(
            "SELECT event_id, due_at FROM firstclaim.stripe_events WHERE status = 'pending' ORDER BY due_at"
        )
        assert len({row["due_at"] for row in rows}) == len(rows)
        return [row["event_id"] for row in rows]

    async def audit(self) -> list[tuple[str, str, str, int | None]]:
        """The rows of the audit."""
        rows = await self.world.database.fetch(
            "SELECT operator, action, selection, changed FROM firstclaim.operator_actions ORDER BY at"
        )
        return [tuple(row) for row in rows]


@pytest.fixture
async def scenario(world: World, api: StripeApi) -> Scenario:
    """On an empty ledger."""
    return Scenario(world, api)


# -- what is recorded ---------------------------------------------------------------------------------


async def test_what_this_build_does_not_want_is_ignored(scenario: Scenario) -> None:
    """Recorded as settled, not as pending, and counted apart: no build has promised to handle it."""
    wanted, unwanted = scenario.event(HOUR), scenario.event(HOUR, event_type="charge.refunded")
    progress, failure = await scenario.reconcile()
    assert (failure, progress.recorded, progress.ignored) == (None, 2, 1)
    assert await scenario.recorded() == [wanted]
    assert await scenario.world.status(unwanted) is Status.IGNORED


async def test_the_row_is_a_deliverys(scenario: Scenario) -> None:
    """Each column is what a delivery that may not dispatch records: pending, attempt 0, due now."""
    event_id = scenario.event(HOUR, account="acct_1", api_version="2024-06-20", livemode=True)
    body = scenario.api.events[0].body
    await scenario.world.ledger.record(Delivery(parse_event(body), body), due_in_seconds=0)
    delivered = await scenario.world.row(event_id)
    await scenario.world.database.execute(
        "DELETE FROM firstclaim.stripe_events; DELETE FROM firstclaim.stripe_event_payloads"
    )
    assert await scenario.reconciled() == (1, 0, 1)
    row = await scenario.world.row(event_id)
    own = {"received_at", "due_at", "give_up_at", "due_in", "give_up_in"}
    assert {name: value for name, value in row.items() if name not in own} == {
        name: value for name, value in delivered.items() if name not in own
    }
    assert (row["status"], row["attempt"], row["account"], row["livemode"]) == ("pending", 0, "acct_1", True)
    assert (row["object_id"] or "").startswith("in_")
    assert near(row["due_in"], 0)
    assert near(row["give_up_in"], GIVE_UP_SECONDS)


async def test_numbers_stay_as_they_were_written(scenario: Scenario) -> None:
    """No number of a payload is rounded, and the event is stored by itself, not as a part of the list."""
    event_id, created = "evt_numbers", int(time.time()) - 60
    numbers = b'{"amount":12345678901234567890123,"rate":1.10,"small":1E-9,"text":"\xc3\xa9\\n","none":null}'
    body = b'{"id":"evt_numbers","object":"event","type":"invoice.paid","livemode":false,"created":%d,' % created
    body += b'"data":{"object":%s}}' % numbers
    scenario.api.add(body.replace(b":", b" :\n  "), created, event_id)
    assert await scenario.reconciled() == (1, 0, 1)
    kept = await scenario.world.database.fetchval(
        "SELECT body FROM firstclaim.stripe_event_payloads WHERE event_id = $1", event_id
    )
    assert kept == body


async def test_the_oldest_first_through_windows_pages_and_ties(scenario: Scenario) -> None:
    """Events are recorded oldest first, also across windows and pages, and within one second."""
    scenario.api.page_most = 3
    ages = [2 * DAY + HOUR, 2 * DAY, 2 * DAY, DAY, *[HOUR] * 7, 60, 60, 60, 60, 0]
    events = [scenario.event(age) for age in ages]
    assert await scenario.reconciled() == (len(ages), 0, len(ages))
    assert await scenario.recorded() == events
    assert {each["limit"] for each in scenario.api.requests} == {"100"}
    assert scenario.api.keys == {f"Bearer {KEY}"}


async def test_missing_events_are_buffered_up_to_a_limit(scenario: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    """More missing events than fit are read in shorter windows, and each is still recorded once, the oldest first."""
    scenario.api.page_most = 2
    most = 4 * len(event_body("invoice.paid"))
    monkeypatch.setattr(reconcile_module, "_BUFFER_MOST_BYTES", most)
    monkeypatch.setattr(reconcile_module, "BATCH", 3)
    events = [scenario.event(age) for age in sorted([*range(0, 40 * 60, 60), *[90] * 11], reverse=True)]
    assert await scenario.reconciled(ReconcileOptions(HOUR)) == (51, 0, 51)
    assert await scenario.recorded() == events
    assert await scenario.reconciled(ReconcileOptions(HOUR)) == (51, 51, 0)


async def test_what_is_here_is_left_as_it_is(scenario: Scenario) -> None:
    """An event that is in the ledger is counted, and no column of its row changes, whatever its status."""
    known = {status: scenario.event(HOUR) for status in Status}
    before = {}
    for status, event_id in known.items():
        body = scenario.api.events[-1].body.replace(scenario.api.events[-1].event_id.encode(), event_id.encode())
        await scenario.world.state_of(Delivery(parse_event(body), body), status)
        before[event_id] = await scenario.world.row(event_id)
    missing = scenario.event(HOUR)
    assert await scenario.reconciled() == (len(known) + 1, len(known), 1)
    for event_id, row in before.items():
        assert unchanged(row, await scenario.world.row(event_id))
    assert await scenario.world.status(missing) is Status.PENDING


async def test_a_second_run_records_nothing(scenario: Scenario) -> None:
    """The second run finds every event in the ledger; the audit has both runs with the number they recorded."""
    for age in (2 * DAY, HOUR):
        scenario.event(age)
    assert await scenario.reconciled() == (2, 0, 2)
    before = await scenario.recorded()
    assert await scenario.reconciled(ReconcileOptions(3 * DAY, undelivered=True)) == (2, 2, 0)
    assert await scenario.recorded() == before
    assert await scenario.audit() == [
        (OPERATOR, "reconcile", "since=259200s", 2),
        (OPERATOR, "reconcile", "since=259200s undelivered", 0),
    ]


async def test_only_the_time_of_the_options(scenario: Scenario) -> None:
    """Older events are not requested."""
    scenario.event(2 * HOUR)
    young = scenario.event(HOUR - 60)
    assert await scenario.reconciled(ReconcileOptions(HOUR)) == (1, 0, 1)
    assert await scenario.recorded() == [young]


async def test_only_what_was_not_delivered(scenario: Scenario) -> None:
    """With `undelivered`, events that were delivered are not requested."""
    scenario.event(HOUR, delivered=True)
    failed = scenario.event(HOUR)
    assert await scenario.reconciled(ReconcileOptions(DAY, undelivered=True)) == (1, 0, 1)
    assert await scenario.recorded() == [failed]
    assert {each["delivery_success"] for each in scenario.api.requests} == {"false"}


async def test_a_dry_run_changes_nothing(scenario: Scenario) -> None:
    """It counts what is missing, and writes no row and no line of the audit."""
    for _ in range(3):
        scenario.event(HOUR)
    progress, failure = await scenario.reconcile(dry_run=True)
    assert (failure, progress.found, progress.already_here, progress.missing, progress.recorded) == (None, 3, 0, 3, 0)
    assert await scenario.recorded() == []
    assert await scenario.audit() == []


async def test_a_delivery_may_be_faster(scenario: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    """An event that is delivered between the query and the insert keeps its row, and counts as already here."""
    event_id = scenario.event(60)
    body = scenario.api.events[0].body
    recorded_ids = Commands.recorded_ids

    async def then_delivered(operations: Commands, ids: list[str]) -> set[str]:
        found = await recorded_ids(operations, ids)
        await scenario.world.ledger.claim(Delivery(parse_event(body), body))
        return found

    monkeypatch.setattr(Commands, "recorded_ids", then_delivered)
    assert await scenario.reconciled() == (1, 1, 0)
    assert await scenario.world.status(event_id) is Status.PROCESSING


async def test_what_is_created_meanwhile_is_found_now_or_next_time(scenario: Scenario) -> None:
    """New events that arrive while pages are read hide no other event."""
    scenario.api.page_most = 2
    for _ in range(5):
        scenario.event(30)

    def add_event(number: int) -> None:
        if number < 4:
            scenario.event(0)

    scenario.api.on_page = add_event
    found, _, recorded = await scenario.reconciled()
    assert (found, recorded) == (5, 5)
    scenario.api.on_page = None
    assert await scenario.reconciled() == (8, 5, 3)


# -- what goes wrong ----------------------------------------------------------------------------------


async def test_an_interrupted_run_is_resumed(scenario: Scenario) -> None:
    """After an interruption the recorded events stay, are reported and audited; the next run records the rest."""
    scenario.api.page_most = 2
    events = [scenario.event(age) for age in (2 * DAY, 2 * DAY, *[HOUR] * 4)]
    scenario.api.on_page = lambda number: scenario.api.refuse_connections() if number == 2 else None
    progress, failure = await scenario.reconcile()
    assert isinstance(failure, StripeUnavailable)
    assert failure.exit_code == 3
    assert str(failure).startswith(f"Stripe cannot be reached at {scenario.api.base} (ConnectError, after 6 attempts)")
    assert (progress.found, progress.recorded) == (2, 2)
    assert progress.covered < 1
    assert await scenario.recorded() == events[:2]
    assert await scenario.audit() == [(OPERATOR, "reconcile", "since=259200s", 2)]
    scenario.api.on_page = None
    async with scenario.api.listening():
        assert await scenario.reconciled() == (6, 2, 4)
    assert await scenario.recorded() == events


async def test_a_rate_limit_is_waited_out(scenario: Scenario) -> None:
    """The run waits as long as Stripe asks, or with growing pauses; the same goes for other transient failures."""
    scenario.event(HOUR)
    scenario.api.responses += [
        error(429, headers={"Retry-After": "7"}),
        error(429),
        error(500),
        answer(503, body=b"<html>"),
        None,
    ]
    assert await scenario.reconciled() == (1, 0, 1)
    assert scenario.slept[0] == 7
    for slept, longest in zip(scenario.slept[1:], (1, 2, 4, 8), strict=True):
        assert longest / 2 <= slept <= longest


@pytest.mark.parametrize(
    ("response", "message", "attempts"),
    [
        (error(429), "Stripe limits the rate of requests (429, after 6 attempts): run it again later", 6),
        (error(429, headers={"Retry-After": "600"}), "(429, after 1 attempt): wait 600 s before you run it again", 1),
        (error(500, headers={"Request-Id": "req_1"}), "Stripe failed (500, after 6 attempts, request req_1)", 6),
        (answer(503, body=b"<html>"), "Stripe failed (503, after 6 attempts)", 6),
        (answer(500, {"error": []}), "is not a list of events", 6),
        (answer(200, body=b'{"object": "list", "data": ['), "is not a list of events (after 6 attempts)", 6),
        (answer(200, body=b"\xff\xfe"), "is not a list of events", 6),
        (answer(200, body=b'{"a":' * 9000 + b"1" + b"}" * 9000), "is not a list of events", 6),
        (answer(200, [1]), "is not a list of events", 6),
        (answer(200, {"data": {}, "has_more": False}), "is not a list of events", 6),
        (answer(200, {"data": [], "has_more": True}), "is not a list of events", 6),
        (answer(200, {"data": [{"x": 1}], "has_more": True}), "is not a list of events", 6),
        (answer(200, {}, headers={"Content-Length": "100"}), "cannot be reached at", 6),
        (None, "(RemoteProtocolError, after 6 attempts)", 6),
        (FROZEN, "(TimeoutError, after 6 attempts)", 6),
    ],
)
async def test_stripe_is_unavailable(scenario: Scenario, response: bytes | None, message: str, attempts: int) -> None:
    """After a few attempts the error says what to do, the exit code is 3, and nothing is recorded."""
    scenario.event(HOUR)
    scenario.api.responses += [response] * 20
    frozen = response is FROZEN
    progress, failure = await scenario.reconcile(timeout_seconds=0.05 if frozen else 20)
    assert isinstance(failure, StripeUnavailable)
    assert message in str(failure)
    assert failure.exit_code == 3
    assert len(scenario.slept) == attempts - 1
    # On a busy machine a request's time may be over before the server has read it.
    assert len(scenario.api.requests) == attempts or (frozen and len(scenario.api.requests) < attempts)
    assert (progress.found, await scenario.recorded()) == (0, [])


@pytest.mark.parametrize(
    ("response", "message"),
    [
        (
            error(401, headers={"Request-Id": "req_1"}),
            "Stripe does not accept the key in STRIPE_API_KEY (401, request req_1)",
        ),
        (error(403), "the key in STRIPE_API_KEY may not read events (403)"),
        (error(400, "parameter_invalid"), "(400, parameter_invalid)"),
        (error(400, f"it is {KEY}", message=KEY), "the request for its list of events (400)"),
        (answer(302, {}, headers={"Location": "http://127.0.0.1:1/"}), "the request for its list of events (302)"),
    ],
)
async def test_stripe_refuses(scenario: Scenario, response: bytes, message: str) -> None:
    """It fails at once with exit code 1; the error shows only the code of the response; no redirect is followed."""
    scenario.api.responses.append(response)
    _, failure = await scenario.reconcile()
    assert isinstance(failure, StripeRefused)
    assert message in str(failure)
    assert KEY not in str(failure)
    assert (failure.exit_code, len(scenario.api.requests), scenario.slept) == (1, 1, [])


async def test_a_bad_key_is_named_and_not_shown(scenario: Scenario) -> None:
    """The error has the setting's name, and nothing of its value."""
    _, failure = await scenario.reconcile(key="sk_test_wr0ng")
    assert isinstance(failure, StripeRefused)
    assert "STRIPE_API_KEY" in str(failure)
    assert "wr0ng" not in str(failure)
    assert scenario.api.keys == {"Bearer sk_test_wr0ng"}


async def test_a_malformed_event_is_named(scenario: Scenario) -> None:
    """A malformed event, also at the end of a page, is reported with its id and reason; all others are recorded."""
    scenario.api.page_most = 4
    created = int(time.time()) - HOUR
    good = [scenario.event(HOUR)]
    malformed = {
        "evt_livemode": event_body("invoice.paid", "evt_livemode", livemode="yes"),
        "evt_data": event_body("invoice.paid", "evt_data", data=MISSING),
        "evt_nan": event_body("invoice.paid", "evt_nan").replace(b'"livemode":false', b'"livemode":NaN'),
        "evt_surrogate": event_body("invoice.paid", "evt_surrogate").replace(b'"usd"', b'"\\ud800"', 1),
        "evt_large": event_body("invoice.paid", "evt_large", more="x" * 100_000),
    }
    for event_id, body in malformed.items():
        scenario.api.add(body, created, event_id)
        good.append(scenario.event(HOUR))
    scenario.api.add(orjson.dumps({"id": KEY}), created, KEY)
    scenario.api.add(b"[17]", created, "nothing")
    good.append(scenario.event(HOUR))
    progress, failure = await scenario.reconcile()
    assert failure is None
    assert await scenario.recorded() == good
    refused = dict(progress.refused)
    assert set(refused) == {*malformed, "[redacted]", "(without an id)"}
    assert refused["evt_livemode"] == '"livemode" must be true or false'
    assert refused["evt_large"] == "larger than FIRSTCLAIM_BODY_MOST_BYTES"
    assert (progress.found, progress.already_here, progress.recorded, progress.refused_events) == (14, 0, 7, 7)


async def test_only_so_many_are_named(scenario: Scenario) -> None:
    """All malformed events are counted, and the first hundred are named."""
    for number in range(150):
        scenario.api.add(orjson.dumps({"id": f"evt_{number}"}), int(time.time()) - 60, f"evt_{number}")
    progress, _ = await scenario.reconcile()
    assert (progress.found, progress.refused_events, len(progress.refused)) == (150, 150, 100)


async def test_a_list_that_repeats_itself_ends_the_run(scenario: Scenario) -> None:
    """If the API ignores the cursor, the run ends instead of reading forever."""
    page = {"data": [orjson.loads(event_body("invoice.paid", "evt_again"))], "has_more": True}
    scenario.api.responses += [answer(200, page)] * 10
    _, failure = await scenario.reconcile()
    assert isinstance(failure, StripeUnavailable)
    assert "repeats itself" in str(failure)
    assert len(scenario.api.requests) == 2


async def test_a_cursor_that_has_gone_is_no_end(scenario: Scenario) -> None:
    """If the event at the cursor expires between two pages, the window is read again and the rest recorded."""
    scenario.api.page_most = 2
    events = [scenario.event(30 * 60) for _ in range(4)]

    def expire(number: int) -> None:
        if number == 1:
            del scenario.api.events[2:]

    scenario.api.on_page = expire
    assert await scenario.reconciled(ReconcileOptions(HOUR)) == (2, 0, 2)
    assert await scenario.recorded() == events[:2]


async def test_a_lost_connection_to_the_ledger_ends_the_run(scenario: Scenario) -> None:
    """What was recorded stays; the audit has no number, which shows that the run was interrupted."""
    scenario.api.page_most = 2
    for age in (2 * DAY, HOUR):
        scenario.event(age)
    async with (
        Commands.connect(scenario.world.url, 5) as operations,
        StripeEvents.connect(scenario.api.base, KEY) as events,
    ):
        run = Reconciliation(
            operations, events, THREE_DAYS, wants=every_event, body_most_bytes=100_000, give_up_seconds=GIVE_UP_SECONDS
        )
        steps = run.run(OPERATOR)
        async for progress in steps:
            if progress.recorded:
                break
        await scenario.world.database.execute(
            "SELECT pg_terminate_backend($1)", operations._connection.get_server_pid()
        )
        with pytest.raises(UNAVAILABLE):
            async for _ in steps:
                pass
    assert run.progress.recorded == 1
    assert len(await scenario.recorded()) == 1
    assert [changed for *_, changed in await scenario.audit()] == [None]


async def test_what_is_recorded_has_the_endpoint_s_name(scenario: Scenario) -> None:
    """With an endpoint, a missing event is recorded as if that endpoint had received it, and the audit says so."""
    event_id = scenario.event(HOUR)
    assert await scenario.reconciled(ReconcileOptions(3 * DAY, endpoint="eu")) == (1, 0, 1)
    assert (await scenario.world.row(event_id))["endpoint"] == "eu"
    assert [row[2] for row in await scenario.audit()] == ["since=259200s endpoint=eu"]
