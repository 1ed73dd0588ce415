"""The tutorial, block by block, in a folder of its own: written, served, sent, tested, killed and recovered.

Only the times are shorter than a reader's: the lease, the lock and the backoff after which a killed event is due.
"""

import asyncio
import os
import re
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, suppress
from pathlib import Path

import pytest

from tests.acceptance.command import Running, serving
from tests.acceptance.harness import PYTHON_PATH
from tests.blocks import block

PAGE = "docs/tutorial/first-handler.md"
SECONDS = 180
QUICK = {"LEASE_SECONDS": "1", "LOCK_TTL_SECONDS": "1", "BACKOFF_FIRST_SECONDS": "0.2"}


@pytest.fixture
def folder() -> Iterator[Path]:
    """Not below pytest's own folder: another run of pytest closes that to the user of the embedded servers."""
    with tempfile.TemporaryDirectory(prefix="firstclaim-tutorial-", ignore_cleanup_errors=True) as path:
        yield Path(path)


@pytest.fixture
def environment(folder: Path) -> dict[str, str]:
    """As in a new terminal with the virtual environment: a free port, and the shorter times."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    kept = {name: os.environ[name] for name in ("HOME", "LANG", "TMPDIR") if name in os.environ}
    quick = {f"FIRSTCLAIM_{name}": value for name, value in QUICK.items()}
    commands = folder / "bin"
    commands.mkdir()
    for name in ("firstclaim", "python"):
        module = "-m firstclaim " if name == "firstclaim" else ""
        (commands / name).write_text(f'#!/bin/sh\nexec {sys.executable} {module}"$@"\n')
        (commands / name).chmod(0o755)
    path = f"{commands}:{os.environ['PATH']}"
    return {**kept, **quick, "PATH": path, "PYTHONPATH": PYTHON_PATH, "FIRSTCLAIM_PORT": str(port)}


async def shell(commands: str, folder: Path, environment: dict[str, str]) -> str:
    """What a block writes; each of its commands must succeed."""
    output = folder / "output"
    with output.open("wb") as file:  # and no pipe: the service that a block starts keeps it open
        process = await asyncio.create_subprocess_exec(
            "bash", "-euc", commands, cwd=folder, env=environment, stdout=file, stderr=file
        )
        async with asyncio.timeout(SECONDS):
            await process.wait()
    assert process.returncode == 0, output.read_text()
    return output.read_text()


def first_terminal(folder: Path, environment: dict[str, str]) -> AbstractAsyncContextManager[Running]:
    """The first terminal of the tutorial, until Ctrl-C."""
    return serving(block(PAGE, "serve"), folder, environment, stop=signal.SIGINT, seconds=SECONDS)


def counted(output: str) -> int:
    """The number in psql's table."""
    [number] = re.findall(r"^ +(\d+)$", output, flags=re.MULTILINE)
    return int(number)


@pytest.mark.timeout(2 * SECONDS)
async def test_the_tutorial_from_nothing_to_recovered(folder: Path, environment: dict[str, str]) -> None:
    """Every block runs in the page's order, and what the page says about its result is so."""
    (folder / "shop").mkdir()
    (folder / "shop" / "handlers.py").write_text(block(PAGE, "shop/handlers.py"))
    async with first_terminal(folder, environment) as service:
        assert "shop.handlers.ship" in service.output.read_text()
        assert "Processed once, of 20 copies." in await shell(block(PAGE, "twenty copies"), folder, environment)
        refused = await shell(block(PAGE, "refused"), folder, environment)
        for word in ("completed", "dead", "we only ship within the US", "(1 row)"):
            assert word in refused, refused
    (folder / "conftest.py").write_text(block(PAGE, "conftest.py"))
    (folder / "test_ship.py").write_text(block(PAGE, "test_ship.py"))
    assert "2 passed" in await shell(block(PAGE, "pytest"), folder, environment)
    (folder / "shop" / "warehouse.py").write_text(block(PAGE, "shop/warehouse.py"))
    handlers = {**environment, "FIRSTCLAIM_HANDLERS": "shop.handlers,shop.warehouse"}  # of the same terminal
    try:
        await shell(block(PAGE, "background"), folder, environment)
        assert counted(await shell(block(PAGE, "kill"), folder, handlers)) == 0
        recovered = await shell(block(PAGE, "recover"), folder, handlers)
    finally:
        await stop(folder)
    assert counted(recovered) == 1
    assert "Traceback" not in (folder / "serve.log").read_text()


async def stop(folder: Path) -> None:
    """End the service in the background, if it still runs, and wait until its servers have stopped."""
    pid = int((folder / "serve.pid").read_text())
    async with asyncio.timeout(SECONDS):
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            while b") Z " not in Path(f"/proc/{pid}/stat").read_bytes():
                os.kill(pid, signal.SIGTERM)
                await asyncio.sleep(0.1)
