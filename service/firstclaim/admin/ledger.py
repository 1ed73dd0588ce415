"""The admin page's access to the ledger: its own connections, with a short statement timeout.

Guarantees: at most `ADMIN_CONNECTIONS` statements of the page run at once, each on one core of the database and for at
most `STATEMENT_SECONDS`. A request that finds all connections busy waits for `QUEUE_SECONDS`, and then fails with that
reason. Deliveries and handlers have other connections, and never wait for one of these.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from firstclaim.operations.search import STATEMENT_SECONDS, LedgerSearch
from firstclaim.postgres.pool import Pool

QUEUE_SECONDS: Final = 2.0
# A page runs up to five statements. Postgres ends a slow statement; this timeout ends a wait for a frozen Postgres.
_PAGE_SECONDS: Final = 5 * STATEMENT_SECONDS + 2.0


class AdminLedger:
    """The page's connections. `pool` is used by the page alone, and is created with `operations.search.PINS`."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[LedgerSearch]:
        """A connection for the duration of the block. Raises `LedgerUnavailable`, also for a statement in the block."""
        async with self._pool.acquire(_PAGE_SECONDS) as connection:
            yield LedgerSearch(connection)
