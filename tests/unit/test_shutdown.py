"""The drain delay, with a handler of our own where the server's would be."""

import asyncio
import signal
from collections.abc import Iterator

import pytest

from firstclaim.shutdown import Shutdown


@pytest.fixture
def sigterm() -> Iterator[None]:
    """The process' handling of SIGTERM and SIGINT, put back afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("sigterm")
async def test_only_a_second_signal_skips_the_drain_delay() -> None:
    """The server's handling of the first signal waits for the drain; that of the second runs at once."""
    proceeded: list[int] = []
    skipped = asyncio.Event()

    def proceed(number: int, _frame: object) -> None:
        proceeded.append(number)
        skipped.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, proceed)
    shutdown = Shutdown(drain_seconds=60, shutdown_seconds=90)
    shutdown.install()
    signal.raise_signal(signal.SIGTERM)
    assert shutdown.requested
    signal.raise_signal(signal.SIGINT)
    async with asyncio.timeout(10):
        await skipped.wait()
    assert proceeded == [signal.SIGINT]
