"""Fixtures that every suite shares."""

import asyncio
import gc
import os
import secrets
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Generator, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from tests.lanes import Placed, in_lanes
from tests.stores import Stores, clone, drop, forgo_fsync, running

# A process that a shell runs in the background ignores SIGINT, one that nohup runs ignores SIGHUP, and their children
# inherit that. Tests send theirs both.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
# Also where PYTHONDONTWRITEBYTECODE is set: the tests start hundreds of processes, and each would compile the service.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False


# Folders whose tests start processes and servers. They belong to the long run, unless they are marked `smoke`.
LONG_FOLDERS = ("acceptance", "chaos")
# The ids of all tests that pytest has found, also of those that -m leaves out.
FOUND = pytest.StashKey[frozenset[str]]()
# Modules in these folders that start no process.
QUICK_MODULES = ("test_checker.py", "test_failovers.py", "test_page.py", "test_plan.py", "test_failpoints.py")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Generator[None, object, object]:
    """Give every test of a long folder its folder's marker, unless it is part of the smoke set or starts nothing.

    When -m has selected, a run of several lanes gets its order (`tests.lanes`).
    """
    for item in items:
        folder = item.path.parent.name
        if folder in LONG_FOLDERS and item.path.name not in QUICK_MODULES and "smoke" not in item.keywords:
            item.add_marker(folder)
    config.stash[FOUND] = frozenset(item.nodeid for item in items)
    result = yield
    if hasattr(config, "workerinput"):
        items[:] = in_lanes(
            [Placed(item, item.path, seconds(item)) for item in items], config.workerinput["workercount"]
        )
    return result


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What each failover of the run has cost, in a table."""
    reports = [each for each in chain(*terminalreporter.stats.values()) if isinstance(each, pytest.TestReport)]
    calls = [each for each in reports if each.when == "call"]
    rows: list[Any] = [row for each in calls for name, row in each.user_properties if name == "failover"]
    if rows:
        lines = [list(rows[0]), *(list(row.values()) for row in rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        terminalreporter.section("failovers")
        for line in lines:
            terminalreporter.line("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Generator[None, object, object]:
    """Collect no garbage while tests are collected, and keep what that has made out of all later garbage collections.

    It is some millions of objects, which live to the end.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


def seconds(item: pytest.Item) -> float:
    """Of its timeout; 0 if it has the default."""
    marker = item.get_closest_marker("timeout")
    return float(marker.args[0]) if marker else 0


def is_roomy(folder: str) -> bool:
    """Whether it can hold the servers' data, 4 GiB. In memory, a clone of a database takes a third of the CPU."""
    try:
        return os.access(folder, os.W_OK) and shutil.disk_usage(folder).free >= 4 * 2**30
    except OSError:
        return False


@pytest.fixture(scope="session")
def stores() -> Iterator[Stores]:
    """A real Postgres and a real Redis or Valkey, one of each for each worker of pytest-xdist."""
    addresses = os.environ.get("TEST_DATABASE_URL"), os.environ.get("TEST_REDIS_URL")
    # Not pytest's own folder: as root, another pytest that starts closes its parent to the user of the servers.
    parent = "/dev/shm" if is_roomy("/dev/shm") else None  # noqa: S108  (the folder in it is made by tempfile)
    with (
        tempfile.TemporaryDirectory(prefix="firstclaim-test-", dir=parent) as folder,
        running(Path(folder), *addresses) as up,
    ):
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
