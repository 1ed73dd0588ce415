"""Stripe's own CLI (`stripe listen --forward-to`) forwards events to a service, which dispatches them.

The CLI is the real one (`@stripe/cli` on npm), and talks to a stand-in for the API and the websocket that it gets its
events from. `.ci/run` installs it; without it the test is skipped.
"""

import asyncio
import contextlib
import shutil
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from tests.acceptance.harness import START_SECONDS, Sample, Sandbox, eventually, sample
from tests.acceptance.server_process import server_process
from tests.fixtures import SECRET, signed

INSTALLED = Path(sys.prefix) / "stripe-cli" / "node_modules" / ".bin" / "stripe"
CLI = shutil.which("stripe") or shutil.which(INSTALLED)

pytestmark = pytest.mark.skipif(
    CLI is None, reason="needs Stripe's CLI: npm install --prefix .venv/stripe-cli @stripe/cli"
)


class Backend:
    """What the CLI connects to: a session, and a websocket over which it gets events and returns the answers."""

    def __init__(self) -> None:
        self.origin = ""
        self._sessions: asyncio.Queue[WebSocket] = asyncio.Queue()
        self._answers: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.app = Starlette(
            routes=[
                Route("/v1/stripecli/sessions", self._session, methods=["POST"]),
                WebSocketRoute("/subscribe", self._subscribe),
            ]
        )

    async def _session(self, _request: Request) -> JSONResponse:
        return JSONResponse(
            {
                "websocket_id": "cliws_1",
                "websocket_url": f"{self.origin.replace('http', 'ws')}/subscribe",
                "websocket_authorized_feature": "webhooks",
                "secret": SECRET,
                "reconnect_delay": 600,
            }
        )

    async def _subscribe(self, socket: WebSocket) -> None:
        await socket.accept()
        await self._sessions.put(socket)
        async for text in socket.iter_text():
            message = orjson.loads(text)
            if message["type"] == "webhook_response":
                await self._answers.put(message)

    async def forwarded(self, *events: Sample) -> list[tuple[int, str]]:
        """Send the events to the CLI; status and action of the service's answer to each."""
        async with asyncio.timeout(START_SECONDS):
            socket = await self._sessions.get()
            found = []
            for event in events:
                message = {
                    "type": "webhook_event",
                    "endpoint": {"api_version": None},
                    "event_payload": event.body.decode(),
                    "http_headers": signed(event.body),
                    "webhook_conversation_id": f"wc_{event.id}",
                    "webhook_id": "we_1",
                }
                await socket.send_text(orjson.dumps(message).decode())
                answer = await self._answers.get()
                found.append((answer["status"], orjson.loads(answer["body"])["action"]))
        await self._sessions.put(socket)
        return found


@asynccontextmanager
async def backend() -> AsyncIterator[Backend]:
    """The stand-in, on a free port of the loopback."""
    stand_in = Backend()
    config = uvicorn.Config(stand_in.app, port=0, ws="wsproto", log_level="warning", lifespan="off")
    server = uvicorn.Server(config)
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign,assignment]  # pytest's
    serving = asyncio.create_task(server.serve())

    async def started() -> bool:
        assert not serving.done()
        return server.started

    await eventually(started)
    stand_in.origin = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        yield stand_in
    finally:
        server.should_exit = server.force_exit = True
        await serving


async def test_events_that_the_cli_forwards_are_dispatched(sandbox: Sandbox, tmp_path: Path) -> None:
    """The CLI passes signature and body on as they are: fresh events are processed, and a duplicate is ignored."""
    assert CLI is not None
    service = await sandbox.service().start()
    first, second = sample(), sample(type="customer.subscription.updated")
    async with backend() as stand_in:
        environment = {"HOME": str(tmp_path), "PATH": sandbox.environment()["PATH"], "STRIPE_CLI_TELEMETRY_OPTOUT": "1"}
        options = ("--all-snapshot", "--skip-update", "--api-key", "sk_test_123456789012")
        addresses = ("--api-base", stand_in.origin, "--forward-to", service.url)
        async with server_process(tmp_path, environment, CLI, "listen", *options, *addresses) as cli:
            await cli.says("Ready!")
            answers = await stand_in.forwarded(first, second, first)
            assert answers == [(200, "effect_recorded"), (200, "effect_recorded"), (200, "ignored")]
            await cli.says(rf"\[200\] POST \S+ \[{second.id}\]")
    await sandbox.all_settled([first, second])
