"""The service inside the page's FastAPI application, served by uvicorn's own command."""

import asyncio
import sys
from pathlib import Path

import pytest

from firstclaim.status import Status
from tests.acceptance.harness import DEFERRED, START_SECONDS, Sandbox, post, sample
from tests.acceptance.server_process import server_process
from tests.blocks import block

PAGE = "docs/how-to/embed.md"


@pytest.mark.smoke
async def test_a_mounted_service_dispatches_and_drains(sandbox: Sandbox, tmp_path: Path) -> None:
    """Deliveries below the prefix are dispatched; at SIGTERM the handler that runs is finished before the exit."""
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "main.py").write_text(block(PAGE, "shop/main.py"))
    gate = tmp_path / "gate"
    plain, slow = sample("plain"), sample("hold", gate=str(gate))
    environment = sandbox.environment({"answer_budget_seconds": 0.5})
    words = block(PAGE, "uvicorn").rpartition("&& ")[2].split()
    command = (sys.executable, "-m", *words, "--port", "0")
    async with server_process(tmp_path, environment, *command) as server:
        url = await server.origin() + "/payments/webhooks/stripe"
        await post(url, plain.body)  # on a busy machine, its answer may be `deferred` too
        await sandbox.settled(plain)
        assert (await post(url, slow.body)).result == DEFERRED  # past the answer's budget, and it still runs
        server.process.terminate()
        await server.says("Waiting for application shutdown")
        gate.touch()
        await server.says("Application shutdown complete")
        await asyncio.wait_for(server.process.wait(), START_SECONDS)
    row = await sandbox.row(slow)
    assert row is not None
    assert (row.status, row.counts) == (Status.COMPLETED, (1, 0, 0))
