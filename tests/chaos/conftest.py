"""Fixtures of the chaos suite."""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.chaos.servers import Servers, make_template, own_servers


@pytest.fixture(scope="session")
def template() -> Iterator[Path]:
    """A cluster with the migrated ledger, to copy: making one takes far longer."""
    with tempfile.TemporaryDirectory(prefix="firstclaim-chaos-") as folder:
        yield asyncio.run(make_template(Path(folder)))


@pytest.fixture
async def servers(template: Path) -> AsyncIterator[Servers]:
    """Servers of this test's own, to be broken; none of them is left after it."""
    async with own_servers(template) as servers:
        yield servers
