"""The durable record: everything that reads or changes the state of an event.

Guarantees: no state is ever changed by id alone: `..._if_held` names and WHEREs carry status and attempt, so
whoever was taken over changes nothing. A method that returns has committed (autocommit, one statement); one
that raises `LedgerUnavailable` may have, and its caller must not promise anything. The clock is always the
database's; intervals are handed in, in seconds.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from firstclaim.backoff import Backoff
from firstclaim.errors import LedgerUnavailable
from firstclaim.event import Delivery
from firstclaim.inbox import statements
from firstclaim.inbox.batcher import Batcher
from firstclaim.inbox.statements import Statement
from firstclaim.postgres.connection import ROW_FAULTS, PinnedConnection, describe
from firstclaim.postgres.epoch import read_epoch
from firstclaim.postgres.pool import Pool
from firstclaim.status import Status

# Deliveries in one insert: more save nothing more, and all of them wait for the slowest.
_BATCH_MOST = 100
# Inserts under way at once: two, so that one which waits for a row holds up no other; and the second only beside one
# that is late, longer under way than nearly all: they fill better, and a full insert costs an event half of a lone one.
_BATCHES = 2
_LATE_SECONDS = 0.02
# An insert waits this share of its timeout for a row that another transaction has changed: its mates wait too.
_PATIENCE_SHARE = 3


@dataclass(frozen=True, slots=True)
class Claim:
    """A ledger row that is ours to dispatch. `attempt` fences it, `epoch` goes into its marker."""

    event_id: str
    attempt: int
    failures: int
    abandoned: int
    body: bytes | None = field(repr=False)
    epoch: str | None


@dataclass(frozen=True, slots=True)
class ExistingRow:
    """A row that was there already."""

    status: Status
    attempt: int
    epoch: str | None


@dataclass(frozen=True, slots=True)
class HandlerTransaction:
    """A handler's transaction: its id, the process that runs it, when the server was started, and when it began."""

    xid: str
    pid: int
    server: datetime
    began: datetime


@dataclass(frozen=True, slots=True)
class NewRow:
    """A delivery on its way into the ledger, and how it wants to be entered."""

    delivery: Delivery
    status: Status
    attempt: int
    due_in_seconds: float

    @property
    def event_id(self) -> str:
        """Of the event that it brings."""
        return self.delivery.event.id


async def insert(
    connection: PinnedConnection,
    arrivals: Iterable[NewRow],
    *,
    patience_seconds: float,
    give_up_seconds: float,
    process: str | None = None,
    timeout_seconds: float | None = None,
) -> set[str]:
    """Enter them with their bodies, in one statement; returns the ids that were new.

    `patience_seconds`: how long it waits for a row of the same id that is not committed yet. `process`: who claims
    what is claimed.
    """
    events = [(arrival.delivery.event, arrival) for arrival in arrivals]
    rows = await statements.INSERT.fetch(
        connection,
        timeout_seconds=timeout_seconds,
        patience_ms=str(round(patience_seconds * 1000)),
        event_ids=[event.id for event, _ in events],
        types=[event.type for event, _ in events],
        accounts=[event.account for event, _ in events],
        livemodes=[event.livemode for event, _ in events],
        api_versions=[event.api_version for event, _ in events],
        object_ids=[event.object_id for event, _ in events],
        created_ats=[event.created for event, _ in events],
        statuses=[arrival.status for _, arrival in events],
        attempts=[arrival.attempt for _, arrival in events],
        due_ins=[arrival.due_in_seconds for _, arrival in events],
        bodies=[arrival.delivery.body for _, arrival in events],
        process=process,
        give_up_in=give_up_seconds,
    )
    return {row["event_id"] for row in rows}


class Ledger:
    """The statements above on the ingest pool; `hold` and `complete_if_held` on a handler's own connection."""

    def __init__(
        self,
        pool: Pool,
        backoff: Backoff,
        *,
        timeout_seconds: float,
        lease_seconds: float,
        give_up_seconds: float,
        idle_in_transaction_seconds: float,
        abandoned_most: int,
        process: str,
    ) -> None:
        self._pool = pool
        self._timeout_seconds = timeout_seconds
        self._lease_seconds = lease_seconds
        self._give_up_seconds = give_up_seconds
        self._timeout_ms = str(round(idle_in_transaction_seconds * 1000))
        self._abandoned_most = abandoned_most
        self._process = process
        self._backoff = backoff
        self._patience_seconds = timeout_seconds / _PATIENCE_SHARE
        self._arrivals: Batcher[NewRow, Claim | ExistingRow] = Batcher(
            self._arrive, most=_BATCH_MOST, parallel=_BATCHES, late_seconds=_LATE_SECONDS
        )

    # -- the two ways in ------------------------------------------------------------------------------

    async def claim(self, delivery: Delivery, *, ignored: bool = False) -> Claim | ExistingRow:
        """By the lock holder: the first insert wins the right to dispatch. Raises `LedgerUnavailable`.

        `ignored`: nothing here wants the event; the row is settled as it is inserted.
        """
        if ignored:
            return await self._arrivals.call(NewRow(delivery, Status.IGNORED, 1, 0))
        return await self._arrivals.call(NewRow(delivery, Status.PROCESSING, 1, self._lease_seconds))

    async def record(self, delivery: Delivery, *, due_in_seconds: float) -> ExistingRow | None:
        """By whoever may not dispatch: recorded for recovery; None: it is, `ExistingRow`: it was there already."""
        found = await self._arrivals.call(NewRow(delivery, Status.PENDING, 0, due_in_seconds))
        return found if isinstance(found, ExistingRow) else None

    async def _arrive(self, arrivals: Sequence[NewRow]) -> Sequence[Claim | ExistingRow | Exception]:
        """Insert all of them in one statement; what is wrong with one row fails that row alone."""
        try:
            async with self._pool.acquire(self._timeout_seconds) as connection:
                try:
                    return await self._insert(connection, arrivals)
                except ROW_FAULTS as error:
                    if len(arrivals) == 1:
                        return [LedgerUnavailable(describe(error))]
        except LedgerUnavailable as error:
            if isinstance(error.__cause__, TimeoutError):  # who asked meanwhile would wait as long again for their 503
                self._arrivals.refuse_waiting(error)
            raise
        return [answer for arrival in arrivals for answer in await self._alone(arrival)]

    async def _alone(self, arrival: NewRow) -> Sequence[Claim | ExistingRow | Exception]:
        try:
            return await self._arrive([arrival])
        except LedgerUnavailable as error:
            return [error]

    async def _insert(
        self, connection: PinnedConnection, arrivals: Sequence[NewRow]
    ) -> Sequence[Claim | ExistingRow | Exception]:
        first: dict[str, NewRow] = {}  # of each event; whoever may dispatch before whoever only records
        for arrival in sorted(arrivals, key=lambda arrival: arrival.status is Status.PENDING):
            first.setdefault(arrival.event_id, arrival)
        new = await insert(
            connection,
            first.values(),
            patience_seconds=self._patience_seconds,
            give_up_seconds=self._give_up_seconds,
            process=self._process,
        )
        epoch = connection.epoch
        late = [a.event_id for a in arrivals if a.event_id not in new or first[a.event_id] is not a]
        known = (
            {row["event_id"]: row for row in await statements.FIND.fetch(connection, event_ids=late)} if late else {}
        )

        def answer(arrival: NewRow) -> Claim | ExistingRow:
            event_id = arrival.event_id
            if event_id in new and first[event_id] is arrival:
                return Claim(event_id, arrival.attempt, 0, 0, arrival.delivery.body, epoch)
            if (row := known.get(event_id)) is None:  # pruned between the two statements: it was old and settled
                return ExistingRow(Status.COMPLETED, 0, None)
            return ExistingRow(Status(row["status"]), row["attempt"], epoch)

        return [answer(arrival) for arrival in arrivals]

    # -- taking over ----------------------------------------------------------------------------------

    async def take_over(self, event_ids: Sequence[str]) -> list[Claim]:
        """Claim those of `event_ids` that are `pending` or `failed` and that nobody has a lock on."""
        async with self._pool.acquire(self._timeout_seconds) as raw:
            rows = await statements.TAKE_OVER.fetch(
                raw, event_ids=list(event_ids), lease=self._lease_seconds, process=self._process
            )
            return [
                Claim(r["event_id"], r["attempt"], r["failures"], r["abandoned"], r["body"], raw.epoch) for r in rows
            ]

    async def return_abandoned(self, limit: int) -> list[tuple[str, Status, int]]:
        """Give up on vanished holders; returns (event id, `pending` or `dead`, times abandoned) of each."""
        rows = await self._run(
            statements.RETURN_ABANDONED,
            limit=limit,
            most=self._abandoned_most,
            first=self._backoff.first_seconds,
            longest=self._backoff.max_seconds,
        )
        return [(row["event_id"], Status(row["status"]), row["abandoned"]) for row in rows]

    async def due(self, limit: int, *, abandoned: bool) -> list[str]:
        """Ids of `limit` events that are due, oldest first: those never abandoned, or those that were."""
        return [row["event_id"] for row in await self._run(statements.DUE, limit=limit, abandoned=abandoned)]

    async def read_epoch(self) -> str | None:
        """The epoch as the server has it now."""
        async with self._pool.acquire(self._timeout_seconds) as connection:
            return await read_epoch(connection)

    # -- inside a handler's transaction ---------------------------------------------------------------

    async def hold(self, connection: PinnedConnection, claim: Claim) -> HandlerTransaction | None:
        """Lock the claimed row, which begins the transaction; None: the claim was taken over."""
        rows = await statements.HOLD.fetch(
            connection, event_id=claim.event_id, attempt=claim.attempt, timeout_ms=self._timeout_ms
        )
        return HandlerTransaction(*rows[0][:4]) if rows else None

    async def complete_if_held(
        self, connection: PinnedConnection, claim: Claim, held: HandlerTransaction, action: str
    ) -> bool:
        """The completion mark: last statement before COMMIT, and only in the transaction that was held."""
        rows = await statements.COMPLETE.fetch(
            connection,
            timeout_seconds=self._timeout_seconds,
            event_id=claim.event_id,
            attempt=claim.attempt,
            xid=held.xid,
            action=action,
        )
        return bool(rows)

    # -- after it -------------------------------------------------------------------------------------

    def connect_anew(self) -> None:
        """Whatever is asked next is asked on a new connection: one was lost, and rarely it alone."""
        self._pool.discard_free()

    async def fail_if_held(self, claim: Claim, error: str, *, due_in_seconds: float) -> Status | None:
        """This attempt failed: `failed`, or `dead` when it was tried for too long; None: no longer ours.

        Waits for a backend that is still committing this row, so it also settles an ambiguous COMMIT.
        """
        return await self._settle(statements.FAIL, claim, error=error, due_in=due_in_seconds)

    async def kill_if_held(self, claim: Claim, error: str) -> Status | None:
        """No retry will help: `dead`; None: no longer ours."""
        return await self._settle(statements.KILL, claim, error=error)

    async def release_if_held(self, claim: Claim, *, due_in_seconds: float = 0) -> Status | None:
        """Not begun, or interrupted by us: `pending`, nothing charged; None: no longer ours."""
        return await self._settle(statements.RELEASE, claim, due_in=due_in_seconds)

    async def ignore_if_held(self, claim: Claim) -> Status | None:
        """Nothing here wants it: `ignored`; None: no longer ours."""
        return await self._settle(statements.IGNORE, claim)

    async def find(self, event_id: str) -> ExistingRow | None:
        """The event's row as it is now, or None."""
        async with self._pool.acquire(self._timeout_seconds) as raw:
            rows = await statements.FIND.fetch(raw, event_ids=[event_id])
            return ExistingRow(Status(rows[0]["status"]), rows[0]["attempt"], raw.epoch) if rows else None

    async def end(self, held: HandlerTransaction) -> None:
        """Terminate the backend of a transaction that was given up on, if it is still in it."""
        await self._run(statements.END, pid=held.pid, xid=held.xid)

    async def committed(self, held: HandlerTransaction) -> bool:
        """Whether a transaction that is over was committed; no, if the server was started or crashed since."""
        rows = await self._run(statements.XACT_STATUS, xid=held.xid, server=held.server, began=held.began)
        return bool(rows[0][0] == "committed")

    async def _settle(self, statement: Statement, claim: Claim, **values: object) -> Status | None:
        ours = {"event_id": claim.event_id, "attempt": claim.attempt}
        rows = await self._run(statement, **ours, **values)
        if not rows and await self._run(
            statements.TAKE_BACK, **ours, abandoned=claim.abandoned, lease=self._lease_seconds
        ):
            rows = await self._run(statement, **ours, **values)
        return Status(rows[0]["status"]) if rows else None

    async def _run(self, statement: Statement, **values: Any) -> list[Any]:
        async with self._pool.acquire(self._timeout_seconds) as connection:
            return await statement.fetch(connection, **values)
