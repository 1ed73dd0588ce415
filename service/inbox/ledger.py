"""The durable record: everything that reads or changes the state of an event.

Guarantees: no state is ever changed by id alone: `..._if_held` names and WHEREs carry status and attempt, so
whoever was taken over changes nothing. A method that returns has committed (autocommit, one statement); one
that raises `LedgerUnavailable` may have, and its caller must not promise anything. The clock is always the
database's; intervals are handed in, in seconds.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from sqlalchemy import Row, TextClause
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from service.inbox import statements
from service.inbox.event import Delivery
from service.inbox.model import Status
from service.inbox.postgres import borrow, driver, read_epoch
from service.inbox.retry import Backoff


@dataclass(frozen=True, slots=True)
class Claim:
    """A ledger row that is ours to dispatch. `attempt` fences it, `epoch` goes into its marker."""

    event_id: str
    attempt: int
    failures: int
    abandoned: int
    epoch: str | None
    body: bytes | None = field(repr=False)


@dataclass(frozen=True, slots=True)
class Found:
    """A row that was there already."""

    status: Status
    attempt: int
    epoch: str | None


@dataclass(frozen=True, slots=True)
class Held:
    """A handler's transaction: its id and the server process that runs it."""

    xid: str
    pid: int


class Ledger:
    """The statements above on the ingest pool; `hold` and `complete_if_held` on a handler's own connection."""

    def __init__(
        self,
        engine: AsyncEngine,
        backoff: Backoff,
        *,
        timeout_seconds: float,
        lease_seconds: float,
        give_up_seconds: float,
        idle_in_transaction_seconds: float,
        abandoned_most: int,
    ) -> None:
        self._engine = engine
        self._timeout_seconds = timeout_seconds
        self._lease_seconds = lease_seconds
        self._give_up_seconds = give_up_seconds
        self._timeout_ms = str(round(idle_in_transaction_seconds * 1000))
        self._abandoned_most = abandoned_most
        self._backoff = backoff

    # -- the two ways in ------------------------------------------------------------------------------

    async def claim(self, delivery: Delivery, *, ignored: bool = False) -> Claim | Found:
        """By the lock holder: the first insert wins the right to dispatch. Raises `LedgerUnavailable`.

        `ignored`: nothing here wants the event; the row is settled as it is inserted.
        """
        if ignored:
            return await self._insert(delivery, Status.IGNORED, attempt=1, due_in=0)
        return await self._insert(delivery, Status.PROCESSING, attempt=1, due_in=self._lease_seconds)

    async def record(self, delivery: Delivery, *, due_in_seconds: float) -> Found | None:
        """By whoever may not dispatch: recorded for recovery; None: it is, `Found`: it was there already."""
        found = await self._insert(delivery, Status.PENDING, attempt=0, due_in=due_in_seconds)
        return found if isinstance(found, Found) else None

    async def _insert(self, delivery: Delivery, status: Status, *, attempt: int, due_in: float) -> Claim | Found:
        event = delivery.event
        async with borrow(self._engine, self._timeout_seconds) as connection:
            epoch = driver(connection).epoch
            inserted = await connection.execute(
                statements.INSERT,
                {
                    "event_id": event.id,
                    "type": event.type,
                    "account": event.account,
                    "livemode": event.livemode,
                    "api_version": event.api_version,
                    "object_id": event.object_id,
                    "created_at": event.created,
                    "status": status,
                    "attempt": attempt,
                    "action": "ignored" if status is Status.IGNORED else None,
                    "settled": status is Status.IGNORED,
                    "due_in": due_in,
                    "give_up_in": self._give_up_seconds,
                    "body": delivery.body,
                },
            )
            if inserted.first():
                return Claim(event.id, attempt, 0, 0, epoch, delivery.body)
            row = (await connection.execute(statements.FIND, {"event_id": event.id})).first()
        if row is None:  # pruned between the two statements: it was old and settled
            return Found(Status.COMPLETED, 0, None)
        return Found(Status(row.status), row.attempt, epoch)

    # -- taking over ----------------------------------------------------------------------------------

    async def take_over(self, event_ids: Sequence[str]) -> list[Claim]:
        """Claim those of `event_ids` that are `pending` or `failed` and that nobody has a lock on."""
        async with borrow(self._engine, self._timeout_seconds) as connection:
            rows = await connection.execute(
                statements.TAKE_OVER, {"event_ids": list(event_ids), "lease": self._lease_seconds}
            )
            epoch = driver(connection).epoch
            return [Claim(r.event_id, r.attempt, r.failures, r.abandoned, epoch, r.body) for r in rows]

    async def return_abandoned(self, limit: int) -> list[tuple[str, Status, int]]:
        """Give up on vanished holders; returns (event id, `pending` or `dead`, times abandoned) of each."""
        parameters = {
            "limit": limit,
            "most": self._abandoned_most,
            "first": self._backoff.first_seconds,
            "longest": self._backoff.most_seconds,
        }
        async with borrow(self._engine, self._timeout_seconds) as connection:
            rows = await connection.execute(statements.RETURN_ABANDONED, parameters)
            return [(row.event_id, Status(row.status), row.abandoned) for row in rows]

    async def due(self, limit: int, *, abandoned: bool) -> list[str]:
        """Ids of `limit` events that are due, oldest first: those never abandoned, or those that were."""
        async with borrow(self._engine, self._timeout_seconds) as connection:
            return list(await connection.scalars(statements.DUE, {"limit": limit, "abandoned": abandoned}))

    async def read_epoch(self) -> str | None:
        """The epoch as the server has it now."""
        async with borrow(self._engine, self._timeout_seconds) as connection:
            return await read_epoch(driver(connection))

    async def replay(self, event_ids: Sequence[str]) -> list[str]:
        """Make events due now with their counts reset, attempt untouched; returns those that it changed."""
        parameters = {"event_ids": list(event_ids), "give_up_in": self._give_up_seconds}
        async with borrow(self._engine, self._timeout_seconds) as connection:
            return list(await connection.scalars(statements.REPLAY, parameters))

    # -- inside a handler's transaction ---------------------------------------------------------------

    async def hold(self, connection: AsyncConnection, claim: Claim) -> Held | None:
        """Lock the claimed row, which begins the transaction; None: the claim was taken over."""
        row = (
            await connection.execute(
                statements.HOLD,
                {"event_id": claim.event_id, "attempt": claim.attempt, "timeout_ms": self._timeout_ms},
            )
        ).first()
        return None if row is None else Held(row.xid, row.pid)

    async def complete_if_held(self, connection: AsyncConnection, claim: Claim, held: Held, action: str) -> bool:
        """The completion mark: last statement before COMMIT, and only in the transaction that was held."""
        parameters = {"event_id": claim.event_id, "attempt": claim.attempt, "xid": held.xid, "action": action}
        return (await connection.execute(statements.COMPLETE, parameters)).first() is not None

    # -- after it -------------------------------------------------------------------------------------

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

    async def find(self, event_id: str) -> Row[tuple[str, int, int, str | None]] | None:
        """(status, attempt, failures, last_error) of an event, or None."""
        async with borrow(self._engine, self._timeout_seconds) as connection:
            return (await connection.execute(statements.FIND, {"event_id": event_id})).first()

    async def end(self, held: Held) -> None:
        """Terminate the backend of a transaction that was given up on, if it is still in it."""
        async with borrow(self._engine, self._timeout_seconds) as connection:
            await connection.execute(statements.END, {"pid": held.pid, "xid": held.xid})

    async def committed(self, held: Held) -> bool:
        """Whether a transaction that is over was committed."""
        async with borrow(self._engine, self._timeout_seconds) as connection:
            return bool(await connection.scalar(statements.XACT_STATUS, {"xid": held.xid}) == "committed")

    async def _settle(self, statement: TextClause, claim: Claim, **values: object) -> Status | None:
        async with borrow(self._engine, self._timeout_seconds) as connection:
            status = await connection.scalar(
                statement, {"event_id": claim.event_id, "attempt": claim.attempt, **values}
            )
        return None if status is None else Status(status)
