"""A server in a process of its own, of whatever command: uvicorn with an application that embeds the service, say."""

import asyncio
import re
import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.acceptance.harness import START_SECONDS, eventually


@dataclass(frozen=True, slots=True)
class ServerProcess:
    """A running server."""

    process: asyncio.subprocess.Process
    output: Path

    async def says(self, pattern: str) -> str:
        """Wait until its output has the pattern; returns the match, or its group."""

        async def look() -> re.Match[str] | None:
            found = re.search(pattern, self.output.read_text())
            assert found or self.process.returncode is None, self.output.read_text()
            return found

        match = await eventually(look, seconds=START_SECONDS)
        assert match is not None
        return match[match.lastindex or 0]

    async def origin(self) -> str:
        """Where it listens, as it prints it."""
        return await self.says(r"(http://127\.0\.0\.1:\d+)")

    async def stop(self) -> None:
        """SIGTERM, and wait until the application and the process have ended."""
        self.process.terminate()
        await self.says("Application shutdown complete")
        await asyncio.wait_for(self.process.wait(), START_SECONDS)


@asynccontextmanager
async def server_process(folder: Path, environment: Mapping[str, str], *command: str) -> AsyncIterator[ServerProcess]:
    """Run a command in `folder`. It is killed if it still runs when the block ends."""
    output = folder / f"server-{secrets.token_hex(4)}.log"
    with output.open("wb") as file:
        process = await asyncio.create_subprocess_exec(
            *command, cwd=folder, env=environment, stdin=asyncio.subprocess.DEVNULL, stdout=file, stderr=file
        )
    try:
        yield ServerProcess(process, output)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        print(output.read_text())  # pytest shows it if the test failed
