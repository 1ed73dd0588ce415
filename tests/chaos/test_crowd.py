"""Row 31: many at the door at once. The others are not slower for it, and the service not larger."""

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
from tests.chaos.load import Load
from tests.chaos.refused import HOST, MEBIBYTE, length, request, requests
from tests.chaos.test_protocol import LATE_SECONDS, LIVEZ, one_answer
from tests.chaos.verdict import verdict
from tests.fixtures import event_body
from tests.raw_connection import RawConnection

pytestmark = pytest.mark.timeout(600)

SLOW = 500
MANNERS = (b"", LIVEZ, request([HOST, ("Content-Length", "9000")], b"{"))  # nothing, half a head, half a body


@dataclass(slots=True)
class Crowd:
    """`count` sockets that send next to nothing, each opened anew `pause_seconds` after it was closed."""

    service: Service
    count: int
    pause_seconds: float = 0.0
    statuses: Counter[int] = field(default_factory=Counter)  # that its members were answered
    present: int = 0
    leaving: bool = False

    @contextlib.asynccontextmanager
    async def around(self, present: int) -> AsyncIterator[None]:
        """So many are there when the block begins; after it each stays until the service has closed it."""
        self.leaving = False
        members = [asyncio.create_task(self._come(MANNERS[number % len(MANNERS)])) for number in range(self.count)]
        try:
            await eventually(self.size, lambda size: size >= present)
            yield
        finally:
            self.leaving = True
            async with asyncio.timeout(HEAD_SECONDS + self.pause_seconds + LATE_SECONDS):
                await asyncio.gather(*members)

    async def size(self) -> int:
        return self.present

    async def _come(self, first: bytes) -> None:
        while not self.leaving:
            with contextlib.suppress(ConnectionError):
                connection = await RawConnection.open(self.service.port, first)
                await self._stay(connection)
            await asyncio.sleep(self.pause_seconds)

    async def _stay(self, connection: RawConnection) -> None:
        self.present += 1
        try:
            said = await connection.rest(HEAD_SECONDS + LATE_SECONDS)
        finally:
            self.present -= 1
            connection.abort()
        self.statuses.update(int(status) for status in re.findall(rb"HTTP/1\.1 (\d+) ", said))


# -- time ---------------------------------------------------------------------------------------------


async def test_row_31_slow_sockets_do_not_move_the_p99(history: History) -> None:
    """Deliveries with and without 500 slow sockets, in turn: the p99 is alike, and each delivery is answered."""
    service = await history.service().start()
    await p99(history, service)  # the first of anything is slow
    crowd = Crowd(service, SLOW)
    alone: list[float] = []
    beside: list[float] = []
    for _ in range(3):
        alone.append(await p99(history, service))
        async with crowd.around(present=SLOW):
            beside.append(await p99(history, service))
            assert crowd.present >= SLOW * 0.9  # all but those that are just opened anew
    told = f"p99 in seconds, alone: {alone}; beside {SLOW} slow sockets: {beside}"
    assert statistics.median(beside) < 3 * statistics.median(alone) + 0.05, told
    assert crowd.statuses.keys() == {408}
    assert crowd.statuses[408] >= len(beside) * SLOW
    await verdict(history)


async def p99(history: History, service: Service) -> float:
    """In seconds, of so many deliveries of as many events; all of them are processed."""
    load = Load(history, [service], senders=4, copies=1)
    await load.deliver(200)
    assert load.said == {PROCESSED: 200}, load.counts
    return load.percentile(0.99)


async def test_row_31_a_full_process_goes_on_serving(history: History) -> None:
    """Four times the allowed sockets, reopened again and again: deliveries are served, and files stay available."""
    service = await history.service({"connections_most": 100}).start()
    files_before = files(service)
    crowd = Crowd(service, 400, pause_seconds=1)
    most_files = 0
    at_once = 0
    async with crowd.around(present=80):
        for _ in range(60):
            tries = await tries_until_processed(history, service, sample())
            at_once += tries == 1
            most_files = max(most_files, files(service))
    assert at_once > 30  # who sends at an ordinary pace is rarely the one who has to go
    assert crowd.statuses[503] > 400  # those who have to go are told
    assert most_files <= files_before + 100 + 60  # the stores' connections are opened as they are needed
    await verdict(history)


async def tries_until_processed(history: History, service: Service, event: Sample) -> int:
    """How often it had to be sent. In a crowd this large it may be shown out itself, and comes again."""
    tries = 0

    async def once() -> object:
        nonlocal tries
        tries += 1
        answer = await history.deliver(service, event)
        return answer and answer.said

    await eventually(once, lambda said: said == PROCESSED)
    return tries


def files(service: Service) -> int:
    """How many it has open; 0 where nobody tells."""
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
    assert await history.ground.rows() == 0
    assert max(sizes[2:]) - sizes[1] < 8, sizes


async def refuse_again_and_again(service: Service, sent: bytes, times: int) -> None:
    """On one connection."""
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
    assert most - before > 32  # they were really held
    assert most - before < 150
    await verdict(history)


def resident_mebibytes(service: Service) -> float:
    """Of the process that serves."""
    return int(subprocess.check_output(["/bin/ps", "-o", "rss=", "-p", str(service.pid)])) / 1024
