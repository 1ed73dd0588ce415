"""The page's way to the ledger: connections of its own, whose statements are ended early.

Guarantees: at most `ADMIN_CONNECTIONS` of the page's questions are asked at once, on one core of the database each and
for `STATEMENT_SECONDS` at the most; who comes when both are busy waits a moment and is then told so. Deliveries and
handlers have connections of their own, and never wait for one of these.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from firstclaim.operations.search import STATEMENT_SECONDS, LedgerSearch
from firstclaim.postgres.connection import Pool

QUEUE_SECONDS: Final = 2.0
# A page asks up to five questions. A statement is ended by Postgres; this ends what waits for a frozen one.
_PAGE_SECONDS: Final = 5 * STATEMENT_SECONDS + 2.0


class AdminLedger:
    """`pool` is for the page alone, and made with `browsing.PINS`."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    @asynccontextmanager
    async def ledger(self) -> AsyncIterator[LedgerSearch]:
        """Raises `LedgerUnavailable`, also for what is asked in the block."""
        async with self._pool.borrow(_PAGE_SECONDS) as connection:
            yield LedgerSearch(connection)
