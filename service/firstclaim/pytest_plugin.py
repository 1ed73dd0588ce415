"""pytest's fixtures for tests of your handlers. pytest finds them by itself where firstclaim is installed.

Guarantees: a session that uses none of them pays for none of them. Nothing is imported and no server is started before
a test asks for a fixture. They are thin: `firstclaim.testing` does the work, and needs no pytest.
"""

from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

try:  # in pytest-asyncio's strict mode, an async fixture must be its own
    from pytest_asyncio import fixture as _fixture
except ImportError:  # anyio's plugin takes pytest's
    _fixture = pytest.fixture  # type: ignore[assignment]

if TYPE_CHECKING:
    from firstclaim.testing import SyncTransaction, Transaction

_async_fixture: Callable[..., Any] = _fixture


@pytest.fixture(scope="session")
def firstclaim_database_url() -> Iterator[str]:
    """The database of the fixtures below: a PostgreSQL of this session's own (`firstclaim[embedded]`).

    Override it in your `conftest.py` to create your tables in it, or to return the address of another database.
    """
    from firstclaim.testing import embedded_postgres

    with embedded_postgres() as url:
        yield url


@_async_fixture
async def firstclaim_transaction(firstclaim_database_url: str) -> "AsyncIterator[Transaction]":
    """A transaction that is rolled back after the test, for async tests (pytest-asyncio, or anyio on asyncio)."""
    from firstclaim.testing import transaction

    async with transaction(firstclaim_database_url) as opened:
        yield opened


@pytest.fixture
def firstclaim_sync_transaction(firstclaim_database_url: str) -> "Iterator[SyncTransaction]":
    """A transaction that is rolled back after the test, for sync tests."""
    from firstclaim.testing import sync_transaction

    with sync_transaction(firstclaim_database_url) as opened:
        yield opened
