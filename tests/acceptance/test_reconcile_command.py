"""`firstclaim reconcile` as an operator runs it: beside a service that handles what it records."""

import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from firstclaim.status import Status
from tests.acceptance.command import Command, Run
from tests.acceptance.harness import PROCESSED, PYTHON_PATH, Sample, Sandbox, eventually, sample
from tests.canaries import API_KEY, STORY, assert_silent, metadata
from tests.fixtures import event_body
from tests.stripe_api import FROZEN, KEY, StripeApi, answer, error

AT_ONCE = {"Retry-After": "0"}  # what asks the command to come again, asks it to do so now
UNHANDLED = "payment_intent.succeeded"


@pytest.fixture
async def api() -> AsyncIterator[StripeApi]:
    """Stripe, without any event yet."""
    async with StripeApi(page_most=3).listening() as api:
        yield api


@pytest.fixture
def command(sandbox: Sandbox, api: StripeApi, tmp_path: Path) -> Command:
    """On the sandbox's database and Stripe's API alone: no Redis, no signing secret, no handlers."""
    folder = tmp_path / "operator"
    folder.mkdir()
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": PYTHON_PATH, "DATABASE_URL": sandbox.database_url}
    return Command(folder, {**environment, "STRIPE_API_KEY": KEY, "STRIPE_API_BASE": api.base})


def add(api: StripeApi, event: Sample, age_seconds: int = 0, *, delivered: bool = False) -> None:
    """Add this event to the list of Stripe."""
    api.add(event.body, int(time.time()) - age_seconds, event.id, delivered=delivered)


def printed(run: Run, code: int = 0) -> dict[str, Any]:
    """The object that a run with `--json` printed."""
    assert run.code == code, run.output
    [line] = [line for line in run.output.splitlines() if line.startswith("{")]
    content: dict[str, Any] = orjson.loads(line)
    return content


async def test_a_lost_ledger_is_repaired(sandbox: Sandbox, command: Command, api: StripeApi) -> None:
    """Rows and effects that a restore lost are there again, completed once; existing rows are not handled again.

    Redis still has the markers of the lost rows, and events of other types than the endpoint's are in the list too.
    """
    service = await sandbox.service().start()
    events = [sample() for _ in range(8)]
    for age, event in zip(range(8 * 3600, 0, -3600), events, strict=True):
        assert (await sandbox.deliver(service, event)).result == PROCESSED
        add(api, event, age, delivered=True)
    unhandled = sample(type=UNHANDLED)
    add(api, unhandled)
    lost = events[1:7]
    for table in ("firstclaim.stripe_events", "firstclaim.stripe_event_payloads", "effects"):
        await sandbox.fetch(f"DELETE FROM {table} WHERE event_id = ANY($1)", [each.id for each in lost])

    run = await command("reconcile", "--since", "3d", "--dry-run")
    assert run.code == 0, run.output
    run.shows("9 events listed by Stripe: 2 already in the ledger, 7 would be recorded")
    assert await sandbox.rows() == 2

    run = await command("reconcile", "--since", "3d")
    assert run.code == 0, run.output
    run.shows("9 events listed by Stripe: 2 already in the ledger, 7 recorded")
    for event in events:
        row = await sandbox.settled(event)
        assert row.counts == (1, 0, 0)
    await sandbox.settled(unhandled, Status.IGNORED)

    again = printed(await command("reconcile", "--since", "3d", "--json"))
    assert (again["found"], again["already_here"], again["recorded"], again["missing"]) == (9, 9, 0, 0)
    assert (again["complete"], again["dry_run"], again["refusals"]) == (True, False, [])
    assert await sandbox.statuses() == {Status.COMPLETED: 8, Status.IGNORED: 1}
    rows = await sandbox.fetch(
        "SELECT operator, action, selection, changed FROM firstclaim.operator_actions ORDER BY at"
    )
    assert [tuple(row)[1:] for row in rows] == [
        ("reconcile", "since=259200s", 7),
        ("reconcile", "since=259200s", 0),
    ]
    assert "@" in rows[0]["operator"]


async def test_an_outage_is_made_up_for(sandbox: Sandbox, command: Command, api: StripeApi) -> None:
    """`--undelivered` finds only what Stripe could not deliver, and a later delivery of it is a duplicate."""
    service = await sandbox.service().start()
    failed = sample()
    add(api, sample(), delivered=True)
    add(api, failed)
    found = printed(await command("reconcile", "--since", "2h", "--undelivered", "--json"))
    assert (found["found"], found["already_here"], found["recorded"]) == (1, 0, 1)
    await sandbox.settled(failed)
    assert not (await sandbox.deliver(service, failed)).processed
    assert await sandbox.effects(failed) == 1
    assert await sandbox.rows() == 1


async def test_an_interrupted_run_is_run_again(sandbox: Sandbox, command: Command, api: StripeApi) -> None:
    """Stripe fails after two pages, then Ctrl-C: each run reports what it recorded, and each event is handled once."""
    await sandbox.service().start()
    events = [sample() for _ in range(12)]
    for age, event in zip(range(36 * 3600, 0, -3 * 3600), events, strict=True):
        add(api, event, age)

    def fail(number: int) -> None:
        if number == 2:
            api.responses += [error(500, headers=AT_ONCE)] * 6

    api.on_page = fail
    first = printed(await command("reconcile", "--since", "2d", "--json"), 3)
    assert 0 < first["recorded"] < 12
    assert (first["recorded"], first["missing"], first["complete"]) == (first["found"], 0, False)

    api.on_page = lambda number: api.responses.append(FROZEN) if number == 6 else None
    async with command.running("reconcile", "--since", "2d") as running:
        await eventually(lambda: _request_hangs(api))
        running.interrupt()
        run = await running.wait_for_exit()
    assert run.code != 0
    run.shows("The run is incomplete: repeat it, no event is recorded twice.")

    api.on_page = None
    last = printed(await command("reconcile", "--since", "2d", "--json"))
    assert (last["found"], last["complete"]) == (12, True)
    assert last["already_here"] > first["recorded"]
    for event in events:
        assert (await sandbox.settled(event)).counts == (1, 0, 0)


async def _request_hangs(api: StripeApi) -> bool:
    return api.pages >= 6 and not api.responses


async def test_what_stripe_says(command: Command, api: StripeApi) -> None:
    """A rate limit that ends is waited for; one that does not end, and a bad key, end with a sentence and a code."""
    add(api, sample())
    api.responses += [error(429, headers=AT_ONCE)] * 5
    assert printed(await command("reconcile", "--since", "15m", "--json", "--dry-run"))["missing"] == 1
    api.responses += [error(429, headers=AT_ONCE)] * 6
    run = await command("reconcile", "--since", "15m")
    assert run.code == 3, run.output
    run.shows("429", "later")
    run = await command("reconcile", "--since", "15m", STRIPE_API_KEY="sk_test_wr0ng")
    assert run.code == 1, run.output
    run.shows("STRIPE_API_KEY")
    assert "wr0ng" not in run.output


async def test_an_event_that_is_none_is_named(sandbox: Sandbox, command: Command, api: StripeApi) -> None:
    """An invalid event is not recorded, its id and the reason are printed, exit code 1; the others are recorded."""
    good, broken = sample(), Sample("evt_broken", event_body(id="evt_broken", type="invoice.paid", livemode="no"))
    for event in (good, broken):
        add(api, event)
    run = await command("reconcile", "--since", "1h", "--json")
    content = printed(run, 1)
    run.shows(
        "evt_broken was not recorded, because its delivery would be rejected too", '"livemode" must be true or false'
    )
    assert (content["recorded"], content["refused"], content["complete"]) == (1, 1, True)
    assert content["refusals"] == [{"event_id": "evt_broken", "reason": '"livemode" must be true or false'}]
    assert await sandbox.row(good) is not None
    assert await sandbox.row(broken) is None


async def test_nothing_says_the_key_or_a_payload(command: Command, api: StripeApi) -> None:
    """With all logs enabled, whatever Stripe answers (refused, failing, broken, good), neither is printed."""
    loud = {"STRIPE_API_KEY": API_KEY, "FIRSTCLAIM_LOG_LEVEL": "debug"}
    good = sample()
    secret = event_body("invoice.paid", good.id, data={"object": {"metadata": metadata()}}, account=STORY)
    broken = event_body("invoice.paid", "evt_broken").replace(b"evt_broken", STORY.encode()[:200])
    page = answer(200, body=b'{"data":[%s,%s],"has_more":false}' % (secret, broken.replace(b"invoice.paid", b"  ")))
    for trouble, code in (
        (error(401, STORY, message=STORY), 1),
        (error(400, STORY, STORY, STORY), 1),
        (error(500, message=STORY, headers={**AT_ONCE, "Request-Id": STORY}), 3),
        (answer(200, body=STORY.encode(), headers={"Stripe-Notice": STORY, **AT_ONCE}), 3),
        (page, 1),
    ):
        api.responses = [trouble] * 6
        run = await command("reconcile", "--since", "1s", **loud)
        assert run.code == code, run.output
        assert_silent(run.output)
    run.shows(
        "2 events listed by Stripe: 0 already in the ledger, ",
        "1 recorded (1 ignored: no handler in FIRSTCLAIM_HANDLERS), 1 refused",
    )
    assert api.keys == {f"Bearer {API_KEY}"}
