"""`firstclaim` as an operator runs it: a process in a folder of its own, and everything that it wrote.

Guarantees: no run leaves a process behind, and none may show a traceback or one of the two secrets below.
"""

import asyncio
import secrets
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.acceptance.harness import eventually

RUN_SECONDS = 120
PASSWORD = "pa55w0rd-in-a-url"
SECRET = "whsec_must_not_be_printed"


@dataclass(frozen=True, slots=True)
class Run:
    """The exit code of a command, and everything that it wrote."""

    code: int
    output: str

    def shows(self, *words: str) -> None:
        """Assert that the output contains every one of `words`."""
        for word in words:
            assert word in self.output, f"{word!r} is missing in:\n{self.output}"


@asynccontextmanager
async def serving(
    command: str, folder: Path, environment: dict[str, str], *, stop: signal.Signals, seconds: float
) -> AsyncIterator["Running"]:
    """A service that a page's command starts in a terminal, ready, until `stop`, on which it ends with 0 in time."""
    output = folder / "serve.log"
    with output.open("wb") as file:
        process = await asyncio.create_subprocess_shell(
            f"exec env {command}", cwd=folder, env=environment, stdout=file, stderr=file
        )
    running = Running(process, output)
    try:
        await running.shows("Application startup complete")
        yield running
    finally:
        if process.returncode is None:
            process.send_signal(stop)
        async with asyncio.timeout(seconds):
            assert await process.wait() == 0, output.read_text()


@dataclass(frozen=True, slots=True)
class Running:
    """A command that is running, or has just ended."""

    process: asyncio.subprocess.Process
    output: Path

    async def shows(self, word: str) -> None:
        """Wait until the output contains `word`."""

        async def text_so_far() -> str:
            text = self.output.read_text(errors="replace")
            assert self.process.returncode is None or word in text, text
            return text

        await eventually(text_so_far, lambda text: word in text, RUN_SECONDS)

    def interrupt(self) -> None:
        """Send SIGINT, as Ctrl-C does."""
        self.process.send_signal(signal.SIGINT)

    async def wait_for_exit(self) -> Run:
        """Wait until it has ended. Its output may hold no traceback and none of the two secrets."""
        async with asyncio.timeout(RUN_SECONDS):
            await self.process.wait()
        assert self.process.returncode is not None
        run = Run(self.process.returncode, self.output.read_text())
        assert "Traceback" not in run.output, run.output
        assert PASSWORD not in run.output
        assert SECRET not in run.output
        return run


@dataclass(frozen=True, slots=True)
class Command:
    """Runs `firstclaim` in a folder of its own, with a valid environment that a test changes."""

    folder: Path
    environment: Mapping[str, str]

    async def __call__(self, *arguments: str, **changes: str | None) -> Run:
        async with self.running(*arguments, **changes) as running:
            return await running.wait_for_exit()

    @asynccontextmanager
    async def running(self, *arguments: str, **changes: str | None) -> AsyncIterator[Running]:
        """Start a command; kill it if it is still running when the block ends."""
        environment = {**self.environment, **changes}
        output = self.folder.with_name(f"{self.folder.name}-{secrets.token_hex(4)}.log")  # the folder is the run's own
        with output.open("wb") as file:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "firstclaim", *arguments),
                cwd=self.folder,
                env={name: value for name, value in environment.items() if value is not None},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=file,
                stderr=file,
            )
        try:
            yield Running(process, output)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
