"""The service inside a FastAPI application, served by uvicorn's own command."""

import asyncio
import sys
from pathlib import Path

import pytest

from firstclaim.status import Status
from tests.acceptance.harness import DEFERRED, PROCESSED, START_SECONDS, Sandbox, post, sample
from tests.acceptance.server_process import server_process

APPLICATION = """
from contextlib import asynccontextmanager

import firstclaim
from fastapi import FastAPI

webhooks = firstclaim.asgi()


@asynccontextmanager
async def lifespan(app):
    async with webhooks.lifespan():
        yield


app = FastAPI(lifespan=lifespan)
app.mount("/payments", webhooks)


@app.get("/")
def home() -> str:
    return "a shop"
"""


@pytest.mark.smoke
async def test_a_mounted_service_dispatches_and_drains(sandbox: Sandbox, tmp_path: Path) -> None:
    """Deliveries below the prefix are dispatched; at SIGTERM the handler that runs is finished before the exit."""
    (tmp_path / "shop_app.py").write_text(APPLICATION)
    gate = tmp_path / "gate"
    slow = sample("hold", gate=str(gate))
    environment = sandbox.environment({"answer_budget_seconds": 0.5})
    command = (sys.executable, "-m", "uvicorn", "--port", "0", "shop_app:app")
    async with server_process(tmp_path, environment, *command) as server:
        url = await server.origin() + "/payments/webhooks/stripe"
        assert (await post(url, sample("plain").body)).result == PROCESSED
        assert (await post(url, slow.body)).result == DEFERRED  # past the answer's budget, and it still runs
        server.process.terminate()
        await server.says("Waiting for application shutdown")
        gate.touch()
        await server.says("Application shutdown complete")
        await asyncio.wait_for(server.process.wait(), START_SECONDS)
    row = await sandbox.row(slow)
    assert row is not None
    assert (row.status, row.counts) == (Status.COMPLETED, (1, 0, 0))
