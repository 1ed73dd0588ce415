"""A made-up shop with Alembic, models, a package `service` and FastAPI of its own, on the wheel that users install.

The shop is in `tests/acceptance/shop`. It runs in a virtual environment of its own: the wheel, and everything else from
the environment of these tests. The checkout is not on its path.
"""

import asyncio
import os
import re
import secrets
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest

from tests.acceptance.harness import PROCESSED, QUICK, REPOSITORY, eventually, post
from tests.acceptance.server_process import server_process
from tests.fixtures import SECRET, event_body
from tests.stores import Stores, drop

SHOP = REPOSITORY / "tests" / "acceptance" / "shop"
_COMMAND_SECONDS = 240  # mypy without a cache, on a busy machine


@dataclass(frozen=True, slots=True)
class Shop:
    """A copy of the shop, and the Python that it runs on."""

    folder: Path
    python: Path
    environment: dict[str, str]

    def run(self, *command: str, code: int = 0, **changes: str) -> str:
        """The output of `python -m ...`; fails unless it exits with `code`."""
        done = subprocess.run(
            [self.python, "-m", *command],
            cwd=self.folder,
            env=self.environment | changes,
            capture_output=True,
            text=True,
            timeout=_COMMAND_SECONDS,
            check=False,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel of this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*build, "-w", folder, REPOSITORY], check=True, timeout=_COMMAND_SECONDS)
    [wheel] = folder.glob("firstclaim-*.whl")
    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv" / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*install, wheel], check=True, timeout=_COMMAND_SECONDS)
    # The dependencies, without the files that put the checkout on the path: those work in a site folder alone.
    [site] = (folder / "venv").glob("lib/python3*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


@pytest.fixture
def shop(python: Path, tmp_path: Path) -> Shop:
    """A copy of the shop, without a database."""
    shutil.copytree(SHOP, tmp_path / "shop", ignore=shutil.ignore_patterns("__pycache__"))
    return Shop(tmp_path / "shop", python, {"PATH": os.environ["PATH"], "HOME": str(tmp_path)})


@pytest.fixture
async def shop_with_stores(shop: Shop, stores: Stores) -> AsyncIterator[Shop]:
    """The shop on an empty database of its own."""
    name = f"test_{secrets.token_hex(6)}"
    admin = await asyncpg.connect(stores.postgres_url)
    await admin.execute(f'CREATE DATABASE "{name}" TEMPLATE template0')
    await admin.close()
    url = stores.database(name)
    settings = {**QUICK, "handlers": "service.handlers", "redis_prefix": f"test:{name}:"}
    shop.environment.update({f"FIRSTCLAIM_{field.upper()}": str(value) for field, value in settings.items()})
    shop.environment.update(
        DATABASE_URL=url, SHOP_DATABASE_URL=url, REDIS_URL=stores.redis_url, STRIPE_WEBHOOK_SECRETS=SECRET
    )
    yield shop
    await drop(url)


async def fetch(shop: Shop, sql: str) -> list[tuple[Any, ...]]:
    """The rows of a query in the shop's database."""
    connection = await asyncpg.connect(shop.environment["DATABASE_URL"])
    rows = await connection.fetch(sql)
    await connection.close()
    return [tuple(row) for row in rows]


# -- the wheel ----------------------------------------------------------------------------------------


def test_the_shop_runs_on_the_wheel(shop: Shop) -> None:
    """What it imports is the installed package, and `service` is its own."""
    code = "import firstclaim, service; print(firstclaim.__file__, service.__file__)"
    (shop.folder / "where.py").write_text(code)
    ours, theirs = shop.run("where").split()
    assert ours.startswith(str(shop.python.parents[1]))
    assert theirs.startswith(str(shop.folder))


def test_the_shop_s_own_tests_pass(shop: Shop) -> None:
    """Its handlers' tests run with the test kit and its fixtures, on the embedded PostgreSQL and its own migrations."""
    assert "4 passed" in shop.run("pytest", "-q", "-p", "no:cacheprovider")


@pytest.mark.timeout(2 * _COMMAND_SECONDS)
def test_the_shop_s_types_are_checked(shop: Shop) -> None:
    """mypy finds the wheel's types: in strict mode the shop passes, and a handler for the wrong object does not."""
    handlers = (shop.folder / "service" / "handlers.py").read_text()
    wrong = handlers.replace('@on("invoice.paid")', '@on("charge.refunded")')
    (shop.folder / "service" / "wrong.py").write_text(wrong)
    found = shop.run("mypy", "--strict", "service", code=1)
    assert re.search(r"^service/wrong\.py:\d+: error: .*Event\[Invoice\].*Event\[Charge\]", found, flags=re.MULTILINE)
    assert "Found 1 error in 1 file" in found


# -- its database -------------------------------------------------------------------------------------

ALEMBIC = ("alembic", "upgrade", "head")
FIRSTCLAIM = ("firstclaim", "migrate")


@pytest.mark.timeout(_COMMAND_SECONDS)
@pytest.mark.parametrize(
    ("schema", "order"), [("firstclaim", (ALEMBIC, FIRSTCLAIM)), ("billing", (FIRSTCLAIM, ALEMBIC))]
)
async def test_two_sets_of_migrations_share_a_database(
    shop_with_stores: Shop, schema: str, order: tuple[tuple[str, ...], ...]
) -> None:
    """In either order: the shop's Alembic finds nothing of ours, and going back and forth in it leaves the ledger."""

    def run() -> None:
        shop = shop_with_stores
        shop.environment["FIRSTCLAIM_SCHEMA"] = schema
        for command in order:
            shop.run(*command)
        assert "No new upgrade operations detected" in shop.run("alembic", "check")
        shop.run("alembic", "downgrade", "base")
        shop.run("firstclaim", "check")
        shop.run(*ALEMBIC)
        assert "0001 (head)" in shop.run("alembic", "current")
        shop.run("firstclaim", "check")

    await asyncio.to_thread(run)
    assert await fetch(shop_with_stores, "SELECT version_num FROM alembic_version") == [("0001",)]
    assert await fetch(shop_with_stores, f"SELECT count(*) FROM {schema}.stripe_events") == [(0,)]


# -- its application ----------------------------------------------------------------------------------


UVICORN = ("-m", "uvicorn", "--port", "0", "service.main:app")
SERVE = ("-m", "firstclaim", "serve", "--port", "0")


@pytest.mark.timeout(_COMMAND_SECONDS)
@pytest.mark.parametrize(("command", "prefix"), [(UVICORN, "/payments"), (SERVE, "")], ids=["FastAPI", "serve"])
async def test_the_shop_sells(shop_with_stores: Shop, command: tuple[str, ...], prefix: str) -> None:
    """Mounted or by itself, on one database: an invoice before its customer, a duplicate, dollars, a graceful end."""
    shop = shop_with_stores
    for migration in (ALEMBIC, FIRSTCLAIM):
        await asyncio.to_thread(shop.run, *migration)
    invoice = event_body("invoice.paid", data={"object": {"currency": "eur", "customer": "cus_1"}})
    customer = event_body("customer.created", data={"object": {"id": "cus_1"}})
    dollars = event_body("invoice.paid", data={"object": {"currency": "usd"}})
    async with server_process(shop.folder, shop.environment, str(shop.python), *command) as server:
        origin = await server.origin()
        await server.says("Application startup complete")
        url = f"{origin}{prefix}/webhooks/stripe"
        assert (await post(url, invoice)).status == 500  # Retry: Stripe and recovery try again
        assert (await post(url, customer)).result == (*PROCESSED[:2], "customer_remembered")
        await eventually(lambda: fetch(shop, "SELECT customer_id FROM access"))
        assert (await post(url, invoice)).result == (200, False, "ignored")
        assert (await post(url, dollars)).result == (200, False, "dead")
        async with httpx.AsyncClient(trust_env=False) as client:
            assert (await client.get(f"{origin}{prefix}/readyz")).status_code == 200
            assert (await client.get(origin)).status_code == (200 if prefix else 404)
        await server.stop()
    assert await fetch(shop, "SELECT customer_id FROM access") == [("cus_1",)]
