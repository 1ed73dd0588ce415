"""Handlers with `fresh=True`: the object as it is now, fetched within the claim's rules and before any row lock."""

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import orjson
import pytest
from pydantic import SecretStr

from firstclaim import Context, Event
from firstclaim.errors import ConfigurationError
from firstclaim.event import Delivery, parse_event
from firstclaim.handler_options import Options
from firstclaim.inbox.claim import Claim
from firstclaim.operations.stripe_objects import StripeObjects
from firstclaim.outcome import Kind
from firstclaim.registry import Handler
from firstclaim.server.preflight import check_handlers
from firstclaim.settings import Settings
from firstclaim.status import Status
from tests.canaries import STORY, assert_silent
from tests.fixtures import event_body
from tests.integration.conftest import MakeWorld
from tests.integration.world import World, delivery, effect, until
from tests.stripe_api import FROZEN, KEY, StripeApi, answer, error

TYPE = "invoice.paid"
NOW = {"object": "invoice", "status": "void"}  # what has become of the invoice since the event
THIN = {
    "id": "evt_thin", "object": "v2.core.event", "type": "v2.core.account.updated", "livemode": False,
    "created": "2026-01-02T03:04:05Z", "context": "acct_ctx",
    "related_object": {"id": "acct_1", "type": "v2.core.account", "url": "/v2/core/accounts/acct_1"},
}  # fmt: skip

Seen = list[tuple[Event, Context]]


@pytest.fixture
async def api() -> AsyncIterator[StripeApi]:
    """Stripe, with no object yet."""
    async with StripeApi().listening() as api:
        yield api


@pytest.fixture
def seen() -> Seen:
    """What the handler got."""
    return []


@pytest.fixture
def left() -> list[float]:
    """How many seconds the handler had until its deadline."""
    return []


@pytest.fixture
async def process(make_world: MakeWorld, api: StripeApi, seen: Seen, left: list[float]) -> World:
    """A process with a handler of `TYPE` that has an effect."""

    async def handle(event: Event, context: Context) -> str:
        seen.append((event, context))
        left.append(context._deadline - asyncio.get_running_loop().time())
        await effect(event, context)
        return "seen"

    handlers = [Handler(pattern, handle, fresh=True) for pattern in (TYPE, "v2.*", "customer.*")]
    return await make_world(declared=handlers, stripe_api_base=api.base, fresh_api_keys=(SecretStr(KEY),))


def paid(api: StripeApi, event_id: str = "evt_1", **changes: Any) -> Delivery:
    """A delivery whose object is void by now."""
    given = delivery(event_id, TYPE, data={"object": {"status": "paid"}}, **changes)
    api.objects[f"/v1/invoices/{given.event.object_id}"] = {"id": given.event.object_id, **NOW}
    return given


async def test_the_handler_gets_the_object_as_it_is_now(process: World, api: StripeApi, seen: Seen) -> None:
    """`event.object` and `event.data` are of now, `context.snapshot` of then, `payload` is what was signed."""
    given = paid(api, account="acct_9")
    assert (await process.pipeline.deliver(given)).kind is Kind.PROCESSED
    [(event, context)] = seen
    assert event.object.status == "void"
    assert event.data["object"] == {"id": event.object_id, **NOW}
    assert context.snapshot is not None
    assert context.snapshot["status"] == "paid"
    assert event.payload == orjson.loads(given.body)
    [(path, head)] = api.heads
    assert path == f"/v1/invoices/{event.object_id}"
    assert (head["stripe-account"], head["stripe-version"]) == ("acct_9", event.api_version)
    assert await process.effects("evt_1") == 1


async def test_without_fresh_nothing_is_fetched(make_world: MakeWorld, api: StripeApi) -> None:
    """A handler that does not ask for it gets the event's own object, as object and as snapshot, and needs no key."""
    seen: Seen = []

    async def handle(event: Event, context: Context) -> str:
        seen.append((event, context))
        return "seen"

    process = await make_world({TYPE: handle}, stripe_api_base=api.base)
    assert (await process.pipeline.deliver(paid(api))).kind is Kind.PROCESSED
    [(event, context)] = seen
    assert event.data["object"]["status"] == "paid"
    assert context.snapshot == event.data["object"]
    assert process.components.stripe_objects is None
    assert not api.heads


async def test_nothing_is_locked_while_stripe_is_waited_for(process: World, api: StripeApi, left: list[float]) -> None:
    """During the fetch the row is claimed and not locked, no transaction is open, and the handler's deadline runs."""
    given = paid(api)
    other = await asyncpg.connect(process.url)
    waited = 0.0

    async def look() -> None:
        nonlocal waited
        began = asyncio.get_running_loop().time()
        for _ in range(50):
            row = await other.fetchrow(
                "SELECT status, attempt FROM firstclaim.stripe_events WHERE event_id = 'evt_1' FOR UPDATE NOWAIT"
            )
            assert row is not None
            assert tuple(row) == (Status.PROCESSING, 1)
        assert [claim.event_id for claim in process.pipeline.unstarted] == ["evt_1"]
        waited = asyncio.get_running_loop().time() - began

    api.on_request = look
    try:
        assert (await process.pipeline.deliver(given)).kind is Kind.PROCESSED
    finally:
        await other.close()
    assert waited > 0
    assert left[0] <= process.settings.handler_deadline_seconds - waited
    assert not process.pipeline.unstarted


async def test_a_claim_that_was_lost_meanwhile_is_not_dispatched(process: World, api: StripeApi, seen: Seen) -> None:
    """The row was returned as abandoned during the fetch, and is another's: the handler is not called here."""

    async def lose() -> None:
        await process.change("evt_1", attempt=2)

    api.on_request = lose
    assert (await process.pipeline.deliver(paid(api))).kind is Kind.DUPLICATE
    assert not seen
    row = await process.row("evt_1")
    assert (row["status"], row["attempt"], row["failures"]) == (Status.PROCESSING, 2, 0)


async def test_a_pause_that_stripe_asks_for(process: World, api: StripeApi, seen: Seen) -> None:
    """After 429 with Retry-After the event is due then, uncharged; until then no request is sent for another either."""
    api.responses = [error(429, headers={"Retry-After": "40"})]
    for event_id in ("evt_1", "evt_2"):
        result = await process.pipeline.deliver(paid(api, event_id))
        assert (result.kind, result.reason) == (
            Kind.DEFERRED,
            "Recorded; dispatched when Stripe's API takes requests again",
        )
        row = await process.row(event_id)
        assert (row["status"], row["failures"], row["abandoned"], row["last_error"]) == (Status.PENDING, 0, 0, None)
        assert 35 < row["due_in"] < 51
        assert await process.value(event_id) is None  # a later delivery of Stripe's reaches the ledger
    assert len(api.heads) == 1
    assert not seen


async def test_a_pause_past_the_time_to_give_up(process: World, api: StripeApi) -> None:
    """What is never charged is dead after its time to give up all the same, and its row says why."""
    api.responses = [error(429, headers={"Retry-After": "40"})]

    async def expire() -> None:
        await process.change("evt_1", give_up_at=-1)

    api.on_request = expire
    assert (await process.pipeline.deliver(paid(api))).kind is Kind.DEAD
    row = await process.row("evt_1")
    assert (row["status"], row["last_error"]) == (Status.DEAD, "Retry: Stripe asks for a pause (429)")


@pytest.mark.parametrize("headers", [{}, {"Retry-After": "0"}, {"Retry-After": "soon"}])
async def test_a_rate_limit_without_a_time(process: World, api: StripeApi, headers: dict[str, str]) -> None:
    """429 without a time to come: uncharged too, after the usual backoff, and no request follows at once."""
    api.responses = [error(429, headers=headers)]
    for event_id in ("evt_1", "evt_2"):
        assert (await process.pipeline.deliver(paid(api, event_id))).kind is Kind.DEFERRED
    row = await process.row("evt_1")
    assert (row["status"], row["failures"]) == (Status.PENDING, 0)
    assert 1 < row["due_in"] <= process.settings.backoff_first_seconds
    assert len(api.heads) == 1


@pytest.mark.parametrize("asked", ["7200", "9" * 30])
async def test_a_pause_is_an_hour_at_most(process: World, api: StripeApi, asked: str) -> None:
    """A longer one is an hour, and is not left out because it is absurd."""
    api.responses = [error(503, headers={"Retry-After": asked})]
    assert (await process.pipeline.deliver(paid(api))).kind is Kind.DEFERRED
    assert 3590 < (await process.row("evt_1"))["due_in"] <= 4500


@pytest.mark.parametrize("gone", [None, {"id": "cus_1", "object": "customer", "deleted": True}])
async def test_a_deleted_object(process: World, api: StripeApi, seen: Seen, gone: dict[str, Any] | None) -> None:
    """Stripe's 404 and its own `deleted: true` are the same to a handler."""
    if gone is not None:
        api.objects["/v1/customers/cus_1"] = gone
    event = orjson.loads(event_body("invoice.paid", "evt_1")) | {"type": "customer.updated"}
    event["data"]["object"] = {"id": "cus_1", "object": "customer", "name": "N"}
    body = orjson.dumps(event)
    assert (await process.pipeline.deliver(Delivery(parse_event(body), body))).kind is Kind.PROCESSED
    [(given, context)] = seen
    assert given.data["object"] == {"id": "cus_1", "object": "customer", "deleted": True}
    assert given.object.deleted is True
    assert context.snapshot is not None
    assert context.snapshot["name"] == "N"


async def test_a_thin_event(process: World, api: StripeApi, seen: Seen) -> None:
    """Its object comes from its `related_object.url`, in its context; it has no snapshot, and an object now."""
    api.objects["/v2/core/accounts/acct_1"] = {"id": "acct_1", "object": "v2.core.account", "display_name": "Shop"}
    body = orjson.dumps(THIN)
    assert (await process.pipeline.deliver(Delivery(parse_event(body), body))).kind is Kind.PROCESSED
    [(event, context)] = seen
    assert event.object.display_name == "Shop"
    assert type(event.object).__name__ == "Account"
    assert context.snapshot is None
    [(path, head)] = api.heads
    assert (path, head["stripe-context"]) == ("/v2/core/accounts/acct_1", "acct_ctx")
    assert "stripe-account" not in head


@pytest.mark.parametrize(
    "url", [None, "https://example.com/v1/x", "/v1/../v1/events", "//example.com/v2/a", "/v1/a?b=c", 7]
)
async def test_a_thin_event_without_a_usable_url(process: World, api: StripeApi, url: object) -> None:
    """It is dead with the reason, and no request is made: the key goes to no address that an event names."""
    body = orjson.dumps({**THIN, "related_object": {"id": "acct_1", "type": "v2.core.account", "url": url}})
    assert (await process.pipeline.deliver(Delivery(parse_event(body), body))).kind is Kind.DEAD
    row = await process.row("evt_thin")
    assert row["last_error"] == (
        "Permanent: fresh=True: the v2.core.account of v2.core.account.updated cannot be fetched from Stripe by itself"
    )
    assert not api.heads


@pytest.mark.parametrize("name", ["discount", "no_such_kind"])
async def test_an_object_that_stripe_has_no_request_for(process: World, api: StripeApi, name: str) -> None:
    """A discount, and a kind that the library does not know, cannot be fetched: dead, with the reason."""
    event = orjson.loads(event_body("invoice.paid", "evt_1")) | {"type": "customer.discount.created"}
    event["data"]["object"] = {"id": "di_1", "object": name}
    body = orjson.dumps(event)
    assert (await process.pipeline.deliver(Delivery(parse_event(body), body))).kind is Kind.DEAD
    assert f"the {name} of customer.discount.created cannot be fetched" in (await process.row("evt_1"))["last_error"]
    assert not api.heads


FAILURES = {
    "401": (error(401, STORY, message=STORY), "StripeRefused: Stripe does not accept the API key of the endpoint "),
    "403": (error(403, STORY, message=STORY), "may not read the invoice (403): a restricted key needs the permission"),
    "400": (error(400, STORY, message=STORY), "StripeRefused: Stripe refused the request for the invoice (400)"),
    "500": (error(500, STORY, message=STORY), "StripeUnavailable: Stripe failed (500)"),
    "html": (answer(200, body=STORY.encode()), "StripeUnavailable: "),
    "cut": (None, "StripeUnavailable: no object from Stripe at http://127.0.0.1:"),
    "other": (answer(200, {"id": "in_other", "object": "invoice"}), "is not an object with the same id"),
    "404": (error(404, message=STORY), "StripeRefused: Stripe refused the request for the invoice (404)"),
}


@pytest.mark.parametrize("name", FAILURES)
async def test_what_else_stripe_says(
    process: World, api: StripeApi, seen: Seen, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is a failure of the attempt, tried again after a backoff; its reason has no text of the response."""
    response, reason = FAILURES[name]
    api.responses = [response]
    assert (await process.pipeline.deliver(paid(api))).kind is Kind.FAILED
    row = await process.row("evt_1")
    assert (row["status"], row["failures"], row["abandoned"]) == (Status.FAILED, 1, 0)
    assert reason in row["last_error"]
    assert not seen
    printed = capsys.readouterr()
    assert_silent(row["last_error"] + printed.out + printed.err)
    assert KEY not in row["last_error"] + printed.out + printed.err
    again = await process.pipeline.deliver(paid(api))
    assert again.kind is Kind.PROCESSED
    assert await process.effects("evt_1") == 1


async def test_a_time_limit_of_its_own(make_world: MakeWorld, api: StripeApi, seen: Seen) -> None:
    """A silent Stripe costs the time limit, and the attempt fails: nobody is abandoned, and the slot is free again."""

    async def handle(event: Event, context: Context) -> str:
        seen.append((event, context))
        return "seen"

    process = await make_world(
        declared=[Handler(TYPE, handle, fresh=True)],
        stripe_api_base=api.base,
        fresh_api_keys=(SecretStr(KEY),),
        fresh_timeout_seconds=0.05,
        handler_slots=1,
    )
    api.responses = [FROZEN]
    assert (await process.pipeline.deliver(paid(api))).kind is Kind.FAILED
    row = await process.row("evt_1")
    assert (row["failures"], row["abandoned"]) == (1, 0)
    assert row["last_error"] == "StripeUnavailable: Stripe's API did not answer within 0.05 s"
    assert (await process.pipeline.deliver(paid(api, "evt_2"))).kind is Kind.PROCESSED
    assert [event.id for event, _ in seen] == ["evt_2"]


async def test_a_shutdown_while_stripe_is_waited_for(process: World, api: StripeApi, seen: Seen) -> None:
    """No handler has been called, so the event is released without a charge."""
    asked = asyncio.Event()

    async def ask() -> None:
        asked.set()

    api.on_request = ask
    given = paid(api)
    api.responses.append(FROZEN)
    work = asyncio.create_task(process.pipeline.deliver(given))
    await asked.wait()
    await process.pipeline.drain(0)
    work.cancel()
    row = await process.row("evt_1")
    assert (row["status"], row["failures"], row["abandoned"]) == (Status.PENDING, 0, 0)
    assert not seen


async def test_recovery_fetches_too(process: World, api: StripeApi, seen: Seen) -> None:
    """An event that recovery dispatches gets its object as it is then."""
    given = await process.state_of(paid(api), Status.FAILED)
    await process.change(given.event.id, due_at=-1)

    async def completed() -> bool:
        await process.pipeline.recover()
        return await process.status(given.event.id) is Status.COMPLETED

    await until(completed)
    [(event, _)] = seen
    assert event.object.status == "void"


# -- keys ---------------------------------------------------------------------------------------------


LIVE, TEST, OF_EU = "rk_live_a", "rk_test_b", "sk_live_c"


@pytest.mark.parametrize(
    ("endpoint", "livemode", "key"), [(None, True, LIVE), (None, False, TEST), ("eu", True, OF_EU), ("eu", False, None)]
)
async def test_the_key_is_of_the_endpoint_and_the_mode(
    make_world: MakeWorld, api: StripeApi, endpoint: str | None, livemode: bool, key: str | None
) -> None:
    """A request has the key of the event's own endpoint and mode; without one, no other key is used."""

    async def handle(_event: Event, _context: Context) -> str:
        return "seen"

    process = await make_world(
        declared=[Handler(TYPE, handle, fresh=True)],
        stripe_api_base=api.base,
        fresh_api_keys=tuple(map(SecretStr, (LIVE, TEST, f"eu={OF_EU}"))),
    )
    given = paid(api, livemode=livemode)
    given = Delivery(parse_event(given.body, endpoint), given.body, endpoint=endpoint)
    api.key = key or ""
    result = await process.pipeline.deliver(given)
    if key is None:
        assert result.kind is Kind.FAILED
        assert (await process.row("evt_1"))["last_error"] == (
            "StripeRefused: no API key of test mode for the events of the endpoint eu: add one to "
            "FIRSTCLAIM_FRESH_API_KEYS, or set FIRSTCLAIM_LIVEMODE"
        )
        assert not api.keys
    else:
        assert result.kind is Kind.PROCESSED
        assert api.keys == {f"Bearer {key}"}


async def test_what_a_start_refuses(make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing key, a time limit above a quarter of the lease and a talkative library are named at the start."""
    monkeypatch.setenv("STRIPE_LOG", "debug")
    with pytest.raises(ConfigurationError) as caught:
        await make_world(declared=[Handler(TYPE, paid, fresh=True)], fresh_timeout_seconds=16, lease_seconds=60)
    name = f"{__name__}.paid"
    assert caught.value.faults == (
        "STRIPE_API_KEY is missing for the events of the endpoint without a name, whose objects "
        f"{name} (fresh=True) is to get: add rk_live_... to FIRSTCLAIM_FRESH_API_KEYS, or set STRIPE_API_KEY",
        "FIRSTCLAIM_FRESH_TIMEOUT_SECONDS must be at most a quarter of FIRSTCLAIM_LEASE_SECONDS, because "
        f"{name} (fresh=True) waits for Stripe while no row is locked",
        "STRIPE_LOG makes stripe-python print responses, with payloads: unset it",
    )


def test_check_names_a_missing_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """`firstclaim check` finds it too, for each endpoint."""
    settings = Settings(
        stripe_webhook_secrets=(SecretStr("whsec_a"), SecretStr("eu=whsec_b")),
        fresh_api_keys=(SecretStr(TEST),),
        handlers=("tests.integration.fresh_handlers",),
    )
    [check] = check_handlers(settings)
    assert check.fatal
    assert re.search(r"no API key for the events of the endpoint eu, .* add eu=rk_live_\.\.\. to", check.detail)


async def test_a_deadline_that_the_request_alone_may_take(make_world: MakeWorld) -> None:
    """A handler's own deadline must leave time for the handler."""
    handler = Handler(TYPE, paid, fresh=True, options=Options(deadline_seconds=2))
    with pytest.raises(ConfigurationError, match=r"must be below the deadline=2 of .* against which"):
        await make_world(declared=[handler], fresh_api_keys=(SecretStr(KEY),))


async def test_a_claim_of_a_handler_without_a_client(world: World) -> None:
    """The types that a process does not serve open no client: an object is fetched at the first event that needs it."""
    objects = StripeObjects("http://127.0.0.1:9", {}, timeout_seconds=1)
    await objects.close()
    assert isinstance(await world.claim(), Claim)
