"""Both claims, always in this order: the Redis lock, then the ledger row.

Guarantees: a `Claim` is returned only if both claims were made. Every other result is an `Outcome`, which promises
either a committed row or nothing. A delivery without the lock never dispatches: it only records the event. The marker
promises that the row exists and that somebody will finish it, so it is written once the row's COMMIT is known, and
never before.

Several builds with different handlers may share one ledger (a rolling deploy). A process *wants* an event if it has a
handler for it. The process that recorded an unfinished row wanted the event, and only a process that wants it takes it
over. A process that does not want an event records it as `ignored` and leaves nothing in Redis: the next delivery may
reach a process that wants it.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from firstclaim import outcome
from firstclaim.errors import Rejected
from firstclaim.event import Delivery
from firstclaim.inbox.claim import Claim
from firstclaim.inbox.existing_row import ExistingRow
from firstclaim.inbox.ledger import Ledger, Recorded
from firstclaim.inbox.lock import Lock, LockReply
from firstclaim.inbox.lock_token import new_token
from firstclaim.observability import metrics
from firstclaim.outcome import Outcome
from firstclaim.postgres.epoch import Epoch
from firstclaim.status import TAKEABLE, UNFINISHED, Status

_WANTED_ELSEWHERE = "Recorded; dispatched by a process that has a handler for it"
_MISSED_SECONDS = 2.0  # some rounds of recovery: a failover takes about as long
_IGNORED_MEANWHILE = "Recorded as ignored by another build; deliver it again"


@dataclass(frozen=True, slots=True)
class LockAttempt:
    """The lock's reply, and the token that the lock was requested with."""

    token: str
    reply: LockReply


@dataclass(frozen=True, slots=True)
class Refused:
    """Why a delivery is recorded and not claimed, and in how many seconds it is due.

    `recorded`: to be called with its id once it is.
    """

    answer: Outcome
    due_in_seconds: float = 0.0
    recorded: Callable[[str], None] = lambda _: None


NO_PLACE = outcome.deferred("Recorded; dispatched when a handler slot is free")
_PAUSED = Refused(outcome.deferred("Recorded; dispatched when its type is no longer paused"))


class Claims:
    """Makes both claims."""

    def __init__(self, lock: Lock, ledger: Ledger, epoch: Epoch, *, lock_ttl_seconds: float) -> None:
        self._lock = lock
        self._ledger = ledger
        self._epoch = epoch
        self._lock_ttl_seconds = lock_ttl_seconds

    @property
    def redis_unreachable(self) -> bool:
        """Whether Redis failed a moment ago, so that no command is sent to it."""
        return self._lock.unreachable

    async def lock(self, event_id: str) -> LockAttempt:
        """Request the lock. For a duplicate of a recorded event, this one command is all that it costs."""
        token = new_token()
        return LockAttempt(token, await self._lock.acquire(event_id, token, self._epoch.current))

    async def check(self, delivery: Delivery, lock: LockAttempt) -> None:
        """Parse the whole body. Raises `Rejected` if it is not valid, and releases our lock then."""
        try:
            delivery.parse()
        except Rejected:
            if lock.reply is LockReply.HELD:
                await self._lock.forget(delivery.event_id, lock.token, None)
            raise

    async def claim(
        self,
        delivery: Delivery,
        lock: LockAttempt,
        *,
        unwanted: str | None,
        refused: Refused | None = None,
        paused: bool = False,
        marked: bool = True,
    ) -> Claim | Outcome:
        """Claim or record a delivered event, after `lock`.

        `unwanted` is the reason why this process does not dispatch the event, or None if it has a handler for it.
        If it is `refused` a place for its handler, or if its type is paused, it is recorded and not claimed. With
        `marked` false a claim keeps the lock, and its caller writes the marker (`mark`). Raises `LedgerUnavailable`:
        then nothing is promised, and our lock is released.
        """
        match lock.reply, unwanted:
            case LockReply.RECORDED, _:
                return outcome.duplicate(delivery.event.id)
            case LockReply.HELD, None:
                if paused or refused is not None:
                    return await self._queue(delivery, lock.token, refused or _PAUSED)
                return await self._claim(delivery, lock.token, marked=marked)
            case LockReply.BUSY, None:
                # The holder of the lock finds our row and takes it over. If it died, the row is due once its lock has
                # expired.
                return await self._record(
                    delivery, self._lock_ttl_seconds, recorded=outcome.duplicate(delivery.event.id)
                )
            case LockReply.BUSY, _:
                return await self._answer_by_row(delivery.event.id)
            case LockReply.UNREACHABLE, None:
                return await self._record(
                    delivery, 0, recorded=outcome.deferred("Recorded; dispatched when Redis is reachable again")
                )
            case _, reason:
                return await self._ignore(delivery, lock, reason or "")

    async def recover(self, event_ids: Sequence[str]) -> tuple[list[Claim], dict[str, float]]:
        """Claim events that are due by the ledger. Returns the claims, and how long others may hold the rest.

        The lock replaces a marker: the ledger says that the work is due, so a marker does not count. The times are in
        seconds. An event whose lock another holds is tried again when that lock ends, so that a stale lock delays it by
        no more than its TTL. An event whose row is locked in the ledger is tried again after a TTL. One whose lock
        could not be requested, because a master of a Cluster is down, is tried again after a pause, so that no round is
        spent on such events alone. While Redis as a whole is unreachable, events are in neither result.
        """
        tokens = {event_id: new_token() for event_id in event_ids}
        replies = await asyncio.gather(
            *(self._lock.acquire(event_id, token, None, over_marker=True) for event_id, token in tokens.items())
        )
        by_id = dict(zip(tokens, replies, strict=True))
        busy = [event_id for event_id, reply in by_id.items() if reply is LockReply.BUSY]
        held = dict(zip(busy, await asyncio.gather(*map(self._lock.remaining_seconds, busy)), strict=True))
        if not self._lock.unreachable:
            missed = [event_id for event_id, reply in by_id.items() if reply is LockReply.UNREACHABLE]
            held |= dict.fromkeys(missed, _MISSED_SECONDS)
        locked = {event_id: tokens[event_id] for event_id, reply in by_id.items() if reply is LockReply.HELD}
        if not locked:
            return [], held
        claims: dict[str, Claim] = {}
        try:
            claims = {claim.event_id: claim for claim in await self._ledger.take_over(list(locked))}
        finally:
            metrics.taken_over["recovery"].inc(len(claims))
            await asyncio.gather(
                *(
                    self._lock.mark_recorded(event_id, token, claims[event_id].epoch)
                    if event_id in claims
                    else self._lock.forget(event_id, token, None)
                    for event_id, token in locked.items()
                )
            )
        held |= dict.fromkeys(locked.keys() - claims.keys(), self._lock_ttl_seconds)
        return list(claims.values()), held

    async def mark(self, claims: Sequence[Claim]) -> None:
        """Write the markers of claims that still have their locks, in one command."""
        by_epoch: dict[str | None, dict[str, str]] = {}
        for claim in claims:
            if claim.token:
                by_epoch.setdefault(claim.epoch, {})[claim.event_id] = claim.token
        for epoch, tokens in by_epoch.items():
            await self._lock.mark_all_recorded(tokens, epoch)

    async def forget(self, claim: Claim) -> None:
        """Delete the marker after an attempt that did not settle the event: its next delivery must reach the ledger."""
        await self._lock.forget(claim.event_id, claim.token, claim.epoch)

    # -- with the lock ----------------------------------------------------------------------------------

    async def _claim(self, delivery: Delivery, token: str, *, marked: bool) -> Claim | Outcome:
        event_id = delivery.event.id
        try:
            row = await self._ledger.claim(delivery)
            if isinstance(row, ExistingRow) and row.status in (*TAKEABLE, Status.IGNORED):
                row = await self._take_over(event_id, row)
        except BaseException:
            # It is unknown whether the row exists, so the next delivery must reach the ledger.
            await self._lock.forget(event_id, token, None)
            raise
        if isinstance(row, ExistingRow) and row.status is Status.IGNORED:
            await self._lock.forget(event_id, token, None)
            return outcome.unavailable(_IGNORED_MEANWHILE)
        if isinstance(row, Claim) and not marked:
            return replace(row, token=token)
        await self._lock.mark_recorded(event_id, token, row.epoch)
        return row if isinstance(row, Claim) else row.answer(event_id)

    async def _queue(self, delivery: Delivery, token: str, refused: Refused) -> Outcome:
        """Record the event for recovery. Recovery finishes it, so it gets the marker."""
        event_id = delivery.event.id
        try:
            row = await self._ledger.record(delivery, due_in_seconds=refused.due_in_seconds)
        except BaseException:
            await self._lock.forget(event_id, token, None)
            raise
        if isinstance(row, ExistingRow) and row.status in (*TAKEABLE, Status.IGNORED):
            await self._lock.forget(event_id, token, None)  # the next delivery may get a place
            return outcome.unavailable(_IGNORED_MEANWHILE) if row.status is Status.IGNORED else refused.answer
        await self._lock.mark_recorded(event_id, token, row.epoch)
        return row.answer(event_id) if isinstance(row, ExistingRow) else refused.answer

    async def _take_over(self, event_id: str, row: ExistingRow) -> Claim | ExistingRow:
        """Take over a row that was recorded without the lock, has failed, or was ignored by another build.

        Its `due_at` does not matter: a delivery need not wait for the backoff. A row that cannot be taken over is
        locked by another transaction: of a process that recovers it, which will finish it, or of a build that ignores
        it, which promises nothing. Hence an ignored row is read again.
        """
        claims = await self._ledger.take_over([event_id], ignored=True)
        metrics.taken_over["delivery"].inc(len(claims))
        if claims:
            return claims[0]
        return await self._ledger.find(event_id) or row if row.status is Status.IGNORED else row

    async def _ignore(self, delivery: Delivery, lock: LockAttempt, reason: str) -> Outcome:
        """Record the event as `ignored`. A build with a handler may take it over, and an operator may replay it.

        The lock is released and no marker is written: either would stop a delivery to such a build.
        """
        try:
            row = await self._ledger.ignore(delivery)
        finally:
            if lock.reply is LockReply.HELD:
                await self._lock.forget(delivery.event.id, lock.token, None)
        if row is None:
            return outcome.unhandled(reason, 1)
        return _answer_unwanted(delivery.event.id, row)

    # -- without it -------------------------------------------------------------------------------------

    async def _record(self, delivery: Delivery, due_in_seconds: float, *, recorded: Outcome) -> Outcome:
        row = await self._ledger.record(delivery, due_in_seconds=due_in_seconds)
        if isinstance(row, Recorded) or row.status in TAKEABLE:
            return recorded
        if row.status is Status.IGNORED:  # by another build, and only the holder of the lock may take it over
            return outcome.unavailable(_IGNORED_MEANWHILE)
        return row.answer(delivery.event.id)

    async def _answer_by_row(self, event_id: str) -> Outcome:
        """Answer for an event that this process does not want. The holder of the lock may want it: insert nothing."""
        row = await self._ledger.find(event_id)
        if row is None:
            return outcome.unavailable("Not recorded yet; deliver it again")
        return _answer_unwanted(event_id, row)


def _answer_unwanted(event_id: str, row: ExistingRow) -> Outcome:
    """Answer for an event that this process does not want. The process that recorded it finishes an unfinished one."""
    return outcome.deferred(_WANTED_ELSEWHERE) if row.status in UNFINISHED else row.answer(event_id)
