"""Rows 1 to 4: one event in many copies, and what the later ones cost."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Self
from urllib.parse import urlsplit

import asyncpg
import redis

from tests.acceptance.harness import IGNORED, PROCESSED, Ground, eventually, parallel, post, sample
from tests.chaos.history import History
from tests.chaos.rows import answered, dispatched, fire
from tests.chaos.servers import Servers
from tests.chaos.verdict import verdict
from tests.stores import with_database

DUPLICATES = 200
PROCESSES = 4
RESENT = 20


async def test_row_01_no_fault(history: History) -> None:
    """With nothing broken every event, of each kind of handler, is processed on its first delivery, once."""
    service = await history.service().start()
    types = ["invoice.payment_failed", "invoice.paid", "customer.subscription.deleted"]
    events = [sample(type=each) for each in types for _ in range(10)]
    answers = await asyncio.gather(*(history.deliver(service, event) for event in events))
    assert Counter(answer and answer.said for answer in answers) == {PROCESSED: len(events)}
    for row in await history.ground.all_settled(events):
        assert row.counts == (1, 0, 0)
    await verdict(history)


async def test_row_02_duplicates_at_once(history: History) -> None:
    """Of 200 copies that reach four processes at the same moment, one is processed and 199 ignored: one dispatch."""
    services = [history.service() for _ in range(PROCESSES)]
    await asyncio.gather(*(service.start() for service in services))
    event = sample()
    answers = await fire(history, [(services[number % PROCESSES], event) for number in range(DUPLICATES)])
    assert Counter(answer.said for answer in answers) == {PROCESSED: 1, IGNORED: DUPLICATES - 1}
    reasons = {answer.reason for answer in answers if not answer.processed}
    assert reasons <= {parallel(event.id), f"Event {event.id} already completed"}
    assert (await history.ground.settled(event)).counts == (1, 0, 0)
    assert dispatched(history, event) == [1]
    await verdict(history)


async def test_row_03_what_a_duplicate_costs(history: History) -> None:
    """A duplicate of a completed event costs one Redis command, and not one Postgres statement."""
    # Recovery looks once when the service has started, and then not again while this runs.
    service = await history.service({"recovery_interval_seconds": 60}).start()
    event = sample()
    assert (await answered(history, service, event)).said == PROCESSED

    async with Sessions.of(history.ground) as sessions:
        await sessions.end()
        before = await sessions.begun()
        with counted(history.ground) as commands:
            answers = [await post(service.url, event.body) for _ in range(RESENT)]
        assert await sessions.alive() == 0
        assert await sessions.begun() == before
        assert commands == {"cmdstat_set": RESENT}

        for answer in answers:
            assert (answer.said, answer.reason) == (IGNORED, parallel(event.id))
            await history.note(service, event, answer)
        # And what asks the ledger is seen by both counts.
        await sessions.end()
        before, fresh = await sessions.begun(), sample()
        answer = await post(service.url, fresh.body)
        assert await sessions.alive() > 0
        await sessions.end()
        assert await sessions.begun() > before
        await history.note(service, fresh, answer)
    assert (await history.ground.settled(fresh)).counts == (1, 0, 0)
    await verdict(history)


async def test_row_04_a_duplicate_after_redis_was_emptied(servers: Servers, history: History) -> None:
    """FLUSHALL: the ledger decides, 200, still one effect; and the marker is written anew, so the next is cheap."""
    server = await servers.redis()
    history.ground.redis_url = server.url
    service = await history.service().start()
    event = sample()
    assert (await answered(history, service, event)).said == PROCESSED
    assert (await answered(history, service, event)).reason == parallel(event.id)
    marker = await history.ground.key(event)
    assert marker is not None
    assert marker.startswith(b"recorded:")

    await server.call("FLUSHALL")
    again = await answered(history, service, event)
    assert (again.said, again.reason) == (IGNORED, f"Event {event.id} already completed")
    assert await history.ground.key(event) == marker
    assert (await answered(history, service, event)).reason == parallel(event.id)
    assert (await history.ground.settled(event)).counts == (1, 0, 0)
    assert dispatched(history, event) == [1]
    await verdict(history)


# -- what was asked of the stores ---------------------------------------------------------------------

_ALIVE = "SELECT count(*) FROM pg_stat_activity WHERE datname = $1 AND backend_type = 'client backend'"
_END = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1 AND backend_type = 'client backend'"
_BEGUN = "SELECT sessions FROM pg_stat_database WHERE datname = $1"


@dataclass(frozen=True, slots=True)
class Sessions:
    """The sessions in a ground's database. Who runs a statement must have one: none now, and none since, is none run.

    (The server's counts of transactions lag by seconds, and its own upkeep is among them.)
    """

    _database: str
    _elsewhere: asyncpg.Connection

    @classmethod
    @asynccontextmanager
    async def of(cls, ground: Ground) -> AsyncIterator[Self]:
        """Watched from another database of the server."""
        connection = await asyncpg.connect(with_database(ground.database_url, "postgres"))
        try:
            yield cls(urlsplit(ground.database_url).path.strip("/"), connection)
        finally:
            await connection.close()

    async def end(self) -> None:
        """End all of them, and wait until they have left."""
        await self._elsewhere.execute(_END, self._database)
        await eventually(self.alive, lambda alive: alive == 0)

    async def alive(self) -> int:
        """How many there are."""
        alive: int = await self._elsewhere.fetchval(_ALIVE, self._database)
        return alive

    async def begun(self) -> int:
        """How many there ever were; a live one is sure to be among them only once it has ended."""
        begun: int = await self._elsewhere.fetchval(_BEGUN, self._database)
        return begun


@contextmanager
def counted(ground: Ground) -> Iterator[dict[str, int]]:
    """The commands that Redis ran meanwhile, filled in when the block ends."""
    found: dict[str, int] = {}
    with redis.Redis.from_url(ground.redis_url) as client:
        before = client.info("commandstats")
        yield found
        after = client.info("commandstats")
    for name, seen in after.items():
        if name != "cmdstat_info" and (calls := seen["calls"] - before.get(name, {"calls": 0})["calls"]):
            found[name] = calls
