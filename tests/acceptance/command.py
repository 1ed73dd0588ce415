"""`firstclaim` as an operator runs it: a process in a folder of its own, and all that it said.

Guarantees: no run leaves a process behind; none may show a traceback, or one of the two secrets here.
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
    """How a command ended; `said` is everything it wrote."""

    code: int
    said: str

    def says(self, *words: str) -> None:
        """Every one of `words` was said, and none of what must never be."""
        for word in words:
            assert word in self.said, f"{word!r} is missing in:\n{self.said}"


@dataclass(frozen=True, slots=True)
class Running:
    """A command that has not ended, or only just."""

    process: asyncio.subprocess.Process
    output: Path

    async def says(self, word: str) -> None:
        """Wait until it has said `word`."""

        async def said() -> str:
            text = self.output.read_text(errors="replace")
            assert self.process.returncode is None or word in text, text
            return text

        await eventually(said, lambda text: word in text, RUN_SECONDS)

    def interrupt(self) -> None:
        """What Ctrl-C sends."""
        self.process.send_signal(signal.SIGINT)

    async def ended(self) -> Run:
        """Wait for its end."""
        async with asyncio.timeout(RUN_SECONDS):
            await self.process.wait()
        assert self.process.returncode is not None
        run = Run(self.process.returncode, self.output.read_text())
        assert "Traceback" not in run.said, run.said
        assert PASSWORD not in run.said
        assert SECRET not in run.said
        return run


@dataclass(frozen=True, slots=True)
class Command:
    """Runs `firstclaim` in a folder of its own, with a valid environment that a test changes."""

    folder: Path
    environment: Mapping[str, str]

    async def __call__(self, *arguments: str, **changes: str | None) -> Run:
        async with self.running(*arguments, **changes) as running:
            return await running.ended()

    @asynccontextmanager
    async def running(self, *arguments: str, **changes: str | None) -> AsyncIterator[Running]:
        """A run that is watched; it is killed if it is still there when the block ends."""
        environment = {**self.environment, **changes}
        output = self.folder.with_name(f"{self.folder.name}-{secrets.token_hex(4)}.said")  # the folder is the run's own
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
