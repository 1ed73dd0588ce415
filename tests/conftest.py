"""Fixtures that every suite shares."""

import os
import secrets
from collections.abc import AsyncIterator, Iterator

import pytest

from tests.stores import Stores, clone, drop, running


@pytest.fixture(scope="session")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stores]:
    """A real Postgres and a real Redis or Valkey for the whole run."""
    folder = tmp_path_factory.mktemp("stores")
    with running(folder, os.environ.get("TEST_DATABASE_URL"), os.environ.get("TEST_REDIS_URL")) as up:
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
