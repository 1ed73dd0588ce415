"""Log lines: when they are written, whole and in order, and that only a kill loses any."""

import asyncio
import io
import select
import subprocess
import sys
import threading

import pytest

from firstclaim.observability.log_lines import LogLines

LOGS = """
import asyncio, os, sys
import structlog
from firstclaim.observability.logging import configure
configure("json", "info")
async def main():
    structlog.get_logger().info("delivery")
    {end}
asyncio.run(main())
"""


class Stream(io.StringIO):
    """A stream that keeps each write."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[str] = []

    def write(self, text: str) -> int:
        self.writes.append(text)
        return super().write(text)


@pytest.fixture
def stream() -> Stream:
    return Stream()


@pytest.fixture
def lines(stream: Stream) -> LogLines:
    return LogLines(stream)


async def written(stream: Stream) -> list[str]:
    """The writes, once there is one."""
    async with asyncio.timeout(10):
        while not stream.writes:  # noqa: ASYNC110  (no event to wait for)
            await asyncio.sleep(0.001)
    return stream.writes


async def test_ordinary_lines_are_written_together(stream: Stream, lines: LogLines) -> None:
    """Lines of one moment are one write, and so are those of a later one."""
    for moment in ("a", "b"):
        lines.gather(f"{moment}1")
        lines.gather(f"{moment}2")
        assert not stream.writes
        assert await written(stream) == [f"{moment}1\n{moment}2\n"]
        stream.writes.clear()


async def test_a_warning_is_written_at_once(stream: Stream, lines: LogLines) -> None:
    """A line that must not be lost is written before the call returns, after the lines that were gathered before."""
    lines.gather("delivery")
    lines.write_line("warning")
    assert stream.writes == ["delivery\nwarning\n"]


def test_without_a_loop_a_line_is_written_at_once(stream: Stream, lines: LogLines) -> None:
    """A command, or a thread of a sync handler, has no timer: its line is written before the call returns."""
    lines.gather("command")
    assert stream.writes == ["command\n"]


async def test_a_thread_writes_what_the_loop_has_gathered(stream: Stream, lines: LogLines) -> None:
    """The line of a thread comes after those that the event loop has gathered before."""
    lines.gather("loop")
    thread = threading.Thread(target=lines.gather, args=("thread",))
    thread.start()
    thread.join()
    assert stream.writes == ["loop\nthread\n"]


def test_a_loop_that_ended_takes_no_line_along(stream: Stream, lines: LogLines) -> None:
    """Lines whose loop ended before its timer are written by the next loop's."""

    async def ends() -> None:
        lines.gather("first")

    async def waits() -> None:
        lines.gather("second")
        await written(stream)

    asyncio.run(ends())
    assert not stream.writes
    asyncio.run(waits())
    assert stream.writes == ["first\nsecond\n"]


async def test_no_write_can_be_torn(stream: Stream, lines: LogLines) -> None:
    """Each write has whole lines, and no more than a pipe takes in one piece, unless a single line is longer."""
    given = [f"{number} {'x' * 150}" for number in range(100)] + ["y" * 3 * select.PIPE_BUF] + ["z"]
    for line in given:
        lines.gather(line)
    await written(stream)
    assert "".join(stream.writes).splitlines() == given
    assert all(write.endswith("\n") for write in stream.writes)
    assert all(len(write) <= select.PIPE_BUF or write.count("\n") == 1 for write in stream.writes)
    assert len(stream.writes) < 10


def output(end: str) -> list[str]:
    """The lines "delivery" of a process that logs one on its event loop, then ends in this way.

    (From Python 3.14 on, the loop of a forked child logs an error of its own.)
    """
    done = subprocess.run(
        [sys.executable, "-c", LOGS.format(end=end)], capture_output=True, text=True, timeout=60, check=False
    )
    return [line for line in done.stderr.splitlines() if '"event":"delivery"' in line]


@pytest.mark.parametrize("end", ["return", "sys.exit(3)", "raise RuntimeError"])
def test_the_end_of_the_process_loses_nothing(end: str) -> None:
    """A line that was logged just before the end of the process is written, whatever ends it but a kill."""
    assert len(output(end)) == 1


def test_a_fork_repeats_no_line() -> None:
    """A process that forks writes what it has gathered first, so that its child does not write it too."""
    assert len(output("os.fork()")) == 1
