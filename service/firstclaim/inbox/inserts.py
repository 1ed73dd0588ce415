"""New events of many deliveries: those that arrive together are inserted together, in one statement.

Guarantees: of the copies of an event exactly one is inserted, and every other one is answered by the row that is there.
If a row is at fault, only that row fails.
"""

import asyncio
from collections.abc import Sequence

import asyncpg

from firstclaim.errors import LedgerUnavailable
from firstclaim.inbox.batcher import Batcher
from firstclaim.inbox.claim import Claim
from firstclaim.inbox.existing_row import ExistingRow, find
from firstclaim.inbox.new_row import NewRow, insert
from firstclaim.postgres.connection import ROW_FAULTS, PinnedConnection, describe
from firstclaim.postgres.pool import Pool
from firstclaim.status import Status

# Deliveries in one insert. A larger batch saves nothing more, and all its deliveries wait for its slowest row.
_MAX_BATCH = 100
# Concurrent inserts. Two, so that an insert that waits for a row does not delay the next. The second starts only while
# the first is late, that is, slower than nearly all inserts. This fills the batches better: an event in a full insert
# costs half as much as an event alone.
_PARALLEL_BATCHES = 2
_LATE_SECONDS = 0.02
# An insert waits at most this fraction of its timeout for a row that another transaction has changed: the rest of its
# batch waits too.
_PATIENCE_DIVISOR = 3
# If a batch has several copies of an event, the row of the first of these statuses is inserted: that of a delivery
# which may dispatch, before one which records for recovery, before one which ignores.
_PRECEDENCE = {Status.PROCESSING: 0, Status.PENDING: 1, Status.IGNORED: 2}


class Inserts:
    """Inserts rows on the ingest pool."""

    def __init__(self, pool: Pool, *, timeout_seconds: float, give_up_seconds: float, process: str) -> None:
        self._pool = pool
        self._timeout_seconds = timeout_seconds
        self._give_up_seconds = give_up_seconds
        self._process = process
        self._patience_seconds = timeout_seconds / _PATIENCE_DIVISOR
        self._batches: Batcher[NewRow, Claim | ExistingRow] = Batcher(
            self._insert_batch, max_items=_MAX_BATCH, parallel=_PARALLEL_BATCHES, late_seconds=_LATE_SECONDS
        )

    def call(self, row: NewRow) -> asyncio.Future[Claim | ExistingRow]:
        """The claim if the row is new, else the row that is there; to be awaited. Raises `LedgerUnavailable`."""
        return self._batches.call(row)

    async def _insert_batch(self, rows: Sequence[NewRow]) -> Sequence[Claim | ExistingRow | Exception]:
        """Insert all of them in one statement. If a row is at fault, only that row fails."""
        try:
            async with self._pool.acquire(self._timeout_seconds) as connection:
                try:
                    return await self._insert(connection, rows)
                except ROW_FAULTS as error:
                    if len(rows) == 1:
                        return [LedgerUnavailable(describe(error))]
        except LedgerUnavailable as error:
            # After a timeout, ours or the server's, the deliveries that wait would wait as long again for a 503.
            if isinstance(error.__cause__, (TimeoutError, asyncpg.QueryCanceledError)):
                self._batches.refuse_waiting(error)
            raise
        return [answer for row in rows for answer in await self._insert_one(row)]

    async def _insert_one(self, row: NewRow) -> Sequence[Claim | ExistingRow | Exception]:
        try:
            return await self._insert_batch([row])
        except LedgerUnavailable as error:
            return [error]

    async def _insert(
        self, connection: PinnedConnection, rows: Sequence[NewRow]
    ) -> Sequence[Claim | ExistingRow | Exception]:
        first: dict[str, NewRow] = {}  # the row that is inserted, by event id
        for row in sorted(rows, key=lambda row: _PRECEDENCE[row.status]):
            first.setdefault(row.event_id, row)
        warnings = connection.warnings
        new = await insert(
            connection,
            first.values(),
            patience_seconds=self._patience_seconds,
            give_up_seconds=self._give_up_seconds,
            process=self._process,
        )
        epoch = connection.epoch
        late = [row.event_id for row in rows if row.event_id not in new or first[row.event_id] is not row]
        if connection.warnings != warnings:  # committed, and perhaps not replicated: nothing may be promised yet
            late = list(first)
        known = await find(connection, late) if late else {}

        def answer(row: NewRow) -> Claim | ExistingRow:
            event_id = row.event_id
            if event_id in new and first[event_id] is row:
                return Claim(event_id, row.delivery.event.type, row.attempt, 0, 0, row.delivery.body, epoch)
            # Pruned between the two statements: it was old and settled.
            return known.get(event_id) or ExistingRow(Status.COMPLETED, 0, None)

        return [answer(row) for row in rows]
