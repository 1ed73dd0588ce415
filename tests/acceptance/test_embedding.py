"""The service inside a FastAPI application, served by uvicorn's own command."""

import asyncio
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from firstclaim.status import Status
from tests.acceptance.harness import DEFERRED, PROCESSED, START_SECONDS, Sandbox, eventually, post, sample

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


@dataclass(frozen=True, slots=True)
class Uvicorn:
    """A running uvicorn."""

    process: asyncio.subprocess.Process
    output: Path

    async def says(self, pattern: str) -> str:
        """Wait for a line of its output; returns the pattern's group."""

        async def look() -> re.Match[str] | None:
            found = re.search(pattern, self.output.read_text())
            assert found or self.process.returncode is None, self.output.read_text()
            return found

        match = await eventually(look, seconds=START_SECONDS)
        assert match is not None
        return match[match.lastindex or 0]


@asynccontextmanager
async def uvicorn(folder: Path, environment: dict[str, str], app: str) -> AsyncIterator[Uvicorn]:
    """uvicorn's own command on a free port; killed if it still runs when the block ends."""
    output = folder / "uvicorn.log"
    with output.open("wb") as file:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "uvicorn", "--port", "0", app),
            cwd=folder,
            env=environment,
            stdout=file,
            stderr=file,
        )
    try:
        yield Uvicorn(process, output)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        print(output.read_text())  # pytest shows it if the test failed


@pytest.mark.smoke
async def test_a_mounted_service_dispatches_and_drains(sandbox: Sandbox, tmp_path: Path) -> None:
    """Deliveries below the prefix are dispatched; at SIGTERM the handler that runs is finished before the exit."""
    (tmp_path / "shop_app.py").write_text(APPLICATION)
    gate = tmp_path / "gate"
    slow = sample("hold", gate=str(gate))
    async with uvicorn(tmp_path, sandbox.environment({"answer_budget_seconds": 0.5}), "shop_app:app") as server:
        url = await server.says(r"running on (http://127\.0\.0\.1:\d+)") + "/payments/webhooks/stripe"
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
