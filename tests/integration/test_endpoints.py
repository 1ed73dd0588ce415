"""Named endpoints on the whole application: secrets of their own, one event whichever of them it comes to, its name."""

from collections.abc import AsyncIterator

import httpx
import pytest
from pydantic import SecretStr
from starlette.applications import Starlette

from firstclaim import BatchContext, Context, Event
from firstclaim.app import application, create_series
from firstclaim.event import Delivery, parse_event
from firstclaim.inbox.lock import LockReply
from firstclaim.inbox.lock_token import new_token
from firstclaim.observability import metrics
from firstclaim.operations.commands import Commands
from firstclaim.operations.selection import Selection
from firstclaim.registry import Registry
from firstclaim.shutdown import Shutdown
from firstclaim.status import Status
from firstclaim.web.webhook import WEBHOOK_PATH
from tests.fixtures import SECRET, event_body, signed
from tests.integration.conftest import MakeWorld
from tests.integration.world import World, effect, until

CONNECT, EU = "whsec_connect", "whsec_eu"
SECRETS = (SecretStr(SECRET), SecretStr(f"connect={CONNECT}"), SecretStr(f"eu={EU}"), SecretStr(f"eu={EU}2"))
PATHS = {None: WEBHOOK_PATH, "connect": f"{WEBHOOK_PATH}/connect", "eu": f"{WEBHOOK_PATH}/eu"}
SINGLE, BATCH = "invoice.payment_failed", "customer.created"

seen: list[tuple[str, str | None]] = []


async def note(event: Event, context: Context) -> str:
    """One effect, and what the handler sees."""
    seen.append((event.id, event.endpoint))
    await effect(event, context)
    return "noted"


async def note_all(events: list[Event], _context: BatchContext) -> str:
    """What a batch handler sees."""
    seen.extend((event.id, event.endpoint) for event in events)
    return "noted"


@pytest.fixture
async def named(make_world: MakeWorld) -> World:
    """A process with two named endpoints, and one without a name."""
    seen.clear()
    return await make_world({SINGLE: note}, {BATCH: note_all}, stripe_webhook_secrets=SECRETS)


@pytest.fixture
async def client(named: World) -> AsyncIterator[httpx.AsyncClient]:
    """Requests to its application."""
    create_series(named.settings, Registry(()))
    app: Starlette = application(named.settings, named.components, Shutdown(0, 5))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as client:
        yield client


async def post(client: httpx.AsyncClient, endpoint: str | None, body: bytes, secret: str) -> tuple[int, str]:
    """Status and action of the answer."""
    answer = await client.post(PATHS[endpoint], content=body, headers=signed(body, secret))
    return answer.status_code, answer.json()["action"]


def counted(endpoint: str | None) -> dict[str, int]:
    """The requests to an endpoint so far, by result."""
    series = metrics.endpoint_requests(endpoint)
    return {result: metrics.own(counter) for result, counter in series.items()}


@pytest.mark.parametrize(
    ("endpoint", "secret", "verified"),
    [
        (None, SECRET, True),
        ("connect", CONNECT, True),
        ("eu", EU, True),
        ("eu", EU + "2", True),
        (None, CONNECT, False),
        ("connect", SECRET, False),
        ("connect", EU, False),
        ("eu", CONNECT, False),
    ],
)
async def test_an_endpoint_takes_its_own_secrets_only(
    named: World, client: httpx.AsyncClient, endpoint: str | None, secret: str, verified: bool
) -> None:
    """What another endpoint's secret has signed is refused, without a row; two secrets of one endpoint both verify."""
    body = event_body(SINGLE)
    expected = {name: counted(name) for name in PATHS}
    assert await post(client, endpoint, body, secret) == ((200, "noted") if verified else (400, "rejected"))
    assert len(seen) == verified
    expected[endpoint]["verified" if verified else "signature_refused"] += 1
    assert {name: counted(name) for name in expected} == expected


@pytest.mark.parametrize("flushed", [False, True])
async def test_one_event_at_two_endpoints_is_one_event(named: World, client: httpx.AsyncClient, flushed: bool) -> None:
    """Stripe sends one event to each subscribed endpoint: the second is a duplicate, also by the ledger alone."""
    body = event_body(SINGLE, "evt_1", account="acct_1")
    assert await post(client, "connect", body, CONNECT) == (200, "noted")
    if flushed:
        await named.redis.delete(named.lock._key("evt_1"))
    assert await post(client, None, body, SECRET) == (200, "ignored")
    assert (await named.row("evt_1"))["endpoint"] == "connect"
    assert await named.effects("evt_1") == 1


async def test_events_of_two_accounts_are_two(named: World, client: httpx.AsyncClient) -> None:
    """Two accounts have two events, with ids that Stripe drew: each has its row, its effect and its endpoint's name."""
    for endpoint, secret, event_id in (("connect", CONNECT, "evt_a"), ("eu", EU, "evt_b")):
        assert await post(client, endpoint, event_body(SINGLE, event_id), secret) == (200, "noted")
    assert seen == [("evt_a", "connect"), ("evt_b", "eu")]
    assert [await named.effects(each) for each in ("evt_a", "evt_b")] == [1, 1]


@pytest.mark.parametrize("event_type", [SINGLE, BATCH])
async def test_recovery_knows_the_endpoint(named: World, client: httpx.AsyncClient, event_type: str) -> None:
    """A handler that recovery starts, and a batch handler, see the same name as one that a delivery starts."""
    body = event_body(event_type, "evt_1")
    lock = await named.lock.acquire("evt_1", new_token(), None)
    assert lock is LockReply.HELD
    assert await post(client, "eu", body, EU) == (200, "ignored")  # recorded
    assert await named.status("evt_1") is Status.PENDING
    await named.redis.delete(named.lock._key("evt_1"))
    await named.change("evt_1", due_at=-1.0)

    async def recovered() -> bool:
        await named.pipeline.recover()
        return bool(seen)

    await until(recovered)
    assert seen == [("evt_1", "eu")]


async def test_events_are_selected_by_endpoint(named: World) -> None:
    """A selection by name has that endpoint's events, and the empty name those of the endpoint without one."""
    for event_id, endpoint in (("evt_1", "connect"), ("evt_2", "eu"), ("evt_3", None)):
        body = event_body(SINGLE, event_id)
        await named.ledger.record(Delivery(parse_event(body, endpoint), body, endpoint=endpoint), due_in_seconds=0)
    async with Commands.connect(named.url, 5) as operations:
        for name, ids in (("connect", ["evt_1"]), ("", ["evt_3"]), ("other", []), (None, ["evt_3", "evt_2", "evt_1"])):
            found = await operations.list_events(Selection(endpoint=name), 10)
            assert [event.event_id for event in found] == ids
        assert (await operations.list_events(Selection(endpoint="eu"), 10))[0].endpoint == "eu"
    assert str(Selection(endpoint="eu")) == "endpoint=eu"
    assert str(Selection(endpoint="")) == "endpoint=-"


async def test_without_an_endpoint_without_a_name_its_path_is_none(make_world: MakeWorld) -> None:
    """If all secrets have names, the bare path is a 404, and so is a name that no secret has."""
    world = await make_world({}, stripe_webhook_secrets=SECRETS[1:])
    app = application(world.settings, world.components, Shutdown(0, 5))
    body = event_body(SINGLE)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as client:
        for path in (WEBHOOK_PATH, f"{WEBHOOK_PATH}/", f"{WEBHOOK_PATH}/other", f"{WEBHOOK_PATH}/eu/x"):
            answer = await client.post(path, content=body, headers=signed(body, EU))
            assert (answer.status_code, answer.json()["reason"]) == (404, "No such path")
        assert (await client.get(f"{WEBHOOK_PATH}/eu")).status_code == 405
        assert (await client.post(f"{WEBHOOK_PATH}/eu/", content=body, headers=signed(body, EU))).status_code == 200
