"""Deliveries as fast as the services take them: new events and their duplicates. Every answer is recorded.

Guarantees: each copy of an event goes to a random service, close in time to the other copies. A connection that a
fault has cut is opened again, and its delivery is recorded as unanswered. When a block ends, its background tasks
have ended too.
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import asyncpg
import httpx
import orjson

from tests.acceptance.harness import ROW, Answer, Row, Sample, Service, eventually, sample
from tests.chaos.history import History
from tests.fixtures import signed

_SPREAD = 24  # deliveries among which the next one is chosen: how far apart the copies of an event may be
_ANSWER_SECONDS = 60.0  # the test judges an answer that hangs
_MORE_SECONDS = 120.0
_PAUSE_SECONDS = 0.02  # after a connection was refused

AnswerResult = tuple[int, bool, str]


class Wire:
    """A connection to a service, kept alive between deliveries, and opened again when it was lost."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def post(self, body: bytes) -> Answer | None:
        """One signed delivery; None when the connection ended without an answer."""
        began = time.monotonic()
        parts = urlsplit(self._service.url)
        headers = {**signed(body), "Host": parts.netloc, "Content-Length": str(len(body))}
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                if self._streams is None:
                    self._streams = await asyncio.open_connection(parts.hostname, parts.port)
                reader, writer = self._streams
                writer.write(f"POST {parts.path} HTTP/1.1\r\n{head}\r\n".encode() + body)
                return await _answer(reader, began)
        except (OSError, asyncio.IncompleteReadError):
            self.close()
            await asyncio.sleep(_PAUSE_SECONDS)
            return None

    def close(self) -> None:
        """Close the connection."""
        if self._streams is not None:
            self._streams[1].transport.abort()
            self._streams = None


async def _answer(reader: asyncio.StreamReader, began: float) -> Answer:
    status, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
    headers = httpx.Headers([(name, value) for name, _, value in (line.partition(": ") for line in lines)])
    content = await reader.readexactly(int(headers["content-length"]))
    return Answer(int(status.split(" ")[1]), orjson.loads(content), headers, time.monotonic() - began)


@dataclass(slots=True)
class Load:
    """Deliveries to `services` by concurrent `senders`, each event in `copies`; their results are counted."""

    history: History
    services: Sequence[Service]
    senders: int = 12
    copies: int = 3
    pause_seconds: float = 0.0  # of each sender, after each answer
    looks: bool = True  # into the ledger, after each answer
    events: list[Sample] = field(default_factory=list, init=False)
    results: Counter[AnswerResult | None] = field(default_factory=Counter, init=False)
    seconds: list[float] = field(default_factory=list, init=False)  # until each answer

    async def deliver(self, deliveries: int) -> None:
        """Send so many deliveries."""
        posts = self._shots()
        await self._send(next(posts) for _ in range(deliveries))

    async def more(self, deliveries: int) -> None:
        """Wait for so many more answers while the load is running."""

        async def answered() -> int:
            return self.results.total()

        goal = self.results.total() + deliveries
        await eventually(answered, lambda total: total >= goal, _MORE_SECONDS)

    async def more_of(self, result: AnswerResult, deliveries: int) -> None:
        """Wait for so many more answers of one kind while the load is running."""

        async def answered() -> int:
            return self.results[result]

        goal = self.results[result] + deliveries
        await eventually(answered, lambda total: total >= goal, _MORE_SECONDS)

    def percentile(self, share: float) -> float:
        """A percentile of the seconds that answers took."""
        return sorted(self.seconds)[int(share * (len(self.seconds) - 1))]

    @property
    def counts(self) -> str:
        """The number of answers of each kind."""
        return ", ".join(f"{times} {said and said[2]}" for said, times in self.results.most_common())

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Send deliveries while the block runs; those in flight at its end still get their answers."""
        stopping = asyncio.Event()

        def posts() -> Iterator[Sample]:
            for shot in self._shots():
                if stopping.is_set():
                    return
                yield shot

        sending = asyncio.create_task(self._send(posts()))
        try:
            yield
        finally:
            stopping.set()
            await sending

    async def _send(self, posts: Iterator[Sample]) -> None:
        async with looking(self.history) if self.looks else nullcontext():
            await asyncio.gather(*(self._sender(posts) for _ in range(self.senders)))

    async def _sender(self, posts: Iterator[Sample]) -> None:
        wires = [Wire(service) for service in self.services]
        try:
            for event in posts:
                number = random.randrange(len(wires))
                sent_at = time.monotonic_ns()
                answer = await wires[number].post(event.body)
                await self.history.note(self.services[number], event, answer, sent_at)
                self.results[answer.result if answer else None] += 1
                if answer:
                    self.seconds.append(answer.seconds)
                await asyncio.sleep(self.pause_seconds)
        finally:
            for wire in wires:
                wire.close()

    def _shots(self) -> Iterator[Sample]:
        pool: list[Sample] = []
        while True:
            while len(pool) < _SPREAD:
                self.events.append(sample())
                pool += [self.events[-1]] * self.copies
            yield pool.pop(random.randrange(len(pool)))


@asynccontextmanager
async def repeated(act: Callable[[], Awaitable[object]], every_seconds: float) -> AsyncIterator[None]:
    """Call `act` repeatedly while the block runs. An exception from it is raised at the end of the block."""
    stopping = asyncio.Event()

    async def body() -> None:
        while not stopping.is_set():
            await act()
            with suppress(TimeoutError):
                async with asyncio.timeout(every_seconds):
                    await stopping.wait()

    repeating = asyncio.create_task(body())
    try:
        yield
    finally:
        stopping.set()
        await repeating


@asynccontextmanager
async def looking(history: History) -> AsyncIterator[None]:
    """Read the ledger on pooled connections: a new one for each answer costs more than the delivery."""
    pool = await asyncpg.create_pool(history.sandbox.database_url, min_size=0, max_size=8, timeout=10)

    async def look(event: Sample) -> Row | None:
        found = await pool.fetchrow(ROW, event.id)
        return None if found is None else Row.of(found)

    before, history.look = history.look, look
    try:
        yield
    finally:
        history.look = before
        with suppress(TimeoutError):
            async with asyncio.timeout(5):
                await pool.close()
        pool.terminate()
