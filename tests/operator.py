"""What an operator does by hand, as the commands do it."""

from collections.abc import Sequence

from firstclaim.commands.commands import Commands
from firstclaim.commands.queries import Selection

OPERATOR = "ada@desk"
CONNECT_SECONDS = 10
GIVE_UP_SECONDS = 3 * 86_400.0


async def rotate(database_url: str, connect_seconds: float = CONNECT_SECONDS) -> tuple[str | None, str | None]:
    """`firstclaim epoch rotate`: the previous epoch and the new one."""
    async with Commands.connect(database_url, connect_seconds) as commands:
        return await commands.rotate_epoch(OPERATOR)


async def replay(database_url: str, event_ids: Sequence[str]) -> list[str]:
    """`firstclaim events replay ID...`: the ids of the changed events."""
    async with Commands.connect(database_url, CONNECT_SECONDS) as commands:
        selection = Selection(event_ids)
        candidates = await commands.replay_candidates(selection)
        batches = commands.replay(candidates, selection, OPERATOR, give_up_seconds=GIVE_UP_SECONDS)
        return [event_id async for batch in batches for event_id in batch]
