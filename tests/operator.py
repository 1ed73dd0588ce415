"""What an operator does by hand, as the command does it."""

from collections.abc import Sequence

from firstclaim.operations.commands import Commands
from firstclaim.operations.selection import Selection

OPERATOR = "ada@desk"
CONNECT_SECONDS = 10
GIVE_UP_SECONDS = 3 * 86_400.0


async def rotate(database_url: str, connect_seconds: float = CONNECT_SECONDS) -> tuple[str | None, str | None]:
    """`firstclaim epoch rotate`: the epoch before and the one after."""
    async with Commands.connect(database_url, connect_seconds) as operations:
        return await operations.rotate_epoch(OPERATOR)


async def replay(database_url: str, event_ids: Sequence[str]) -> list[str]:
    """`firstclaim events replay ID...`: those that it changed."""
    async with Commands.connect(database_url, CONNECT_SECONDS) as operations:
        selection = Selection(event_ids)
        chosen = await operations.select_candidates(selection)
        batches = operations.replay(chosen, selection.filters, OPERATOR, give_up_seconds=GIVE_UP_SECONDS)
        return [event_id async for batch in batches for event_id in batch]
