"""`firstclaim.asgi` in another application: it accepts only what it can finish, and leaves the process alone."""

import asyncio
import logging
import signal
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import httpx
import pytest
from fastapi import FastAPI
from pydantic import SecretStr
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.types import ASGIApp

import firstclaim
from firstclaim.errors import ConfigurationError, StoreUnsuitable
from firstclaim.mounted import MountedApp
from firstclaim.settings import Settings
from tests.fixtures import SECRET, event_body, signed
from tests.stores import Stores

GATES: dict[str, asyncio.Event] = {}  # of the test that runs


@firstclaim.on("invoice.paid")
async def counts(event: firstclaim.Event, context: firstclaim.Context) -> str:
    await context.fetch("INSERT INTO effects VALUES ($1, $2, 0, '0')", event.id, context.attempt)
    return "counted"


@firstclaim.on("charge.refunded")
async def waits(event: firstclaim.Event, context: firstclaim.Context) -> str:
    GATES["started"].set()
    await GATES["release"].wait()
    return await counts(event, context)


@pytest.fixture
def settings(database_url: str, stores: Stores, redis_prefix: str) -> Settings:
    """This module's handlers, on stores of the test's own."""
    return Settings(
        database_url=SecretStr(database_url),
        redis_url=SecretStr(stores.redis_url),
        stripe_webhook_secrets=(SecretStr(SECRET),),
        handlers=(__name__,),
        redis_prefix=redis_prefix,
        recovery_interval_seconds=0.05,
        shutdown_seconds=5,
    )


async def post(app: ASGIApp, path: str, type: str = "invoice.paid") -> httpx.Response:  # noqa: A002
    """The answer to one delivery."""
    body = event_body(type)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop") as client:
        return await client.post(path, content=body, headers=signed(body))


async def get(app: ASGIApp, path: str) -> int:
    """The status of a GET."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop") as client:
        return (await client.get(path)).status_code


@asynccontextmanager
async def served(app: ASGIApp) -> AsyncIterator[None]:
    """Run the application's lifespan as a server does."""
    received: asyncio.Queue[Any] = asyncio.Queue()
    sent: asyncio.Queue[Any] = asyncio.Queue()
    work = asyncio.ensure_future(
        app({"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}, received.get, sent.put)
    )
    await received.put({"type": "lifespan.startup"})
    assert await sent.get() == {"type": "lifespan.startup.complete"}
    yield
    await received.put({"type": "lifespan.shutdown"})
    assert await sent.get() == {"type": "lifespan.shutdown.complete"}
    await work


async def rows(settings: Settings) -> list[tuple[str, int]]:
    """Status and effects of each event."""
    assert settings.database_url is not None
    connection = await asyncpg.connect(settings.database_url.get_secret_value())
    found = await connection.fetch(
        "SELECT status, (SELECT count(*) FROM effects f WHERE f.event_id = e.event_id) AS effects"
        " FROM firstclaim.stripe_events e"
    )
    await connection.close()
    return [tuple(row) for row in found]


def refused(response: httpx.Response, reason: str) -> bool:
    """Whether it is the 503 that Stripe retries, with this reason."""
    assert reason in str(response.json()["reason"]), response.text
    return (response.status_code, "retry-after" in response.headers) == (503, True)


# -- accept only what can be finished -----------------------------------------------------------------


async def test_it_accepts_nothing_while_its_lifespan_does_not_run(settings: Settings) -> None:
    """Before, between and after its lifespans a delivery gets 503 with the reason, and no row."""
    webhooks = firstclaim.asgi(settings)
    for _ in range(2):
        assert refused(await post(webhooks, "/webhooks/stripe"), "must run its lifespan")
        async with webhooks.lifespan():
            assert (await post(webhooks, "/webhooks/stripe")).json()["action"] == "counted"
    assert refused(await post(webhooks, "/webhooks/stripe"), "must run its lifespan")
    assert await rows(settings) == [("completed", 1)] * 2


async def test_a_mounting_application_that_forgets_the_lifespan_accepts_nothing(settings: Settings) -> None:
    """FastAPI runs its own lifespan and not that of a mounted application: then nothing may be accepted."""
    parent = FastAPI()
    parent.mount("/", firstclaim.asgi(settings))
    async with served(parent):
        assert refused(await post(parent, "/webhooks/stripe"), "must run its lifespan")
    assert await rows(settings) == []


@pytest.mark.parametrize("begun", [True, False])
async def test_it_accepts_nothing_once_recovery_has_ended(settings: Settings, begun: bool) -> None:
    """A host that cancels tasks that it does not know ends recovery: no more is accepted, though the pools work."""
    webhooks = firstclaim.asgi(settings)
    async with webhooks.lifespan():
        if begun:
            await asyncio.sleep(0)
        [recovery] = [task for task in asyncio.all_tasks() if task.get_name() == "recovery"]
        recovery.cancel()
        await asyncio.wait({recovery})
        assert refused(await post(webhooks, "/webhooks/stripe"), "recovery has ended")
    assert await rows(settings) == []


async def test_it_accepts_nothing_on_another_event_loop(settings: Settings) -> None:
    """A request on another loop than the lifespan's is refused: its connections belong to that loop."""
    webhooks = firstclaim.asgi(settings)
    async with webhooks.lifespan():
        # Not the webhook's path: if it were accepted, two threads would use one connection, and may crash the process.
        response = await asyncio.to_thread(lambda: asyncio.run(post(webhooks, "/metrics/")))
        assert refused(response, "another event loop")


async def test_its_lifespan_is_entered_once(settings: Settings) -> None:
    """Two at once would be two services on one object: the second raises, and the first goes on."""
    webhooks = firstclaim.asgi(settings)
    async with webhooks.lifespan():
        with pytest.raises(RuntimeError, match="runs already"):
            async with webhooks.lifespan():
                pass
        assert (await post(webhooks, "/webhooks/stripe")).status_code == 200


# -- start and end ------------------------------------------------------------------------------------


async def test_it_does_not_start_on_a_database_without_a_ledger(settings: Settings, empty_url: str) -> None:
    """A fatal check of `serve` is an error of the lifespan, which names the command to run."""
    webhooks = firstclaim.asgi(settings.model_copy(update={"database_url": SecretStr(empty_url)}))
    with pytest.raises(StoreUnsuitable, match="firstclaim migrate"):
        async with webhooks.lifespan():
            pass
    assert refused(await post(webhooks, "/webhooks/stripe"), "must run its lifespan")


def test_missing_addresses_and_modules_are_named_at_once(settings: Settings) -> None:
    """What is wrong is said when the application is created, not at the first delivery."""
    with pytest.raises(ConfigurationError, match="DATABASE_URL"):
        firstclaim.asgi(settings.model_copy(update={"database_url": None}))
    with pytest.raises(ConfigurationError, match="no_such_module"):
        firstclaim.asgi(settings.model_copy(update={"handlers": ("no_such_module",)}))


@pytest.mark.parametrize("finishes", [True, False])
async def test_the_end_finishes_or_releases_what_runs(settings: Settings, finishes: bool) -> None:
    """A handler that runs at the end is completed if it ends in time, else its event is released without a charge."""
    GATES.update(started=asyncio.Event(), release=asyncio.Event())
    webhooks = MountedApp(settings.model_copy(update={"shutdown_seconds": 60 if finishes else 2.1}))
    async with webhooks.lifespan():
        delivery = asyncio.create_task(post(webhooks, "/webhooks/stripe", "charge.refunded"))
        await GATES["started"].wait()
        if finishes:
            asyncio.get_running_loop().call_later(0.05, GATES["release"].set)
    assert await rows(settings) == ([("completed", 1)] if finishes else [("pending", 0)])
    assert (await delivery).status_code == (200 if finishes else 202)


async def test_the_process_stays_the_host_s(settings: Settings) -> None:
    """Signal handlers, the root logger and the threads are those of before, also while it runs."""

    def seen() -> tuple[Any, ...]:
        return (
            [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)],
            list(logging.getLogger().handlers),
            logging.getLogger().level,
            threading.active_count(),
        )

    before = seen()
    webhooks = firstclaim.asgi(settings)
    async with webhooks.lifespan():
        assert (await post(webhooks, "/webhooks/stripe")).status_code == 200
        assert seen() == before
    assert seen() == before


# -- in which applications ----------------------------------------------------------------------------


def mounted_in(framework: type[Starlette], webhooks: MountedApp, prefix: str) -> Starlette:
    """An application that runs the lifespan from its own."""

    @asynccontextmanager
    async def lifespan(_app: Any) -> AsyncIterator[None]:
        async with webhooks.lifespan():
            yield

    return framework(routes=[Mount(prefix, webhooks)], lifespan=lifespan)


@pytest.mark.parametrize("prefix", ["", "/pay", "/shop/stripe"])
@pytest.mark.parametrize("framework", [Starlette, FastAPI])
async def test_it_can_be_mounted_anywhere(framework: type[Starlette], prefix: str, settings: Settings) -> None:
    """Under any prefix of Starlette's and FastAPI's: a delivery, the probe, and a path that is not there."""
    app = mounted_in(framework, firstclaim.asgi(settings), prefix)
    async with served(app):
        response = await post(app, f"{prefix}/webhooks/stripe")
        assert (response.status_code, response.json()["action"]) == (200, "counted")
        assert [await get(app, prefix + path) for path in ("/readyz", "/metrics", "/nothing")] == [200, 200, 404]
    assert await rows(settings) == [("completed", 1)]


async def test_a_server_can_serve_it_by_itself(settings: Settings) -> None:
    """It runs its lifespan when the server asks for it."""
    webhooks = firstclaim.asgi(settings)
    async with served(webhooks):
        assert (await post(webhooks, "/webhooks/stripe")).json()["action"] == "counted"


def test_settings_of_another_kind_are_refused_in_words() -> None:
    """A dict in place of `Settings`: what is expected is said."""
    settings: Any = {"database_url": "postgresql://127.0.0.1/db"}
    with pytest.raises(TypeError, match=r"expected firstclaim\.Settings\(\.\.\.\), or nothing, got dict"):
        firstclaim.asgi(settings)
