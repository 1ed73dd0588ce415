"""The faults of a nemesis run: how each is injected and removed.

Guarantees: whatever happens in between, a fault repairs what it broke. What cannot be repaired (a killed process, an
emptied Redis) is left in the state from which a supervisor or an operator would start it again.
"""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Final

import asyncpg

from firstclaim.errors import LedgerUnavailable
from firstclaim.postgres.connection import UNAVAILABLE
from tests import operator
from tests.acceptance.harness import eventually
from tests.chaos.plan import Fault
from tests.chaos.servers import RedisServer
from tests.chaos.testbed import Testbed
from tests.proxy import EXECUTES_COMMIT, Mode, Proxy, Upstream

_END_SECONDS: Final = 40.0
_STORM_SECONDS: Final = 0.05
_FORGOTTEN: Final = """
UPDATE firstclaim.stripe_events SET due_at = due_at WHERE event_id IN (
    (SELECT event_id FROM firstclaim.stripe_events WHERE status IN ('pending', 'failed') ORDER BY due_at LIMIT 20
        FOR UPDATE SKIP LOCKED)
    UNION ALL
    (SELECT event_id FROM firstclaim.stripe_events WHERE status = 'ignored' ORDER BY received_at DESC LIMIT 20
        FOR UPDATE SKIP LOCKED))
"""

Do = Callable[[Testbed, Fault], Awaitable[None]]

# -- services -----------------------------------------------------------------------------------------


async def kill_service(testbed: Testbed, fault: Fault) -> None:
    """kill -9 to all processes of a service, and a new start a moment later."""
    service = testbed.service(fault.lane)
    await service.kill()
    testbed.take_out(service)
    await asyncio.sleep(fault.lasts_seconds)
    await testbed.start(service)


async def freeze_worker(testbed: Testbed, fault: Fault) -> None:
    """Freeze a process for longer than any lease, sometimes for longer than Postgres keeps its transaction."""
    for pid in _one_of(await testbed.service(fault.lane).pids(), fault):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            try:
                await asyncio.sleep(3 + 6 * fault.portion)
            finally:
                os.kill(pid, signal.SIGCONT)


async def restart_service(testbed: Testbed, fault: Fault) -> None:
    """SIGTERM with work in flight, as in a rolling restart."""
    service = testbed.service(fault.lane)
    service.terminate()
    await service.wait_for_exit(_END_SECONDS)
    await testbed.start(service)


async def kill_supervisor(testbed: Testbed, fault: Fault) -> None:
    """Kill the supervisor alone: its workers detect that, finish their work and end by themselves."""
    service = testbed.service(fault.lane)
    service.kill_supervisor()
    testbed.take_out(service)
    await eventually(service.pids, lambda members: not members, _END_SECONDS)
    await testbed.start(service)


async def kill_worker(testbed: Testbed, fault: Fault) -> None:
    """Kill a worker: its supervisor starts another."""
    service = testbed.service(fault.lane)
    for pid in _one_of([pid for pid in await service.pids() if pid != service.pid], fault):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _one_of(pids: list[int], fault: Fault) -> list[int]:
    """One of the pids, or none if an event has just killed them all."""
    return [pids[fault.pick % len(pids)]] if pids else []


# -- Redis --------------------------------------------------------------------------------------------


async def flush_redis(testbed: Testbed, _: Fault) -> None:
    """FLUSHALL: every lock and every marker disappears at once."""
    await testbed.redis.call("FLUSHALL")


async def flush_redis_on_and_on(testbed: Testbed, fault: Fault) -> None:
    """Repeated FLUSHALL: no lock lives for long."""
    for _ in range(round(fault.lasts_seconds / _STORM_SECONDS)):
        await testbed.redis.call("FLUSHALL")
        await asyncio.sleep(_STORM_SECONDS)


async def stop_redis(testbed: Testbed, fault: Fault) -> None:
    """Redis is stopped for a while, and empty when it is back."""
    await testbed.redis.stop()
    await asyncio.sleep(fault.lasts_seconds)
    await testbed.redis.start()


async def restart_redis(testbed: Testbed, _: Fault) -> None:
    """kill -9 and a start at once: Redis is empty."""
    await testbed.redis.kill()
    await testbed.redis.start()


async def freeze_redis(testbed: Testbed, fault: Fault) -> None:
    """Redis accepts commands and answers none; afterwards it executes them all, locks among them."""
    testbed.redis.pause()
    try:
        await asyncio.sleep(fault.lasts_seconds)
    finally:
        testbed.redis.resume()


async def evict_from_redis(testbed: Testbed, fault: Fault) -> None:
    """Memory is short: each new key evicts another."""
    await _with_memory(testbed.redis, "allkeys-lru", fault)


async def fill_redis(testbed: Testbed, fault: Fault) -> None:
    """Memory is short, and nothing may be evicted: every lock fails with OOM."""
    await _with_memory(testbed.redis, "noeviction", fault)


async def _with_memory(redis: RedisServer, policy: str, fault: Fault) -> None:
    used = (await redis.call("INFO", "memory"))["used_memory"]
    await redis.call("CONFIG", "SET", "maxmemory-policy", policy, "maxmemory", used)
    await asyncio.sleep(fault.lasts_seconds)
    await redis.call("CONFIG", "SET", "maxmemory", 0)


async def redis_read_only(testbed: Testbed, fault: Fault) -> None:
    """Every write fails with READONLY: Redis is the replica of an unreachable server."""
    await testbed.redis.call("REPLICAOF", "127.0.0.1", 1)
    await asyncio.sleep(fault.lasts_seconds)
    await testbed.redis.promote()


async def fail_redis_over(testbed: Testbed, fault: Fault) -> None:
    """The primary is killed and loses its last writes; its replica is promoted."""
    await testbed.spare.replicate(testbed.redis)
    await asyncio.sleep(fault.lasts_seconds)
    await testbed.redis.kill()
    await testbed.spare.promote()
    testbed.redis, testbed.spare = testbed.spare, testbed.redis
    testbed.history.sandbox.redis_url = testbed.redis.url
    for proxy in testbed.redis_proxies:
        proxy.upstream = Upstream("127.0.0.1", testbed.redis.port)
        proxy.cut()
    await testbed.spare.start()


# -- Postgres -----------------------------------------------------------------------------------------


async def crash_postgres(testbed: Testbed, _: Fault) -> None:
    """Postgres ends at once without a checkpoint, and recovers."""
    await testbed.postgres.restart(signal.SIGQUIT)


async def stop_postgres(testbed: Testbed, fault: Fault) -> None:
    """Postgres is stopped for a while."""
    await testbed.postgres.stop()
    await asyncio.sleep(fault.lasts_seconds)
    await testbed.postgres.start()


async def freeze_postgres(testbed: Testbed, fault: Fault) -> None:
    """All processes of Postgres are frozen."""
    testbed.postgres.pause()
    try:
        await asyncio.sleep(fault.lasts_seconds)
    finally:
        testbed.postgres.resume()


async def freeze_backends(testbed: Testbed, fault: Fault) -> None:
    """Some backends are frozen, whatever they are doing; the others work."""
    backends = await testbed.postgres.backends()
    chosen = backends[:: 1 + fault.pick % 3]
    try:
        for pid in chosen:
            testbed.postgres.pause(pid)
        await asyncio.sleep(fault.lasts_seconds)
    finally:
        for pid in chosen:
            testbed.postgres.resume(pid)


async def end_backends(testbed: Testbed, fault: Fault) -> None:
    """An operator terminates connections."""
    for pid in (await testbed.postgres.backends())[:: 1 + fault.pick % 2]:
        await testbed.postgres.execute("SELECT pg_terminate_backend($1)", pid)


async def lose_backend(testbed: Testbed, fault: Fault) -> None:
    """A backend is killed as if out of memory: the server ends all connections and recovers in place."""
    if backends := await testbed.postgres.backends():
        await testbed.postgres.lose(backends[fault.pick % len(backends)])


async def stall_commits(testbed: Testbed, fault: Fault) -> None:
    """The synchronous standby is gone: every commit waits for it, longer than any timeout."""
    await testbed.postgres.configure(synchronous_standby_names="gone")
    try:
        await asyncio.sleep(3 + 3 * fault.portion)
    finally:
        await testbed.postgres.configure(synchronous_standby_names="")


async def forget_lock(testbed: Testbed, fault: Fault) -> None:
    """Somebody's psql holds ACCESS EXCLUSIVE on the ledger for longer than a lease, as a forgotten migration does."""
    with suppress(*UNAVAILABLE):  # another fault ends it sooner
        psql = await asyncpg.connect(testbed.postgres.url, timeout=5)
        try:
            await psql.execute("BEGIN", timeout=5)
            await psql.execute("LOCK TABLE firstclaim.stripe_events IN ACCESS EXCLUSIVE MODE", timeout=5)
            await asyncio.sleep(3 + 3 * fault.portion)
        finally:
            psql.terminate()


async def forget_update(testbed: Testbed, fault: Fault) -> None:
    """Somebody's psql holds an open UPDATE of the rows that are next due, and of ignored ones, longer than a lease."""
    with suppress(*UNAVAILABLE):  # another fault ends it sooner
        psql = await asyncpg.connect(testbed.postgres.url, timeout=5)
        try:
            await psql.execute("BEGIN", timeout=5)
            await psql.execute(_FORGOTTEN, timeout=5)
            await asyncio.sleep(3 + 3 * fault.portion)
        finally:
            psql.terminate()


async def rotate(testbed: Testbed, _: Fault) -> None:
    """`firstclaim epoch rotate`: all markers are invalid from now on."""
    with suppress(LedgerUnavailable):  # Postgres is unreachable: an operator would try again later
        await operator.rotate(testbed.postgres.url, 2)


# -- connections --------------------------------------------------------------------------------------


def _switched(store: str, mode: Mode) -> Do:
    async def switch(testbed: Testbed, fault: Fault) -> None:
        proxy = _proxy(testbed, store, fault)
        proxy.switch(mode)
        try:
            await asyncio.sleep(fault.lasts_seconds)
        finally:
            proxy.cut()  # as a network that loses packets does in the end: not everything arrives late
            proxy.switch(Mode.OPEN)

    return switch


def _cut(store: str) -> Do:
    async def cut(testbed: Testbed, fault: Fault) -> None:
        _proxy(testbed, store, fault).cut()

    return cut


def _cut_at(word: bytes, mode: Mode) -> Do:
    """Cut a connection to Postgres at a message. FROZEN: before the server received it; MUTE: after."""

    async def cut_at(testbed: Testbed, fault: Fault) -> None:
        proxy = _proxy(testbed, "postgres", fault)
        seen = asyncio.Event()

        def look(sent: bytes) -> None:
            if word in sent and not seen.is_set():
                proxy.switch(mode)
                seen.set()

        proxy.on_sent = look
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(3):
                    await seen.wait()
                    await asyncio.sleep(0.1)  # for the server, which receives the message now or never
        finally:
            proxy.on_sent = None
            proxy.cut()
            proxy.switch(Mode.OPEN)

    return cut_at


def _proxy(testbed: Testbed, store: str, fault: Fault) -> Proxy:
    chosen = testbed.redis_proxies if store == "redis" else testbed.postgres_proxies
    return chosen[fault.pick % len(chosen)]


# -- all of them --------------------------------------------------------------------------------------

_SERVICE: Final[Mapping[str, Do]] = {
    "kill": kill_service,
    "freeze a process": freeze_worker,
    "SIGTERM and start": restart_service,
}
_WITH_WORKERS: Final[Mapping[str, Do]] = {"kill the supervisor": kill_supervisor, "kill a worker": kill_worker}

# Each lane injects one fault at a time. The third service has two workers.
LANES: Final[Mapping[str, Mapping[str, Do]]] = {
    "service 1": _SERVICE,
    "service 2": _SERVICE,
    "service 3": {**_SERVICE, **_WITH_WORKERS},
    "redis": {
        "FLUSHALL": flush_redis,
        "FLUSHALL on and on": flush_redis_on_and_on,
        "stop": stop_redis,
        "kill and start": restart_redis,
        "freeze": freeze_redis,
        "evict": evict_from_redis,
        "OOM": fill_redis,
        "READONLY": redis_read_only,
        "fail over": fail_redis_over,
    },
    "postgres": {
        "restart immediate": crash_postgres,
        "stop": stop_postgres,
        "freeze": freeze_postgres,
        "freeze backends": freeze_backends,
        "end backends": end_backends,
        "lose a backend": lose_backend,
        "stall commits": stall_commits,
    },
    "connections to Redis": {
        "cut": _cut("redis"),
        "refuse": _switched("redis", Mode.REFUSE),
        "freeze": _switched("redis", Mode.FROZEN),
        "mute": _switched("redis", Mode.MUTE),
        "hole": _switched("redis", Mode.HOLE),
    },
    "connections to Postgres": {
        "cut": _cut("postgres"),
        "refuse": _switched("postgres", Mode.REFUSE),
        "freeze": _switched("postgres", Mode.FROZEN),
        "mute": _switched("postgres", Mode.MUTE),
        "hole": _switched("postgres", Mode.HOLE),
        "cut before COMMIT": _cut_at(EXECUTES_COMMIT, Mode.FROZEN),
        "cut after COMMIT": _cut_at(EXECUTES_COMMIT, Mode.MUTE),
        "cut before a statement": _cut_at(b"evt_", Mode.FROZEN),
        "cut after a statement": _cut_at(b"evt_", Mode.MUTE),
    },
    "operator": {"epoch rotate": rotate, "forgotten UPDATE": forget_update, "forgotten LOCK": forget_lock},
}
