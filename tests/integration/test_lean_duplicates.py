"""What a finished duplicate costs: one command to Redis, and nothing of asyncio's or Starlette's besides."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import orjson
import pytest

from firstclaim.outcome import duplicate
from firstclaim.web.application import Application
from firstclaim.web.webhook import WEBHOOK_PATH, Webhook
from tests.fixtures import SECRET, event_body, signed
from tests.integration.conftest import MakeWorld
from tests.integration.world import World, effect


@pytest.fixture
async def world(make_world: MakeWorld) -> World:
    """One process."""
    return await make_world({"*": effect})


def application(world: World) -> Application:
    """The paths of the service."""
    return Application({None: Webhook(world.pipeline, [SECRET], 300, 1_000_000)}, [], None)


async def deliver(application: Application, body: bytes) -> dict[str, Any]:
    """The content of the answer. Fails unless it is two messages, which uvicorn asks of every application."""
    headers = [(name.lower().encode(), value.encode()) for name, value in signed(body).items()]
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body}

    async def send(message: Any) -> None:
        sent.append(message)

    await application({"type": "http", "method": "POST", "path": WEBHOOK_PATH, "headers": headers}, receive, send)
    start, end = sent
    assert start["status"] == 200
    content: dict[str, Any] = orjson.loads(end["body"])
    return content


@contextmanager
def counted_tasks() -> Iterator[list[str]]:
    """The names of the coroutines that a task is made for while the block runs."""
    made: list[str] = []
    loop = asyncio.get_running_loop()

    def factory(loop: asyncio.AbstractEventLoop, work: Any, **options: Any) -> asyncio.Task[Any]:
        made.append(work.__qualname__)
        return asyncio.Task(work, loop=loop, **options)

    loop.set_task_factory(factory)
    try:
        yield made
    finally:
        loop.set_task_factory(None)


async def test_a_finished_duplicate_makes_no_task(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is answered in the task of the request, without an object of Starlette's; a fresh event has its own task."""
    app = application(world)
    body, fresh = event_body(id="evt_1"), event_body(id="evt_2")
    assert (await deliver(app, body))["processed"]
    for name in ("requests.HTTPConnection", "responses.Response", "datastructures.Headers"):
        monkeypatch.setattr(f"starlette.{name}.__init__", None)
    with counted_tasks() as made:
        for _ in range(10):
            assert (await deliver(app, body))["reason"] == duplicate("evt_1").reason
    assert made == []
    with counted_tasks() as made:
        assert (await deliver(app, fresh))["processed"]
    assert "Pipeline._process" in made


async def test_many_at_once_are_a_few_round_trips(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finished duplicates that arrive together share round trips to Redis, and make no task for them either."""
    app = application(world)
    bodies = [event_body() for _ in range(50)]
    for body in bodies:
        await deliver(app, body)
    commands = world.redis_server._commands
    writes = 0
    send = commands._send

    def counted() -> None:
        nonlocal writes
        idle = not commands._sent
        send()
        writes += idle and bool(commands._sent)

    monkeypatch.setattr(commands, "_send", counted)
    requests = [asyncio.ensure_future(deliver(app, body)) for body in bodies]
    with counted_tasks() as made:
        answers = await asyncio.gather(*requests)
    assert {answer["action"] for answer in answers} == {"ignored"}
    assert made == []
    assert writes <= 2
