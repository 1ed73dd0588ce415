"""Fixtures that every suite shares."""

import asyncio
import os
import secrets
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.stores import Stores, clone, drop, forgo_fsync, running

# What a shell runs in its background ignores SIGINT, and so would all that the tests start, to interrupt it.
signal.signal(signal.SIGINT, signal.default_int_handler)


# Folders whose tests start processes and servers; the long run has them, the default run only those marked `smoke`.
LONG_FOLDERS = ("acceptance", "chaos")
# Modules in these folders that start nothing.
QUICK_MODULES = ("test_checker.py", "test_page.py", "test_plan.py", "test_failpoints.py")


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give every test of a long folder its folder's marker, unless it is part of the smoke set or starts nothing."""
    for item in items:
        folder = item.path.parent.name
        if folder in LONG_FOLDERS and item.path.name not in QUICK_MODULES and "smoke" not in item.keywords:
            item.add_marker(folder)


@pytest.fixture(scope="session")
def stores() -> Iterator[Stores]:
    """A real Postgres and a real Redis or Valkey, one of each for a worker of pytest-xdist."""
    addresses = os.environ.get("TEST_DATABASE_URL"), os.environ.get("TEST_REDIS_URL")
    # Not pytest's own: as root, any other session that starts shuts its parent for the servers' user.
    with tempfile.TemporaryDirectory(prefix="firstclaim-test-") as folder, running(Path(folder), *addresses) as up:
        if addresses[0] is None:
            asyncio.run(forgo_fsync(up))
        yield up


@pytest.fixture
async def database_url(stores: Stores) -> AsyncIterator[str]:
    """A migrated database of this test's own (with the `effects` table), dropped afterwards."""
    url = await clone(stores)
    yield url
    await drop(url)


@pytest.fixture
def redis_prefix() -> str:
    """A key prefix of this test's own."""
    return f"test:{secrets.token_hex(6)}:"
