"""Fixtures of the acceptance suite: the ground a test stands on, its own or its module's."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.acceptance.harness import Ground
from tests.stores import Stores


@pytest.fixture
async def ground(stores: Stores, tmp_path: Path) -> AsyncIterator[Ground]:
    """For a test that starts, kills or stops services of its own."""
    ground = await Ground.prepare(stores, tmp_path)
    try:
        yield ground
    finally:
        await ground.leave()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_ground(stores: Stores, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Ground]:
    """For a module whose tests share services."""
    ground = await Ground.prepare(stores, tmp_path_factory.mktemp("acceptance"))
    try:
        yield ground
    finally:
        await ground.leave()
