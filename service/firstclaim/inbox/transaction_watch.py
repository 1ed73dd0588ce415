"""Watches whether each running handler still works in the transaction that it was given.

Guarantees: a handler that ends its transaction itself (by a raw COMMIT, for example) and goes on is detected within two
periods. Then its attempt is over: the row becomes `dead`, the handler is cancelled, and its connection is closed,
because each of its further statements would be committed at once. Without the watch, this would be detected only when
the handler ends. Until then its row is not locked: past the lease, another process would run the event again, with a
second effect.

One query looks at all handlers of the process that have run for a period. So a quicker handler costs no query, and none
is sent while no handler runs. The driver cannot detect it: after `COMMIT; BEGIN`, its connection is in a transaction
again.

The period is a second, or less if the lease or the first backoff is short, because an event can be run again in two
ways:

- The handler ends its transaction early. Its claim may have waited for a slot for half of the lease, so the other half
  remains. Two periods take at most a quarter of the lease, which leaves a quarter to settle the row.
- The handler ends its transaction past its lease. Then any process may return the row as abandoned at once, and the
  event is due after at least half of the first backoff. This handler is watched already, so at most one period passes:
  a quarter of that backoff. A row that was returned and not taken over is taken back (`TAKE_BACK`).
"""

import asyncio

import structlog

from firstclaim.errors import HandlerRuleBroken, LedgerUnavailable
from firstclaim.inbox import statements
from firstclaim.inbox.claim import HandlerTransaction
from firstclaim.inbox.handler_call import HandlerCall
from firstclaim.observability.redaction import describe_error
from firstclaim.postgres.pool import Pool

log = structlog.get_logger(__name__)

_MAX_PERIOD_SECONDS = 1.0
_PERIODS_PER_LEASE = 8
_PERIODS_PER_BACKOFF = 4
_TRANSACTION_ENDED = (
    "rule broken: a handler must not commit, nor end its transaction in any other way; "
    "what it committed is kept, so the event is not retried automatically"
)


class TransactionEnded(HandlerRuleBroken):
    """The handler ended the transaction that it was given: its further writes are committed, or may be."""

    def __init__(self) -> None:
        super().__init__(_TRANSACTION_ENDED)


class TransactionWatch:
    """The running handlers of one process, and the task (`run`) that watches their transactions."""

    def __init__(
        self, pool: Pool, *, timeout_seconds: float, lease_seconds: float, first_backoff_seconds: float
    ) -> None:
        self._pool = pool
        self._timeout_seconds = timeout_seconds
        self._period_seconds = min(
            _MAX_PERIOD_SECONDS, lease_seconds / _PERIODS_PER_LEASE, first_backoff_seconds / _PERIODS_PER_BACKOFF
        )
        self._running: dict[HandlerTransaction, HandlerCall] = {}
        self._occupied = asyncio.Event()

    def add(self, transaction: HandlerTransaction, call: HandlerCall) -> None:
        """The handler of `call` starts to work in `transaction`."""
        self._running[transaction] = call
        self._occupied.set()

    def remove(self, transaction: HandlerTransaction) -> None:
        """The handler has ended: from here on, the attempt itself ends the transaction."""
        del self._running[transaction]
        if not self._running:
            self._occupied.clear()

    @property
    def calls(self) -> list[HandlerCall]:
        """The handlers that run."""
        return list(self._running.values())

    async def run(self) -> None:
        """Watch until cancelled. An error never ends the loop."""
        while True:
            await self._occupied.wait()
            seen = list(self._running)
            await asyncio.sleep(self._period_seconds)
            if still_running := [transaction for transaction in seen if transaction in self._running]:
                await self._look(still_running)

    async def _look(self, transactions: list[HandlerTransaction]) -> None:
        try:
            ended = await self._ended(transactions)
        except LedgerUnavailable:
            return  # recovery reports it, and while Postgres is unreachable nobody can take the row over
        except Exception as error:  # noqa: BLE001  (one failed look must not end the watch)
            log.warning("transaction_watch_failed", error=describe_error(error))
            return
        for transaction in ended:
            # If the handler has ended since, its attempt detects it, or has ended the transaction itself.
            if (call := self._running.get(transaction)) is not None:
                call.end(TransactionEnded())

    async def _ended(self, transactions: list[HandlerTransaction]) -> list[HandlerTransaction]:
        async with self._pool.acquire(self._timeout_seconds) as connection:
            rows = await statements.ENDED_BY_HANDLER.fetch(
                connection,
                xids=[each.xid for each in transactions],
                pids=[each.pid for each in transactions],
                servers=[each.server_started_at for each in transactions],
                begans=[each.began_at for each in transactions],
            )
        return [transactions[row["number"] - 1] for row in rows]
