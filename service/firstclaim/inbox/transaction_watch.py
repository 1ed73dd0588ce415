"""The watch over running handlers: whether each still works in the transaction that it was given.

Guarantees: a handler that ends its transaction by itself (a raw COMMIT, say) and goes on is detected within two
periods, and its attempt is then over: the row becomes `dead`, the handler is cancelled, and its connection is closed,
because whatever it would still write is committed at once. Without the watch this would be detected at the handler's
end. Until then the row is not locked, so that past its lease another process would run the event again: two effects.

One query looks at all handlers of the process that have run for a period. So handlers that are quicker cost no query,
and nothing is sent while none runs. The driver cannot tell: for it, the connection is in a transaction again after
`COMMIT; BEGIN`.

The period is a second. It is shorter if a lease or a first backoff is, since there are two ways to a second run:

- The handler ends its transaction early. A claim may wait for its slot for half of its lease, and the other half
  remains: two periods are at most a quarter of the lease, so that another quarter is left to settle the row.
- It ends its transaction past its lease. Any process may return the row as abandoned at once, and the event is due
  after at least half of the first backoff. Such a handler has run for long, so one period passes at most: a quarter of
  that backoff. Returned rows that nobody has taken are taken back (`TAKE_BACK`).
"""

import asyncio

import structlog

from firstclaim.errors import HandlerRuleBroken, LedgerUnavailable
from firstclaim.inbox import statements
from firstclaim.inbox.handler_call import HandlerCall
from firstclaim.inbox.ledger import HandlerTransaction
from firstclaim.observability.redaction import describe_error
from firstclaim.postgres.pool import Pool

log = structlog.get_logger(__name__)

_MAX_PERIOD_SECONDS = 1.0
_PERIODS_PER_LEASE = 8
_PERIODS_PER_BACKOFF = 4
_TRANSACTION_ENDED = (
    "rule broken: a handler must not commit, nor end its transaction in any other way; "
    "what it committed is kept, so it is not retried by itself"
)


class TransactionEnded(HandlerRuleBroken):
    """The handler ended the transaction that it was given: its other writes are committed, or may be."""

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
        """The handler has ended: from here on the attempt ends the transaction, which breaks no rule."""
        del self._running[transaction]
        if not self._running:
            self._occupied.clear()

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
            return  # recovery reports it, and without this server nobody can take the row over
        except Exception as error:  # noqa: BLE001  (one failed look must not end the watch)
            log.warning("transaction_watch_failed", error=describe_error(error))
            return
        for transaction in ended:
            # Not if the handler has ended since: then its attempt detects it, or has itself ended the transaction.
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
