"""Fixtures of the acceptance suite: a sandbox for one test, or for one module."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.acceptance.harness import Sandbox
from tests.stores import Stores

collect_ignore = ["shop"]  # an application of its own, whose tests `test_shop.py` runs


@pytest.fixture
async def sandbox(stores: Stores, tmp_path: Path) -> AsyncIterator[Sandbox]:
    """For a test that starts, kills or stops services of its own."""
    sandbox = await Sandbox.prepare(stores, tmp_path)
    try:
        yield sandbox
    finally:
        await sandbox.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_sandbox(stores: Stores, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Sandbox]:
    """For a module whose tests share services."""
    sandbox = await Sandbox.prepare(stores, tmp_path_factory.mktemp("acceptance"))
    try:
        yield sandbox
    finally:
        await sandbox.close()
