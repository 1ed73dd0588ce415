"""The README's first handler, as it stands: the module, its table, `serve --reload`, and the commands beside it."""

import asyncio
import os
import re
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.acceptance import command as commands
from tests.acceptance.command import Running
from tests.acceptance.harness import eventually
from tests.blocks import block

README = "README.md"
SECONDS = 120


@pytest.fixture
def folder() -> Iterator[Path]:
    """Not below pytest's own folder: another run of pytest closes that to the user of the embedded servers."""
    with tempfile.TemporaryDirectory(prefix="firstclaim-first-", ignore_cleanup_errors=True) as path:
        yield Path(path)


@pytest.fixture
def environment() -> dict[str, str]:
    """As in a new terminal: no setting but a free port."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    kept = {name: os.environ[name] for name in ("HOME", "LANG", "TMPDIR") if name in os.environ}
    return {**kept, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "FIRSTCLAIM_PORT": str(port)}


async def shell(command: str, folder: Path, environment: dict[str, str]) -> str:
    """What the command writes; it must succeed."""
    process = await asyncio.create_subprocess_shell(
        command, cwd=folder, env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    async with asyncio.timeout(SECONDS):
        written, _ = await process.communicate()
    assert process.returncode == 0, written.decode()
    return written.decode()


@pytest.fixture
async def serving(folder: Path, environment: dict[str, str]) -> AsyncIterator[Running]:
    """The README's service, in a folder with the README's handler."""
    (folder / "shop").mkdir()
    (folder / "shop" / "handlers.py").write_text(block(README, "first handler"))
    async with commands.serving(
        block(README, "first serve"), folder, environment, stop=signal.SIGTERM, seconds=SECONDS
    ) as running:
        yield running


async def test_the_first_handler_runs_as_it_stands(serving: Running, folder: Path, environment: dict[str, str]) -> None:
    """Each command of the README succeeds, and the handler's effect and refusal are what it says."""
    text = serving.output.read_text()
    assert re.search(r"^handlers +invoice\.paid +shop\.handlers\.grant_access$", text, re.MULTILINE)
    assert re.search(r"^try .*--copies 20$", text, re.MULTILINE)  # no --url: `send` has the same environment
    create, send, refuse, listing, select = block(README, "first events").splitlines()
    assert "CREATE TABLE" in await shell(create, folder, environment)
    assert "Processed once, of 20 copies." in await shell(send, folder, environment)
    refused = await shell(refuse, folder, environment)
    assert "dead" in refused
    assert re.search(r"^event evt_\w+$", refused, re.MULTILINE)
    listed = await shell(listing, folder, environment)
    assert "access_granted" in listed
    assert "we only sell in dollars" in listed
    assert "(1 row)" in await shell(select, folder, environment)


async def test_a_saved_file_is_served(serving: Running, folder: Path, environment: dict[str, str]) -> None:
    """After a change the new handler answers; after a broken one the fault is told, and the next change is served."""
    await shell(block(README, "first events").splitlines()[0], folder, environment)
    module = folder / "shop" / "handlers.py"

    async def answer() -> str:
        return await shell("firstclaim send invoice.paid || true", folder, environment)

    module.write_text(block(README, "first handler").replace("access_granted", "first_change"))
    await eventually(answer, lambda text: "first_change" in text, SECONDS)
    module.write_text("import nothing_of_this_name")
    await serving.shows("cannot import shop.handlers")
    await serving.shows("waiting_for_change")
    module.write_text(block(README, "first handler").replace("access_granted", "second_change"))
    await eventually(answer, lambda text: "second_change" in text, SECONDS)
    assert "Traceback" not in serving.output.read_text()


async def test_only_serve_creates_a_store(folder: Path, environment: dict[str, str]) -> None:
    """Any other command in an empty folder names the variable, exits with 2, and leaves the folder empty."""
    for command in ("check", "migrate", "events list", "stats", "psql", "epoch rotate"):
        told = await shell(f"firstclaim {command}; test $? = 2", folder, environment)
        assert "DATABASE_URL is not set" in told
        assert ("REDIS_URL is not set" in told) == (command == "check")
        assert list(folder.iterdir()) == []
