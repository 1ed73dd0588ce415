"""Row 29: eight processes of `serve --migrate` on an empty database, all at once: one schema, and none fails."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg

from firstclaim.migrations.schema import head
from tests.acceptance.harness import IGNORED, PROCESSED, START_SECONDS, eventually, sample
from tests.chaos.actions import answered
from tests.chaos.own import Own
from tests.chaos.verdict import verdict
from tests.stores import EFFECTS, with_database

PROCESSES = 8
WAITING = "SELECT DISTINCT pid FROM pg_locks WHERE NOT granted"


@asynccontextmanager
async def held_up(url: str) -> AsyncIterator[None]:
    """No table can be created while the block runs, so that all processes continue together at its end."""
    connection = await asyncpg.connect(url)
    try:
        async with connection.transaction():
            await connection.execute("LOCK TABLE pg_type IN SHARE MODE")
            yield
    finally:
        await connection.close()


async def test_row_29_eight_first_starts_at_once(own: Own) -> None:
    """One creates the schema, all serve, no traceback; of one event in eight copies, one is processed."""
    await own.postgres.execute("CREATE DATABASE empty")
    sandbox = own.history.sandbox
    sandbox.database_url = with_database(own.postgres.url, "empty")
    services = [own.history.service(None, "--migrate") for _ in range(PROCESSES)]
    async with held_up(sandbox.database_url):
        starting = [asyncio.create_task(service.start()) for service in services]
        await eventually(lambda: own.postgres.execute(WAITING), lambda rows: len(rows) == PROCESSES, START_SECONDS)
    await asyncio.gather(*starting)
    for service in services:
        assert "Traceback" not in service.output
        assert (await service.components())[1]["schema"] == "ok"

    assert sum("up to date" in service.output for service in services) == PROCESSES - 1, "one of them was to migrate"
    connection = await asyncpg.connect(sandbox.database_url)
    try:
        assert [row[0] for row in await connection.fetch("SELECT version_num FROM firstclaim.ledger_revision")] == [
            head()
        ]
        assert await connection.fetchval("SELECT count(*) FROM firstclaim.ledger_epoch") == 1
        await connection.execute(EFFECTS)
    finally:
        await connection.close()
    event = sample()
    answers = await asyncio.gather(*(answered(own.history, service, event) for service in services))
    assert sorted(answer.result for answer in answers) == sorted([PROCESSED] + [IGNORED] * (PROCESSES - 1))
    await verdict(own.history)
