"""Row 23: a Postgres whose settings would break the promise: pinned by the service, refused, or named.

What is pinned is looked at where it counts, in the server: a COMMIT that was answered outlives kill -9 although
the role says it need not, and no transaction of a service takes the locks of a serializable one.
"""

import asyncio
from pathlib import Path

import asyncpg

from tests.acceptance.harness import PROCESSED, UNAVAILABLE, eventually, sample
from tests.chaos.actions import answered, retried
from tests.chaos.own import Own
from tests.chaos.verdict import verdict

EVENTS = 5


async def test_row_23_synchronous_commit_off(own: Own) -> None:
    """With the role's setting off, the pin holds: a 200 survives kill -9 of all Postgres processes at once."""
    # What is not flushed at its COMMIT waits for a writer that does not come, and is lost with the server.
    await own.postgres.configure(wal_writer_delay="10s")
    await own.postgres.execute("ALTER ROLE postgres SET synchronous_commit = off")
    service = await own.history.service().start()
    events = [sample() for _ in range(EVENTS)]
    for event in events:
        assert (await answered(own.history, service, event)).result == PROCESSED
    await own.postgres.execute("INSERT INTO effects VALUES ('not_pinned', 1, 1, '1')")  # not by the service
    with own.history.postgres_unreachable():
        await own.postgres.kill()
        await own.postgres.start()
    assert not await own.postgres.execute("SELECT FROM effects WHERE event_id = 'not_pinned'")
    for row in await own.history.sandbox.all_settled(events):
        assert row.counts == (1, 0, 0)
    assert (await retried(own.history, service, sample())).result == PROCESSED
    await verdict(own.history)


async def test_row_23_serializable_by_default(own: Own, tmp_path: Path) -> None:
    """With the role's default serializable, the pin holds: a service's transactions are READ COMMITTED."""
    await own.postgres.execute("ALTER ROLE postgres SET default_transaction_isolation = serializable")
    service = await own.history.service().start()
    gate = tmp_path / "gate"
    event = sample("hold", gate=str(gate))
    delivery = asyncio.create_task(answered(own.history, service, event))
    [pid] = await eventually(lambda: own.postgres.backends(state="idle in transaction"))
    ours, serializable = await own_transaction(own)
    assert ours in serializable
    assert pid not in serializable
    gate.touch()
    assert (await delivery).result == PROCESSED
    await verdict(own.history)


async def own_transaction(own: Own) -> tuple[int, set[int]]:
    """A transaction as the role has it: its process, and all processes that hold the locks of serializable ones."""
    connection = await asyncpg.connect(own.postgres.url)
    try:
        async with connection.transaction():
            await connection.fetch("TABLE effects")
            found = await connection.fetch("SELECT pid FROM pg_locks WHERE mode = 'SIReadLock'")
            return connection.get_server_pid(), {row["pid"] for row in found}
    finally:
        await connection.close()


async def test_row_23_read_only(own: Own) -> None:
    """`default_transaction_read_only`: refused at start, by name; set under a running service: 503 until it is off."""
    service = await own.history.service().start()
    assert (await answered(own.history, service, sample())).result == PROCESSED
    await own.postgres.configure(default_transaction_read_only="on")
    refused = await own.command("serve", "--port", "0")
    assert refused.code == 3, refused.output
    refused.shows("writable", "read-only", "default_transaction_read_only")
    event = sample()
    answer = await eventually(lambda: answered(own.history, service, sample()), lambda a: a.result != PROCESSED)
    assert answer.result == UNAVAILABLE
    await own.postgres.configure(default_transaction_read_only="off")
    assert (await retried(own.history, service, event)).result == PROCESSED
    await verdict(own.history)


async def test_row_23_a_standby(own: Own) -> None:
    """A server in recovery is refused at start, by name; once it is promoted, the service starts."""
    backup = await own.postgres.backup()
    await own.postgres.stand_by(backup)
    for command in (("serve", "--port", "0"), ("check",)):
        refused = await own.command(*command)
        assert refused.code == 3, refused.output
        refused.shows("writable", "standby")
    await own.postgres.execute("SELECT pg_promote()")
    service = await own.history.service().start()
    assert (await retried(own.history, service, sample())).result == PROCESSED
    await verdict(own.history)


async def test_row_23_fsync_off(own: Own) -> None:
    """The service starts; `serve` and `check` warn, and name the setting."""
    await own.postgres.configure(fsync="off")
    service = await own.history.service().start()
    assert "fsync = off" in service.output
    assert (await answered(own.history, service, sample())).result == PROCESSED
    checked = await own.command("check")
    assert checked.code == 0, checked.output
    checked.shows("fsync = off")
    await verdict(own.history)
