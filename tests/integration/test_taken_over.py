"""What is answered when a claim is no longer ours by the time we want to say what became of it.

Both were found by the model (tests/model): a process frozen for longer than the lease, and a ledger that was
restored, between two statements.
"""

from typing import Any

import pytest

from firstclaim.errors import LedgerUnavailable
from firstclaim.inbox.ledger import Claim, Ledger
from firstclaim.outcome import Kind
from firstclaim.postgres.handler_connections import HandlerConnection
from firstclaim.status import Status
from tests.integration.world import World, delivery, effect


async def test_ignored_is_only_answered_for_a_row_that_says_so(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frozen between taking over and ignoring, and another holds the row by now: a duplicate, not `processed: true`."""
    take_over = Ledger.take_over

    async def then_frozen(ledger: Ledger, event_ids: Any) -> list[Claim]:
        taken = await take_over(ledger, event_ids)
        await world.change(taken[0].event_id, attempt=taken[0].attempt + 1)
        return taken

    given = await world.state_of(delivery(type="balance.available"), Status.PENDING)
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "take_over", then_frozen)
        assert (await world.pipeline.deliver(given)).kind is Kind.DUPLICATE
    assert await world.status(given.event.id) is Status.PROCESSING


async def test_no_2xx_for_a_row_that_the_ledger_says_is_gone(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A COMMIT lost because the ledger was set back to before the event: Stripe has to send it again, so 503."""
    claim = await world.claim()

    async def restored(seat: HandlerConnection) -> None:
        await seat.roll_back()
        await world.database.execute("DELETE FROM stripe_events WHERE event_id = $1", claim.event_id)
        raise ConnectionResetError

    with monkeypatch.context() as patch:
        patch.setattr(HandlerConnection, "commit", restored)
        with pytest.raises(LedgerUnavailable):
            await world.dispatch(effect, claim)
    assert await world.effects(claim.event_id) == 0
