"""Fixtures that every suite shares."""

import asyncio
import os
import secrets
import signal
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.stores import Stores, clone, drop, forgo_fsync, running

# A process that a shell runs in the background ignores SIGINT, and its children inherit that. Tests interrupt theirs.
signal.signal(signal.SIGINT, signal.default_int_handler)


# Folders whose tests start processes and servers. They belong to the long run, unless they are marked `smoke`.
LONG_FOLDERS = ("acceptance", "chaos")
# Modules in these folders that start no process.
QUICK_MODULES = ("test_checker.py", "test_page.py", "test_plan.py", "test_failpoints.py")


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Give every test of a long folder its folder's marker, unless it is part of the smoke set or starts nothing.

    In a run of several lanes the modules with the longest timeouts come first, so that no lane ends with one of them.
    """
    for item in items:
        folder = item.path.parent.name
        if folder in LONG_FOLDERS and item.path.name not in QUICK_MODULES and "smoke" not in item.keywords:
            item.add_marker(folder)
    if hasattr(config, "workerinput"):
        longest: Counter[Path] = Counter()
        for item in items:
            marker = item.get_closest_marker("timeout")
            longest[item.path] = max(longest[item.path], marker.args[0] if marker else 0)
        items.sort(key=lambda item: -longest[item.path])  # stable: the order within a module stays


@pytest.fixture(scope="session")
def stores() -> Iterator[Stores]:
    """A real Postgres and a real Redis or Valkey, one of each for each worker of pytest-xdist."""
    addresses = os.environ.get("TEST_DATABASE_URL"), os.environ.get("TEST_REDIS_URL")
    # Not pytest's own folder: as root, another pytest that starts closes its parent to the user of the servers.
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
