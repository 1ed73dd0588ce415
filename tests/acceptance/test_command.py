"""What the command prints when it cannot serve: each fault as a sentence, an exit code, no traceback."""

import asyncio
import os
import secrets
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest

from tests.acceptance.command import PASSWORD, SECRET, Command, Run
from tests.acceptance.harness import PYTHON_PATH
from tests.stores import Stores, drop


@pytest.fixture
def command(stores: Stores, tmp_path: Path) -> Command:
    """On the suite's stores, with the template database, which is migrated and which nothing writes to."""
    return Command(
        tmp_path,
        {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": PYTHON_PATH,
            "DATABASE_URL": stores.database(stores.template),
            "REDIS_URL": stores.redis_url,
            "STRIPE_WEBHOOK_SECRETS": SECRET,
        },
    )


@pytest.fixture
async def empty_database(stores: Stores) -> AsyncIterator[str]:
    """A database without a ledger."""
    name = f"test_{secrets.token_hex(6)}"
    connection = await asyncpg.connect(stores.postgres_url)
    await connection.execute(f'CREATE DATABASE "{name}"')
    await connection.close()
    yield stores.database(name)
    await drop(stores.database(name))


async def both(command: Command, **changes: str | None) -> list[Run]:
    """`check` and `serve` side by side: both report the same faults of the environment."""
    return list(await asyncio.gather(command("check", **changes), command("serve", "--port", "0", **changes)))


def unused_port() -> int:
    """A port on which nothing listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port: int = bound.getsockname()[1]
        return port


@pytest.mark.smoke
async def test_check_of_a_good_setup(command: Command) -> None:
    """Everything is in order: exit 0, a line for each check, and no file left in the folder."""
    run = await command("check")
    assert run.code == 0, run.output
    assert list(command.folder.iterdir()) == []
    run.shows("configuration", "handlers", "invoice.payment_failed", "postgres", "schema", "redis")
    warnings = [line for line in run.output.splitlines() if line.startswith(("warn", "fail"))]
    assert all("fsync = off" in line for line in warnings), run.output  # the tests' own server does not wait for a disk


async def test_all_faults_at_once(command: Command) -> None:
    """Five faults in one environment: one run reports them all."""
    runs = await both(
        command,
        DATABASE_URL=f"mysql://user:{PASSWORD}@localhost/shop",
        REDIS_URL=f"memcached://:{PASSWORD}@localhost:11211/0",
        FIRSTCLAIM_LEASE_SECOND="20",
        FIRSTCLAIM_HANDLER_SLOTS="many",
        FIRSTCLAIM_DRAIN_SECONDS="100",
    )
    for run in runs:
        assert run.code == 2, run.output
        run.shows(
            "DATABASE_URL: scheme 'mysql' is not PostgreSQL",
            "REDIS_URL: scheme 'memcached'",
            "FIRSTCLAIM_LEASE_SECOND is not a setting; did you mean FIRSTCLAIM_LEASE_SECONDS?",
            "FIRSTCLAIM_HANDLER_SLOTS",
            "FIRSTCLAIM_DRAIN_SECONDS must be below FIRSTCLAIM_SHUTDOWN_SECONDS",
        )


async def test_handler_modules_that_cannot_work(command: Command) -> None:
    """Two modules that do not exist: exit 2, both named."""
    for run in await both(command, FIRSTCLAIM_HANDLERS="shop.handlers,billing.handlers"):
        assert run.code == 2, run.output
        run.shows("cannot import shop.handlers", "cannot import billing.handlers")


async def test_a_database_without_a_ledger(command: Command, empty_database: str) -> None:
    """The schema is missing: exit 3, and the command to run."""
    for run in await both(command, DATABASE_URL=empty_database):
        assert run.code == 3, run.output
        run.shows("firstclaim migrate")


@pytest.mark.smoke
async def test_migrate_makes_it_ready(command: Command, empty_database: str) -> None:
    """`migrate` from several processes at once: all exit 0, one schema; after it `check` succeeds."""
    runs = await asyncio.gather(*(command("migrate", DATABASE_URL=empty_database) for _ in range(3)))
    assert [run.code for run in runs] == [0] * 3, [run.output for run in runs]
    run = await command("check", DATABASE_URL=empty_database)
    assert run.code == 0, run.output


async def test_a_newer_schema(command: Command, empty_database: str) -> None:
    """The schema of a newer build: this build works on it, and warns."""
    assert (await command("migrate", DATABASE_URL=empty_database)).code == 0
    connection = await asyncpg.connect(empty_database)
    await connection.execute("UPDATE firstclaim.ledger_revision SET version_num = '9999'")
    await connection.close()
    run = await command("check", DATABASE_URL=empty_database)
    assert run.code == 0, run.output
    run.shows("9999", "newer firstclaim")


async def test_stores_that_cannot_be_reached(command: Command) -> None:
    """Nothing listens at either address: exit 3, both stores are named, neither's password is printed."""
    port = unused_port()
    run = await command(
        "check",
        DATABASE_URL=f"postgresql://user:{PASSWORD}@127.0.0.1:{port}/shop",
        REDIS_URL=f"redis://:{PASSWORD}@127.0.0.1:{port}/0",
    )
    assert run.code == 3, run.output
    run.shows("postgres", "cannot connect", "DATABASE_URL", "that the server runs", "redis", "cannot be reached")


async def test_a_database_that_does_not_exist(command: Command, stores: Stores) -> None:
    """A wrong name at the end of DATABASE_URL: the server's own message is printed."""
    run = await command("check", DATABASE_URL=stores.database("no_such_database"))
    assert run.code == 3, run.output
    run.shows("no_such_database")


async def test_the_port_is_taken(command: Command) -> None:
    """Another process listens on the port: exit 2 at once, the port is named."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        run = await command("serve", "--port", port)
    assert run.code == 2, run.output
    run.shows(f"cannot listen on 127.0.0.1 port {port}")
