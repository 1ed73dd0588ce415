"""Row 31: many connections at once. Other deliveries do not become slower, and the process does not grow."""

import asyncio
import contextlib
import re
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from firstclaim.server.protocol import HEAD_SECONDS
from tests.acceptance.harness import PROCESSED, Sample, Service, eventually, sample
from tests.chaos.history import History
from tests.chaos.invalid_requests import HOST, MEBIBYTE, length, request, requests
from tests.chaos.load import Load
from tests.chaos.test_protocol import LATE_SECONDS, LIVEZ, one_answer
from tests.chaos.verdict import verdict
from tests.fixtures import event_body
from tests.raw_connection import RawConnection

pytestmark = pytest.mark.timeout(600)

SLOW = 500
# What a slow connection sends: nothing, half a head, half a body.
BEGINNINGS = (b"", LIVEZ, request([HOST, ("Content-Length", "9000")], b"{"))


@dataclass(slots=True)
class SlowConnections:
    """`count` connections that send next to nothing; each is opened again `pause_seconds` after it was closed."""

    service: Service
    count: int
    pause_seconds: float = 0.0
    statuses: Counter[int] = field(default_factory=Counter)  # of the responses that they received
    open: int = 0
    _ending: bool = False

    @contextlib.asynccontextmanager
    async def running(self, open_least: int, *, until_closed: bool = False) -> AsyncIterator[None]:
        """At least `open_least` are open when the block begins.

        After it they hang up, or, with `until_closed`, wait until the service has closed them.
        """
        self._ending = False
        tasks = [
            asyncio.create_task(self._connect_again_and_again(BEGINNINGS[number % len(BEGINNINGS)]))
            for number in range(self.count)
        ]
        try:
            await eventually(self._count_open, lambda count: count >= open_least)
            yield
        finally:
            self._ending = True
            if not until_closed:
                for task in tasks:
                    task.cancel()
            async with asyncio.timeout(HEAD_SECONDS + self.pause_seconds + LATE_SECONDS):
                ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(each) for each in ended} <= {type(None), asyncio.CancelledError}, ended

    async def count_503(self) -> int:
        """How many responses were a 503."""
        return self.statuses[503]

    async def _count_open(self) -> int:
        return self.open

    async def _connect_again_and_again(self, beginning: bytes) -> None:
        while not self._ending:
            with contextlib.suppress(ConnectionError):
                connection = await RawConnection.open(self.service.port, beginning)
                await self._wait_for_the_end(connection)
            await asyncio.sleep(self.pause_seconds)

    async def _wait_for_the_end(self, connection: RawConnection) -> None:
        self.open += 1
        try:
            received = await connection.rest(HEAD_SECONDS + LATE_SECONDS)
        finally:
            self.open -= 1
            connection.abort()
        self.statuses.update(int(status) for status in re.findall(rb"HTTP/1\.1 (\d+) ", received))


# -- time ---------------------------------------------------------------------------------------------


ROUNDS = 3


@pytest.mark.alone
async def test_row_31_slow_sockets_do_not_move_the_p99(history: History) -> None:
    """Deliveries with and without 500 slow sockets, in turn: the p99 is alike, and each delivery is answered."""
    service = await history.service().start()
    await p99(history, service)  # the first deliveries of a process are slow
    slow = SlowConnections(service, SLOW)
    alone: list[float] = []
    beside: list[float] = []
    for number in range(ROUNDS):
        alone.append(await p99(history, service))
        async with slow.running(open_least=SLOW, until_closed=number == ROUNDS - 1):
            beside.append(await p99(history, service))
            assert slow.open >= SLOW * 0.9  # all but those that are being opened again
    found = f"p99 in seconds, alone: {alone}; beside {SLOW} slow connections: {beside}"
    assert statistics.median(beside) < 3 * statistics.median(alone) + 0.05, found
    assert slow.statuses.keys() == {408}
    assert slow.statuses[408] >= SLOW
    await verdict(history)


async def p99(history: History, service: Service) -> float:
    """In seconds, of so many deliveries of as many events; all of them are processed."""
    load = Load(history, [service], senders=4, copies=1)
    await load.deliver(200)
    assert load.results == {PROCESSED: 200}, load.counts
    return load.percentile(0.99)


async def test_row_31_a_full_process_goes_on_serving(history: History) -> None:
    """Four times the allowed sockets, reopened again and again: deliveries are served, and files stay available."""
    service = await history.service({"connections_most": 100}).start()
    files_before = open_files(service)
    slow = SlowConnections(service, 400, pause_seconds=1)
    files_most = 0
    at_once = 0
    async with slow.running(open_least=80):
        for _ in range(60):
            tries = await tries_until_processed(history, service, sample())
            at_once += tries == 1
            files_most = max(files_most, open_files(service))
        await eventually(slow.count_503, lambda count: count > 400)  # an evicted connection gets a response
    assert at_once > 30  # a sender at an ordinary pace is rarely evicted
    assert files_most <= files_before + 100 + 60  # the connections to the stores are opened when they are needed
    await verdict(history)


async def tries_until_processed(history: History, service: Service, event: Sample) -> int:
    """How often it had to be sent: with so many connections its own may be evicted, and it is sent again."""
    tries = 0

    async def once() -> object:
        nonlocal tries
        tries += 1
        answer = await history.deliver(service, event)
        return answer and answer.result

    await eventually(once, lambda said: said == PROCESSED)
    return tries


def open_files(service: Service) -> int:
    """How many files the process has open; 0 on a system without /proc."""
    folder = Path(f"/proc/{service.pid}/fd")
    return len(list(folder.iterdir())) if sys.platform == "linux" else 0


# -- memory -------------------------------------------------------------------------------------------


async def test_row_31_memory_is_flat(history: History) -> None:
    """Thousands of refused requests of every kind: after the first ones, the process does not grow."""
    service = await history.service().start()
    unsigned = request([HOST, ("Stripe-Signature", "t=1,v1=00"), length(event_body())], event_body())
    sizes = []
    for _ in range(6):
        for refused in requests().values():
            assert (await one_answer(service, refused.chunks)).status == refused.status
        await asyncio.gather(*(refuse_again_and_again(service, unsigned, 150) for _ in range(4)))
        sizes.append(resident_mebibytes(service))
    assert await history.sandbox.rows() == 0
    assert max(sizes[2:]) - sizes[1] < 8, sizes


async def refuse_again_and_again(service: Service, sent: bytes, times: int) -> None:
    """Send the same request so many times on one connection."""
    connection = await RawConnection.open(service.port)
    for _ in range(times):
        await connection.send(sent)
        assert (await connection.reply()).status == 400
    connection.abort()


async def test_row_31_unfinished_bodies_are_bounded(history: History) -> None:
    """300 unfinished bodies of almost a mebibyte: some 64 are held, and a delivery beside them is served."""
    service = await history.service({"body_timeout_seconds": 60}).start()
    before = resident_mebibytes(service)
    body = b" " * (MEBIBYTE - 1)
    most = 0.0
    connections = []
    for _ in range(300):
        connection = await RawConnection.open(service.port, request([HOST, ("Content-Length", str(MEBIBYTE))]))
        with contextlib.suppress(ConnectionError):
            await connection.send(body)
        connections.append(connection)
        most = max(most, resident_mebibytes(service))
    assert await tries_until_processed(history, service, sample()) == 1
    for connection in connections:
        connection.abort()
    assert most - before > 32  # the service did hold bodies in memory
    assert most - before < 150
    await verdict(history)


def resident_mebibytes(service: Service) -> float:
    """Of the process that serves."""
    return int(subprocess.check_output(["/bin/ps", "-o", "rss=", "-p", str(service.pid)])) / 1024
