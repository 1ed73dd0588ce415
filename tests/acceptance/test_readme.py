"""The README's commands for the first minute, as they stand there, except for the port and the installation."""

import re
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.acceptance.command import Command, Running
from tests.acceptance.harness import PYTHON_PATH
from tests.blocks import block

README = "README.md"


def arguments(command: str) -> list[str]:
    """The words behind `firstclaim`."""
    return shlex.split(command.rpartition(".venv/bin/firstclaim ")[2])


async def address(running: Running) -> str:
    """The webhook endpoint that `serve` has printed."""
    await running.shows("try ")
    found = re.search(r"webhooks +POST (\S+)", running.output.read_text())
    assert found
    return found[1]


@pytest.fixture
def folder() -> Iterator[Path]:
    """Not below pytest's own folder: another session takes the right to search it from the servers' user."""
    with tempfile.TemporaryDirectory(prefix="firstclaim-readme-") as path:
        yield Path(path) / "trial"


async def test_the_commands_of_the_first_minute(folder: Path) -> None:
    """`serve` with nothing set starts both servers and prints its secret; `send` then gets one processed answer."""
    folder.mkdir()
    command = Command(folder, {"PATH": "/usr/bin:/bin", "PYTHONPATH": PYTHON_PATH, "HOME": str(folder)})
    async with command.running(*arguments(block(README, "serve")), "--port", "0") as service:
        url = await address(service)
        assert re.search(r"secret +whsec_\w+ \(generated, stored in \.firstclaim\)", service.output.read_text())
        sent = await command(*arguments(block(README, "twenty copies")), "--url", url)
        assert sent.code == 0, sent.output
        sent.shows("Processed once, of 20 copies.")
        service.interrupt()
        assert (await service.wait_for_exit()).code == 0
