"""Both claims, always in this order: the Redis lock, then the ledger row.

Guarantees: a `Claim` is returned only when both were won; every other answer is an `Outcome` that promises a
committed row, or nothing. Whoever did not get the lock only ever records. The marker is written after the
row's COMMIT is known, never before: a marker is a promise that the row exists. Of the copies of one event that
this process has in its hands at once, the first asks and claims, and the others share what came of it.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from firstclaim import outcome
from firstclaim.errors import LedgerUnavailable
from firstclaim.event import Delivery
from firstclaim.inbox.ledger import Claim, ExistingRow, Ledger
from firstclaim.inbox.lock import Lock, LockReply
from firstclaim.observability import metrics
from firstclaim.outcome import Kind, Outcome
from firstclaim.postgres.epoch import Epoch
from firstclaim.status import TAKEABLE, Status

_STATES = {
    Status.COMPLETED: "already completed",
    Status.IGNORED: "already recorded as ignored",
    Status.DEAD: "is dead: replay it",
}


@dataclass(frozen=True, slots=True)
class LockAttempt:
    """What asking for the lock came to, the token that it was asked with, and what other copies wait for."""

    token: str
    reply: LockReply
    hand: asyncio.Future[Claim | Outcome]


@dataclass(frozen=True, slots=True)
class Claims:
    """The lock and the ledger as one."""

    lock: Lock
    ledger: Ledger
    epoch: Epoch
    lock_ttl_seconds: float
    _in_flight: dict[str, asyncio.Future[Claim | Outcome]] = field(default_factory=dict, init=False)

    async def ask(self, event_id: str) -> LockAttempt:
        """Ask for the lock: the one command that a duplicate of a recorded event costs.

        Unless it is recorded, the event is in hand until `win` has ended.
        """
        token = self.lock.new_token()
        hand = self._in_flight[event_id] = asyncio.get_running_loop().create_future()
        try:
            reply = await self.lock.acquire(event_id, token, self.epoch.current)
        except BaseException as error:
            self._let_go(event_id, hand, error)
            raise
        if reply is LockReply.RECORDED:
            self._let_go(event_id, hand, outcome.duplicate(event_id))
        return LockAttempt(token, reply, hand)

    def in_flight(self, event_id: str) -> asyncio.Future[Claim | Outcome] | None:
        """What another copy of the event, which is at its claims right now, will have come to; never cancel it."""
        return self._in_flight.get(event_id)

    async def win(
        self, delivery: Delivery, asked: LockAttempt | None = None, *, ignored: str | None
    ) -> Claim | Outcome:
        """Claim a delivered event. `ignored`: why nothing here wants it; it is then settled, not dispatched.

        Raises `LedgerUnavailable`: nothing is promised, and our lock is gone again.
        """
        event_id = delivery.event.id
        asked = asked or await self.ask(event_id)
        try:
            won = await self._win(delivery, asked, ignored)
        except BaseException as error:
            self._let_go(event_id, asked.hand, error)
            raise
        self._let_go(event_id, asked.hand, won)
        return won

    def _let_go(
        self, event_id: str, hand: asyncio.Future[Claim | Outcome], came_of_it: Claim | Outcome | BaseException
    ) -> None:
        """Tell the copies that wait, and have the next one ask for itself."""
        if self._in_flight.get(event_id) is hand:
            del self._in_flight[event_id]
        if hand.done():
            return
        if isinstance(came_of_it, BaseException):
            hand.set_exception(LedgerUnavailable(str(came_of_it) or type(came_of_it).__name__))
            hand.exception()  # retrieved: often nobody else is waiting for it
        else:
            hand.set_result(came_of_it)

    async def _win(self, delivery: Delivery, asked: LockAttempt, ignored: str | None) -> Claim | Outcome:
        event_id, token, reply = delivery.event.id, asked.token, asked.reply
        if reply is LockReply.RECORDED:
            return outcome.duplicate(event_id)
        if reply is LockReply.BUSY:
            # The holder meets our row and takes it over; if it died, the row is due when its lock has run out.
            return await self._record(
                delivery, due_in_seconds=self.lock_ttl_seconds, otherwise=outcome.duplicate(event_id)
            )
        if reply is LockReply.AWAY:
            return await self._record(
                delivery,
                due_in_seconds=0,
                otherwise=outcome.deferred("Recorded; dispatched when the lock is back"),
            )
        try:
            return await self._claim(delivery, token, ignored)
        except BaseException:
            # The next delivery must reach the ledger: whether this row exists is not known.
            await self.lock.forget(event_id, token, None)
            raise

    async def recover(self, event_ids: Sequence[str]) -> list[Claim]:
        """Claim events that the ledger says are due. While Redis is away, dispatch waits: nothing is claimed."""
        asked = {event_id: self.lock.new_token() for event_id in event_ids}
        replies = await asyncio.gather(
            *(self.lock.acquire(event_id, token, None, over_marker=True) for event_id, token in asked.items())
        )
        tokens = {each: asked[each] for each, reply in zip(asked, replies, strict=True) if reply is LockReply.HELD}
        if not tokens:
            return []
        claimed: list[Claim] = []
        try:
            claimed = await self.ledger.take_over(list(tokens))
        finally:
            metrics.taken_over["recovery"].inc(len(claimed))
            held = {claim.event_id: claim for claim in claimed}
            await asyncio.gather(
                *(
                    self.lock.mark_recorded(event_id, token, held[event_id].epoch)
                    if event_id in held
                    else self.lock.forget(event_id, token, None)
                    for event_id, token in tokens.items()
                )
            )
        return claimed

    async def forget(self, claim: Claim) -> None:
        """An attempt is over without settling the event: the next delivery must reach the ledger again."""
        await self.lock.forget(claim.event_id, "", claim.epoch)

    async def _claim(self, delivery: Delivery, token: str, ignored: str | None) -> Claim | Outcome:
        event_id = delivery.event.id
        won = await self.ledger.claim(delivery, ignored=ignored is not None)
        if isinstance(won, ExistingRow) and won.status in TAKEABLE:
            # Recorded by a delivery that had no lock, or failed before: ours now, whatever its due_at. If the
            # row is skipped, recovery has it in its hands at this very moment.
            won = next(iter(await self.ledger.take_over([event_id])), won)
            metrics.taken_over["delivery"].inc(isinstance(won, Claim))
            if isinstance(won, Claim) and ignored is not None and await self.ledger.ignore_if_held(won) is None:
                # We froze for longer than the lease: another has the row, and `ignored` may not be what it becomes.
                won = ExistingRow(Status.PROCESSING, won.attempt, won.epoch)
        await self.lock.mark_recorded(event_id, token, won.epoch)
        if isinstance(won, ExistingRow):
            return _answer(event_id, won)
        return won if ignored is None else outcome.unhandled(ignored, won.attempt)

    async def _record(self, delivery: Delivery, *, due_in_seconds: float, otherwise: Outcome) -> Outcome:
        found = await self.ledger.record(delivery, due_in_seconds=due_in_seconds)
        if found is None or found.status in TAKEABLE:
            return otherwise
        return _answer(delivery.event.id, found)


def shared(event_id: str, won: Claim | Outcome) -> Outcome:
    """What a copy is told by what the first one, whose row is known to be committed, came to."""
    if isinstance(won, Claim) or won.kind is Kind.UNHANDLED:
        return outcome.duplicate(event_id)
    return won


def _answer(event_id: str, found: ExistingRow) -> Outcome:
    """By a row that is owned or settled."""
    state = _STATES.get(found.status)
    return outcome.duplicate(event_id) if state is None else outcome.settled(event_id, state)
