"""What is answered when the row is no longer ours when the result of an attempt is to be recorded.

Found by the model (tests/model): a ledger that was restored between two statements.
"""

import pytest

from firstclaim.errors import LedgerUnavailable
from firstclaim.postgres.handler_connections import HandlerConnection
from tests.integration.world import World, effect


async def test_no_2xx_for_a_row_that_the_ledger_says_is_gone(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A COMMIT lost because the ledger was set back to before the event: Stripe has to send it again, so 503."""
    claim = await world.claim()

    async def restored(seat: HandlerConnection, *_: object, **__: object) -> None:
        await seat.roll_back()
        await world.database.execute("DELETE FROM firstclaim.stripe_events WHERE event_id = $1", claim.event_id)
        raise ConnectionResetError

    with monkeypatch.context() as patch:
        patch.setattr(HandlerConnection, "commit", restored)
        with pytest.raises(LedgerUnavailable):
            await world.dispatch(effect, claim)
    assert await world.effects(claim.event_id) == 0
