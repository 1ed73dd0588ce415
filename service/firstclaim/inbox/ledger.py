"""The durable record: everything that reads or changes the state of an event.

Guarantees: no state is changed by id alone. Every WHERE names status and attempt, so a process whose event was taken
over changes nothing: the methods that depend on it are named `..._if_held`. A method that returns has committed
(autocommit, one statement). One that raises `LedgerUnavailable` may have committed, and its caller must promise
nothing. The clock is always the database's. Intervals are parameters, in seconds.
"""

import asyncio
import json
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from firstclaim.backoff import Backoff
from firstclaim.errors import LedgerUnavailable
from firstclaim.event import Delivery
from firstclaim.inbox import statements
from firstclaim.inbox.claim import Claim, HandlerTransaction
from firstclaim.inbox.due import DueEvent, Queue, ReturnedEvent, Survey
from firstclaim.inbox.existing_row import ExistingRow, find
from firstclaim.inbox.inserts import Inserts
from firstclaim.inbox.key_statement import HOLD_FOR_KEY
from firstclaim.inbox.new_row import NewRow
from firstclaim.observability.failure import Failure, failure_columns
from firstclaim.postgres.epoch import read_epoch
from firstclaim.postgres.handler_connections import HandlerConnection
from firstclaim.postgres.one_round_trip import NotCommitted
from firstclaim.postgres.pool import Pool
from firstclaim.postgres.statement import Statement
from firstclaim.status import Status

_ENDED_POLL_SECONDS = 0.02
_QUEUES = ("waiting", "abandoned")


@dataclass(frozen=True, slots=True)
class Recorded:
    """A new row that waits for recovery."""

    epoch: str | None


class Ledger:
    """The statements on the ingest pool; `hold` and `complete_if_held` on a handler's own connection."""

    def __init__(
        self,
        pool: Pool,
        backoff: Backoff,
        *,
        timeout_seconds: float,
        lease_seconds: float,
        give_up_seconds: float,
        idle_in_transaction_seconds: float,
        max_abandoned: int,
        process: str,
    ) -> None:
        self._pool = pool
        self._timeout_seconds = timeout_seconds
        self.lease_seconds = lease_seconds
        self.give_up_seconds = give_up_seconds
        self._idle_seconds = idle_in_transaction_seconds
        self._max_abandoned = max_abandoned
        self._process = process
        self._backoff = backoff
        self._inserts = Inserts(pool, timeout_seconds=timeout_seconds, give_up_seconds=give_up_seconds, process=process)

    # -- inserting --------------------------------------------------------------------------------------

    async def claim(self, delivery: Delivery) -> Claim | ExistingRow:
        """Insert the event for dispatch. Only the holder of the lock may call it. Raises `LedgerUnavailable`."""
        return await self._inserts.call(NewRow(delivery, Status.PROCESSING, 1, self.lease_seconds))

    async def record(self, delivery: Delivery, *, due_in_seconds: float) -> Recorded | ExistingRow:
        """Insert the event for recovery, because this delivery may not dispatch. Raises `LedgerUnavailable`."""
        row = await self._inserts.call(NewRow(delivery, Status.PENDING, 0, due_in_seconds))
        return row if isinstance(row, ExistingRow) else Recorded(row.epoch)

    async def ignore(self, delivery: Delivery) -> ExistingRow | None:
        """Insert the event as `ignored`. Returns the row that was there, or None. Raises `LedgerUnavailable`."""
        row = await self._inserts.call(NewRow(delivery, Status.IGNORED, 1, 0))
        return row if isinstance(row, ExistingRow) else None

    # -- taking over ----------------------------------------------------------------------------------

    async def take_over(self, event_ids: Sequence[str], *, ignored: bool = False) -> list[Claim]:
        """Claim those of `event_ids` that are `pending` or `failed` and that no transaction has locked.

        `ignored`: also those that a build without a handler has recorded. A delivery may do so, recovery never does.
        """
        async with self._pool.acquire(self._timeout_seconds) as connection:
            warnings = connection.warnings
            rows = await statements.TAKE_OVER.fetch(
                connection,
                event_ids=list(event_ids),
                ignored=ignored,
                lease=self.lease_seconds,
                give_up_in=self.give_up_seconds,
                process=self._process,
            )
            if connection.warnings != warnings:
                await find(connection, event_ids)
            return [Claim(**row, epoch=connection.epoch) for row in rows]

    async def survey(self) -> Survey:
        """The epoch that the server has now, and what there is to do for recovery. Raises `LedgerUnavailable`."""
        async with self._pool.acquire(self._timeout_seconds) as connection:
            epoch, row = await statements.SURVEY.fetch(connection)
        queues = {name: [(type_, livemode) for type_, livemode in json.loads(row[name])] for name in _QUEUES}
        return Survey(epoch, row["overdue"], **queues, paused=row["paused"])

    async def return_abandoned(self, limit: int) -> list[ReturnedEvent]:
        """Make events of vanished holders `pending` with a backoff, or `dead`; returns those events."""
        rows = await self.run(
            statements.RETURN_ABANDONED,
            limit=limit,
            most=self._max_abandoned,
            first=self._backoff.first_seconds,
            longest=self._backoff.max_seconds,
        )
        return [ReturnedEvent(**{**row, "status": Status(row["status"])}) for row in rows]

    async def queues(self, *, abandoned: bool) -> list[Queue]:
        """The types and modes of pending and failed events: of those that were abandoned before, or of the others."""
        rows = await self.run(statements.QUEUES[abandoned])
        return [(row["type"], row["livemode"]) for row in rows]

    async def due(
        self, starts: Mapping[Queue, datetime | None], limit: int, left_out: Sequence[str] = (), *, abandoned: bool
    ) -> list[DueEvent]:
        """Up to `limit` due events of these queues, oldest first; each queue from its start on, without `left_out`."""
        if not starts:
            return []
        types, livemodes = zip(*starts, strict=True)
        rows = await self.run(
            statements.DUE[abandoned],
            types=types,
            livemodes=livemodes,
            starts=list(starts.values()),
            left_out=left_out,
            limit=limit,
        )
        return [DueEvent(row["event_id"], (row["type"], row["livemode"]), row["due_at"]) for row in rows]

    async def give_up(self, queues: Collection[Queue], limit: int) -> list[DueEvent]:
        """Make events of these queues `dead` that nobody took until a day after their time to give up; returns them."""
        if not queues:
            return []
        types, livemodes = zip(*sorted(queues), strict=True)
        rows = await self.run(statements.GIVE_UP, types=types, livemodes=livemodes, limit=limit)
        return [DueEvent(row["event_id"], (row["type"], row["livemode"]), row["due_at"]) for row in rows]

    async def read_epoch(self) -> str | None:
        """The epoch that the server has now."""
        async with self._pool.acquire(self._timeout_seconds) as connection:
            return await read_epoch(connection)

    # -- inside a handler's transaction ---------------------------------------------------------------

    async def hold(
        self, connection: HandlerConnection, claim: Claim, *, idle_seconds: float | None = None, key: int | None = None
    ) -> HandlerTransaction | None:
        """Begin the handler's transaction, and lock the claimed row. Returns None if the claim was taken over.

        `idle_seconds`: the server ends the transaction if it is idle for longer, by default as for all. `key`: the
        number of an advisory lock that the transaction tries to take too. Raises as `HandlerConnection.begin` does.
        """
        values: dict[str, object] = {
            "event_id": claim.event_id,
            "attempt": claim.attempt,
            "timeout_ms": self.timeout_ms(idle_seconds),
            "synchronous_commit": connection.synchronous_commit,
        }
        if key is None:
            rows = await connection.begin(statements.HOLD, **values)
        else:
            rows = await connection.begin(HOLD_FOR_KEY, **values, key=key)
        if not rows:
            return None
        transaction = HandlerTransaction(*rows[0][:4])
        return transaction if key is None else replace(transaction, has_key=rows[0]["has_key"])

    async def complete_if_held(
        self, connection: HandlerConnection, claim: Claim, transaction: HandlerTransaction, action: str
    ) -> bool:
        """Write the completion mark and commit, but only the transaction that `hold` began.

        False: nothing is committed. Raises as `HandlerConnection.commit` does.
        """
        try:
            await connection.commit(
                statements.COMPLETE,
                event_id=claim.event_id,
                attempt=claim.attempt,
                xid=transaction.xid,
                action=action,
                synchronous_commit=connection.synchronous_commit,
            )
        except NotCommitted as error:
            if isinstance(error.reason, statements.NOT_MARKED):
                return False
            raise
        return True

    def timeout_ms(self, idle_seconds: float | None) -> str:
        """The timeouts of a handler's transaction, as the server takes them. None: those of all."""
        return str(round((self._idle_seconds if idle_seconds is None else idle_seconds) * 1000))

    # -- after a handler's transaction ----------------------------------------------------------------

    def connect_anew(self) -> None:
        """Send the next statements on new connections: if one connection is lost, usually all are."""
        self._pool.discard_free()

    async def fail_if_held(
        self,
        claim: Claim,
        error: str,
        failure: Failure | None = None,
        *,
        due_in_seconds: float,
        give_up_seconds: float | None = None,
    ) -> Status | None:
        """The attempt failed: `failed`, or `dead` after the event's time to give up. None if the row is no longer ours.

        It waits for a backend that is still committing this row, so it also settles a COMMIT of unknown result.
        `failure`: of what, if the handler has raised it. `give_up_seconds`: that of the handler, if it has its own.
        """
        later = self.later(give_up_seconds)
        return await self._settle(
            statements.FAIL, claim, failure, error=error, due_in=due_in_seconds, give_up_later=later
        )

    def later(self, give_up_seconds: float | None) -> float:
        """How many seconds later than others an event is given up whose handler has this time; None: it has none."""
        return 0.0 if give_up_seconds is None else give_up_seconds - self.give_up_seconds

    async def abandon_if_held(self, claim: Claim, error: str, failure: Failure | None = None) -> Status | None:
        """The attempt cannot be ended: it counts as abandoned. None if the row is no longer ours."""
        return await self._settle(
            statements.ABANDON,
            claim,
            failure,
            error=error,
            most=self._max_abandoned,
            first=self._backoff.first_seconds,
            longest=self._backoff.max_seconds,
        )

    async def kill_if_held(self, claim: Claim, error: str, failure: Failure | None = None) -> Status | None:
        """No retry will help: `dead`. None if the row is no longer ours."""
        return await self._settle(statements.KILL, claim, failure, error=error)

    async def release_if_held(self, claim: Claim, *, due_in_seconds: float = 0) -> Status | None:
        """The attempt did not begin, or we interrupted it: `pending`, no charge. None if the row is no longer ours."""
        return await self._settle(statements.RELEASE, claim, due_in=due_in_seconds)

    async def find(self, event_id: str) -> ExistingRow | None:
        """The event's row, or None. Waits until it is replicated, as a COMMIT does."""
        async with self._pool.acquire(self._timeout_seconds) as connection:
            return (await find(connection, [event_id])).get(event_id)

    async def end(self, transaction: HandlerTransaction) -> None:
        """Terminate the backend of a transaction whose attempt is over, if it is still in that transaction."""
        await self.run(statements.END, pid=transaction.pid, xid=transaction.xid)

    async def committed(self, transaction: HandlerTransaction) -> bool:
        """Whether the transaction was committed. False if the server was started or has crashed since.

        Waits until the transaction has ended. Raises `LedgerUnavailable` if it does not end: its COMMIT may be waiting
        for the standby.
        """
        deadline = time.monotonic() + self._timeout_seconds
        while True:
            rows = await self.run(
                statements.XACT_STATUS,
                xid=transaction.xid,
                server=transaction.server_started_at,
                began=transaction.began_at,
            )
            if rows[0][0] != "in progress":
                return bool(rows[0][0] == "committed")
            if time.monotonic() >= deadline:
                raise LedgerUnavailable("the handler's transaction has not ended")
            await asyncio.sleep(_ENDED_POLL_SECONDS)

    async def _settle(self, change: Statement, claim: Claim, of: Failure | None = None, **values: Any) -> Status | None:
        """Change the row if we hold it. If it was returned as abandoned meanwhile, take it back first."""
        ours = {"event_id": claim.event_id, "attempt": claim.attempt, **failure_columns(of)}
        rows = await self.run(change, **ours, **values)
        if not rows and await self.take_back(claim):
            rows = await self.run(change, **ours, **values)
        return Status(rows[0]["status"]) if rows else None

    async def take_back(self, claim: Claim) -> bool:
        """Take back an event of ours that was returned as abandoned. Returns whether it was. Its lease begins anew."""
        rows = await self.run(
            statements.TAKE_BACK,
            event_id=claim.event_id,
            attempt=claim.attempt,
            abandoned=claim.abandoned,
            lease=self.lease_seconds,
        )
        return bool(rows)

    async def run(self, statement: Statement, **values: Any) -> list[Any]:
        """The rows of one statement, committed by itself. Raises `LedgerUnavailable`."""
        async with self._pool.acquire(self._timeout_seconds) as connection:
            return await statement.fetch(connection, **values)
