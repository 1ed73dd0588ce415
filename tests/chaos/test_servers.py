"""The servers of the matrix: every operation on them works, and nothing of them is left."""

import signal
from pathlib import Path

import asyncpg
import pytest
import redis.exceptions

from tests.acceptance.harness import eventually
from tests.chaos.server import Server
from tests.chaos.servers import PostgresServer, own_servers

_EFFECT = "INSERT INTO effects (event_id, attempt, pid, xid) VALUES ($1, 1, 1, '1')"


async def effects(server: PostgresServer) -> list[str]:
    """The event ids of the effects, sorted."""
    return [row["event_id"] for row in await server.execute("SELECT event_id FROM effects ORDER BY event_id")]


async def timeline(server: PostgresServer) -> int:
    """What a recovery to a point in time counts up."""
    found: int = (await server.execute("SELECT timeline_id FROM pg_control_checkpoint()"))[0]["timeline_id"]
    return found


async def test_nothing_of_them_stays(template: Path) -> None:
    """Frozen, killed in part or running: when the block is left no process and no file of them is there."""
    async with own_servers(template) as servers:
        made: list[Server] = [await servers.postgres(), await servers.redis(), await servers.postgres()]
        frozen, frozen_redis, headless = made
        frozen.pause()
        frozen_redis.pause()
        headless.send(signal.SIGKILL, headless.pid)  # its first process alone
    assert [server.pids() for server in made] == [[], [], []]
    assert not servers.folder.exists()


async def test_a_postgres_keeps_what_it_committed(template: Path) -> None:
    """Through an immediate stop and a kill -9, on the same address; and settings last over both."""
    async with own_servers(template) as servers:
        postgres = await servers.postgres()
        await postgres.configure(synchronous_commit="local")
        await postgres.execute(_EFFECT, "a")
        await postgres.restart(signal.SIGQUIT)
        await postgres.execute(_EFFECT, "b")
        await postgres.kill()
        with pytest.raises((OSError, asyncpg.PostgresError)):
            await effects(postgres)
        await postgres.start()
        assert await effects(postgres) == ["a", "b"]
        assert [row[0] for row in await postgres.execute("SHOW synchronous_commit")] == ["local"]


async def test_a_postgres_restored(template: Path) -> None:
    """To the backup itself on the same timeline, and to a moment after it on another; both repeatedly."""
    async with own_servers(template) as servers:
        postgres = await servers.postgres()
        await postgres.execute(_EFFECT, "a")
        backup = await postgres.backup()
        await postgres.execute(_EFFECT, "b")
        await postgres.restore_point("here")
        await postgres.execute(_EFFECT, "c")
        await postgres.restore(backup, "here")
        assert (await effects(postgres), await timeline(postgres)) == (["a", "b"], 2)
        await postgres.execute(_EFFECT, "d")
        await postgres.restore(backup)
        assert (await effects(postgres), await timeline(postgres)) == (["a"], 1)


async def test_a_redis_promoted(template: Path) -> None:
    """A replica refuses writes until it is promoted, and has what its dead primary had; that one comes back empty."""
    async with own_servers(template) as servers:
        primary, replica = await servers.redis(), await servers.redis()
        await replica.replicate(primary)
        await primary.call("SET", "a", "1")
        await eventually(lambda: replica.call("GET", "a"))
        with pytest.raises(redis.exceptions.ReadOnlyError):
            await replica.call("SET", "a", "2")
        await primary.kill()
        await replica.promote()
        assert await replica.call("SET", "b", "1")
        assert await replica.call("DBSIZE") == 2
        await primary.start()
        assert await primary.call("DBSIZE") == 0
