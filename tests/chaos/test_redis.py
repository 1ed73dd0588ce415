"""Rows 12, 13 and 40: Redis is unreachable, or refuses. Acceptance does not wait for it, dispatch does; never a 500."""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Final

import pytest

from tests.acceptance.harness import DEFERRED, IGNORED, PROCESSED, Overrides, eventually, sample
from tests.chaos.actions import answered
from tests.chaos.history import History
from tests.chaos.load import Load
from tests.chaos.servers import RedisServer, Servers
from tests.chaos.verdict import verdict
from tests.proxy import Mode, Proxy, before_redis

SENDERS = 4
BREAKER_SECONDS = 0.5
WINDOWS = 4
# The default timeouts; the breaker tries twice as often, for more windows in the time of the test.
PATIENCE: Overrides = {"redis_timeout_seconds": 0.2, "redis_breaker_seconds": BREAKER_SECONDS}


# -- row 12: unreachable ------------------------------------------------------------------------------


async def stop(server: RedisServer, _: Proxy) -> None:
    """Nothing listens any more."""
    await server.stop()


async def start(server: RedisServer, _: Proxy) -> None:
    """Redis is back, and empty."""
    await server.start()


async def freeze(server: RedisServer, _: Proxy) -> None:
    """Redis accepts connections and commands, and answers none."""
    server.pause()


async def thaw(server: RedisServer, _: Proxy) -> None:
    """Redis answers all of them, after everyone has stopped waiting."""
    server.resume()


async def lose_packets(_: RedisServer, proxy: Proxy) -> None:
    """No data passes, and no new connection is established or refused."""
    proxy.switch(Mode.HOLE)


async def pass_packets(_: RedisServer, proxy: Proxy) -> None:
    """The network is back."""
    proxy.switch(Mode.OPEN)


Act = Callable[[RedisServer, Proxy], Awaitable[None]]


@pytest.mark.alone
@pytest.mark.parametrize(
    ("inject", "repair"),
    [(stop, start), (freeze, thaw), (lose_packets, pass_packets)],
    ids=["stopped", "frozen", "black-holed"],
)
async def test_row_12_redis_away(inject: Act, repair: Act, servers: Servers, history: History) -> None:
    """Every new event is recorded and deferred within a second, a known one is ignored; later all of them settle."""
    server = await servers.redis()
    history.sandbox.redis_url = server.url
    async with before_redis(server.url) as (proxy, through):
        service = await history.service(PATIENCE | {"REDIS_URL": through}).start()
        known = sample()
        assert (await answered(history, service, known)).result == PROCESSED

        await inject(server, proxy)
        fresh = await answered(history, service, sample())
        assert (fresh.result, fresh.reason) == (DEFERRED, "Recorded; dispatched when Redis is reachable again")
        load = Load(history, [service], senders=SENDERS, copies=2)
        async with load.running():
            await asyncio.sleep(WINDOWS * BREAKER_SECONDS)  # the length of the outage: some windows of the breaker
        assert set(load.results) == {DEFERRED}
        assert max(load.seconds) < 1
        duplicate = await answered(history, service, known)
        assert (duplicate.result, duplicate.reason) == (IGNORED, f"Event {known.id} already completed")
        status, components = await service.components()
        assert (status, components["redis"], components["postgres"]) == (200, "degraded", "ok")
        print(f"{len(load.seconds)} deferred, the slowest in {max(load.seconds):.3f} s")

        await repair(server, proxy)
        await verdict(history)
        assert (await answered(history, service, sample())).result == PROCESSED


@pytest.mark.alone
async def test_row_12_one_timeout_per_breaker_window(servers: Servers, history: History) -> None:
    """A frozen Redis gets one command per breaker window, after the commands that were in flight together."""
    server = await servers.redis()
    history.sandbox.redis_url = server.url
    service = await history.service(PATIENCE | {"redis_timeout_seconds": BREAKER_SECONDS / 5}).start()
    load = Load(history, [service], senders=SENDERS, copies=2)
    await load.deliver(SENDERS)  # so that connections are open
    before = await commands_received(server)
    began = time.monotonic()
    server.pause()
    async with load.running():
        await asyncio.sleep(WINDOWS * BREAKER_SECONDS)
    server.resume()
    windows = math.ceil((time.monotonic() - began) / BREAKER_SECONDS)
    # The command of a window takes a lock on an open connection, or opens one: it gets no further.
    times = await commands_received(server) - before
    assert WINDOWS // 2 <= times <= SENDERS + windows + 1
    assert load.results[DEFERRED] > 5 * times
    print(f"{load.results[DEFERRED]} deferred, {times} commands to Redis in {windows} windows")
    await verdict(history)


async def commands_received(server: RedisServer) -> int:
    """The number of connections and lock commands that it has received, without those of the tests."""
    locks = (await server.call("INFO", "commandstats")).get("cmdstat_set", {"calls": 0})["calls"]
    connections = (await server.call("INFO", "stats"))["total_connections_received"]
    return int(locks + connections - server.calls)


# -- row 13: refusing ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Refusal:
    """Commands that make Redis refuse, commands that end that, and the results that are allowed meanwhile."""

    begin: tuple[str, ...]
    end: tuple[str, ...]
    answers: frozenset[tuple[int, bool, str]] = frozenset({DEFERRED})


REFUSALS: Final[Mapping[str, Refusal]] = {
    "OOM": Refusal(("CONFIG SET maxmemory 1",), ("CONFIG SET maxmemory 0",)),
    "READONLY": Refusal(("REPLICAOF 127.0.0.1 1",), ("REPLICAOF NO ONE",)),
    # Connections that are authenticated stay so: all of them are ended.
    "NOAUTH": Refusal(
        ("CONFIG SET requirepass secret", "CLIENT KILL TYPE normal"),
        ("ACL SETUSER default nopass",),
    ),
    "NOPERM for the lock": Refusal(("ACL SETUSER default -set",), ("ACL SETUSER default +set",)),
    # A lock can be taken, but no marker written: events are processed until the breaker opens.
    "NOPERM for the marker": Refusal(
        ("ACL SETUSER default -eval",), ("ACL SETUSER default +eval",), frozenset({PROCESSED, IGNORED, DEFERRED})
    ),
}


async def test_row_13_redis_refuses(servers: Servers, history: History) -> None:
    """OOM, READONLY, NOAUTH, NOPERM: deferred, never a 500. Once Redis accepts commands again, all events settle."""
    server = await servers.redis()
    history.sandbox.redis_url = server.url
    service = await history.service().start()
    for name, refusal in REFUSALS.items():
        await eventually(service.components, lambda seen: seen[1]["redis"] == "ok")
        for command in refusal.begin:
            await server.call(*command.split())
        load = Load(history, [service], senders=SENDERS)
        await load.deliver(10 * SENDERS)
        assert set(load.results) <= refusal.answers, name
        assert load.results[DEFERRED], f"{name}: it did not refuse"
        for command in refusal.end:
            await server.call(*command.split())
        await verdict(history)

    async def said() -> tuple[int, bool, str]:
        return (await answered(history, service, sample())).result

    # The last refusal may have opened a window of the breaker a moment before it ended.
    await eventually(said, lambda said: said == PROCESSED)


async def test_row_13_a_key_of_another_type(history: History) -> None:
    """WRONGTYPE concerns one key: the key is deleted, its event is processed, other events are not affected."""
    service = await history.service().start()
    for _ in range(3):
        event = sample()
        await history.sandbox.put(event, "")
        assert (await answered(history, service, event)).result == PROCESSED
        assert (await history.sandbox.key(event) or b"").startswith(b"recorded:")
        assert (await answered(history, service, sample())).result == PROCESSED
    await verdict(history)


# -- row 40: what the lock's own key or user stops ----------------------------------------------------


async def test_row_40_keys_of_another_type_after_an_outage(servers: Servers, history: History) -> None:
    """Deferred events whose keys are of another type when Redis is back: all settle, without any delivery."""
    server = await servers.redis()
    history.sandbox.redis_url = server.url
    async with before_redis(server.url) as (proxy, through):
        service = await history.service(PATIENCE | {"REDIS_URL": through}).start()
        proxy.switch(Mode.REFUSE)
        for event in (sample(), sample(), sample()):
            assert (await answered(history, service, event)).result == DEFERRED
            await history.sandbox.put(event, "")
        proxy.switch(Mode.OPEN)
        await verdict(history)


async def test_row_40_a_user_without_eval(servers: Servers, history: History) -> None:
    """Refused at the start, by name; under a running service deferred, also between probes; then all settle."""
    server = await servers.redis()
    history.sandbox.redis_url = server.url
    await server.call("ACL", "SETUSER", "default", "-eval")
    with pytest.raises(AssertionError, match="EVAL is refused"):
        await history.service(PATIENCE).start()
    await server.call("ACL", "SETUSER", "default", "+eval")
    service = await history.service(PATIENCE).start()
    await server.call("ACL", "SETUSER", "default", "-eval")
    assert (await answered(history, service, sample())).result == PROCESSED  # its marker is the first EVAL
    load = Load(history, [service], senders=SENDERS)
    async with load.running():
        await asyncio.sleep(WINDOWS * BREAKER_SECONDS)
    assert set(load.results) == {DEFERRED}
    await server.call("ACL", "SETUSER", "default", "+eval")
    await verdict(history)
