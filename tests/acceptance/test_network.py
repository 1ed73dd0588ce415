"""A service where a platform expects it: PORT, both IP families, a prefix, a path of its own, and its health check."""

import os
import secrets
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import httpx
import pytest

from tests.acceptance.command import Command
from tests.acceptance.harness import PYTHON_PATH
from tests.stores import Stores, drop


@pytest.fixture
async def command(stores: Stores, tmp_path: Path) -> AsyncIterator[Command]:
    """On a database of its own, with what a platform sets."""
    name = f"test_{secrets.token_hex(6)}"
    connection = await asyncpg.connect(stores.postgres_url)
    await connection.execute(f'CREATE DATABASE "{name}"')
    await connection.close()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": PYTHON_PATH,
        "DATABASE_URL": stores.database(name),
        "REDIS_URL": stores.redis_url,
        "STRIPE_WEBHOOK_SECRETS": f"whsec_{secrets.token_hex(8)}",
        "PORT": str(port),
        "FIRSTCLAIM_HOST": "::",
        "FIRSTCLAIM_ROOT_PATH": "/pay",
        "FIRSTCLAIM_WEBHOOK_PATH": "/in/stripe",
        "FIRSTCLAIM_PORT": "tcp://10.0.0.1:80",  # of a Service named firstclaim
    }
    yield Command(tmp_path, environment)
    await drop(stores.database(name))


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no dual-stack sockets")
async def test_a_service_is_reached_as_its_variables_say(command: Command) -> None:
    """One set of variables is enough for the service, its health check and `send`; both families reach every path."""
    port = command.environment["PORT"]
    async with command.running("serve", "--migrate") as serving:
        await serving.shows("Application startup complete")
        await serving.shows(f"POST http://[::]:{port}/pay/in/stripe")
        for address in (f"http://127.0.0.1:{port}", f"http://[::1]:{port}"):
            async with httpx.AsyncClient(base_url=address, trust_env=False) as client:
                for path, status in (("/livez", 200), ("/pay/readyz", 200), ("/webhooks/stripe", 404)):
                    assert (await client.get(path)).status_code == status
                assert (await client.post("/pay/in/stripe/")).status_code == 400  # unsigned, and no redirect
        run = await command("livez")
        assert run.code == 0, run.output
        run = await command("send", "invoice.payment_failed", "--copies", "3")
        assert run.code == 0, run.output
        run.shows("Processed once, of 3 copies.", "event evt_")
        serving.interrupt()
        assert (await serving.wait_for_exit()).code == 0
    assert (await command("livez")).code == 1
