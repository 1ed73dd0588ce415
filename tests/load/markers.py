"""`python -m tests.load.markers`: what a marker costs Redis: its key and value, and with its slots in the hash tables.

Redis doubles its hash tables: right after that, a key costs more than right before it. Both are shown. It writes
to TEST_REDIS_URL, under keys that it deletes again, or to an embedded Valkey.
"""

import asyncio
import os
import secrets
import tempfile
from pathlib import Path

from redis.asyncio import Redis
from rich.console import Console
from rich.table import Table

from firstclaim.inbox.lock import Lock
from firstclaim.inbox.lock_token import new_token
from firstclaim.inbox.redis_server import RedisServer, connect
from firstclaim.settings import Settings
from tests.stores import running

COUNTS = (60_000, 66_000)  # just before a hash table of 65,536 slots is doubled, and just after
_BATCH = 1000


async def write_markers(redis: Redis, count: int) -> list[str]:
    """Write as many markers as the service would, for ids like Stripe's; returns the keys."""
    defaults = Settings()
    server = RedisServer(redis, breaker_seconds=defaults.redis_breaker_seconds)
    lock = Lock(
        server,
        prefix=defaults.redis_prefix,
        lock_ttl_seconds=defaults.lock_ttl_seconds,
        marker_ttl_seconds=defaults.marker_ttl_seconds,
    )
    ids = [f"evt_1{secrets.token_hex(12)[:23]}" for _ in range(count)]
    try:
        for start in range(0, count, _BATCH):
            await asyncio.gather(*(_mark(lock, event_id) for event_id in ids[start : start + _BATCH]))
    finally:
        await server._commands.close()
    return [defaults.redis_prefix + event_id for event_id in ids]


async def _mark(lock: Lock, event_id: str) -> None:
    token = new_token()
    await lock.acquire(event_id, token, None)
    await lock.mark_recorded(event_id, token, secrets.token_hex(8))


async def _used_bytes(redis: Redis) -> int:
    return int((await redis.info("memory"))["used_memory"])


async def bytes_of_a_marker(url: str, count: int = COUNTS[0]) -> float:
    """What one of so many markers adds to the memory of Redis, with its slots in the hash tables."""
    async with connect(url, timeout_seconds=60) as redis:
        before = await _used_bytes(redis)
        keys = await write_markers(redis, count)
        each = (await _used_bytes(redis) - before) / count
        for start in range(0, count, _BATCH):
            await redis.delete(*keys[start : start + _BATCH])
    return each


async def _measure(url: str) -> None:
    table = Table("markers", "bytes of the key (MEMORY USAGE)", "bytes with its slots", "MB per 4,000,000")
    async with connect(url, timeout_seconds=60) as redis:
        server = await redis.info("server")
        version = server.get("valkey_version", server["redis_version"])
        for count in COUNTS:
            before = await _used_bytes(redis)
            keys = await write_markers(redis, count)
            each = (await _used_bytes(redis) - before) / count
            alone = await redis.memory_usage(keys[0])
            table.add_row(f"{count:,}", str(alone), f"{each:.0f}", f"{each * 4:.0f}")
            for start in range(0, count, _BATCH):
                await redis.delete(*keys[start : start + _BATCH])
    Console().print(f"{server.get('server_name', 'redis')} {version}", table)


def main() -> None:
    """Print the version and the costs."""
    addresses = os.environ.get("TEST_DATABASE_URL"), os.environ.get("TEST_REDIS_URL")
    with tempfile.TemporaryDirectory(prefix="firstclaim-bench-") as path, running(Path(path), *addresses) as stores:
        asyncio.run(_measure(stores.redis_url))


if __name__ == "__main__":
    main()
