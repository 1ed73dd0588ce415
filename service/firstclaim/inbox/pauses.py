"""The types of events whose dispatch an operator has paused.

Guarantees: what is paused is recorded and answered as ever, and waits as `pending` or `failed`. No attempt is made, no
failure is counted, and no event is given up because it waits. The pauses are rows of the ledger, and each process reads
them with every round of recovery, so a pause or its end takes effect within a round. What has been claimed by then goes
on. If the ledger cannot be read, what was read last applies: nothing can be claimed then.

This is no claim: a process of a build that knows no pauses dispatches these events, once each like any other.
"""

from collections.abc import Iterable

from firstclaim.follow_up import is_follow_up
from firstclaim.inbox.claim import Claim
from firstclaim.inbox.ledger import Ledger
from firstclaim.postgres.statement import statement
from firstclaim.registry import covers

TYPE_PAUSED = "Recorded; dispatched when its type is no longer paused"
# A handler's pause, with its row in the audit. A type that is paused already stays as it is.
_PAUSE = statement("""
WITH paused AS (
    INSERT INTO firstclaim.operator_pauses (pattern, operator, paused_at)
    VALUES (:pattern, :handler, clock_timestamp())
    ON CONFLICT (pattern) DO NOTHING
    RETURNING pattern, operator, paused_at
)
INSERT INTO firstclaim.operator_actions (at, operator, action, selection, changed)
SELECT paused_at, operator, 'pause', pattern, 1 FROM paused
RETURNING selection
""")


async def pause_for_handler(ledger: Ledger, claim: Claim, handler: str) -> bool:
    """Pause the type of the claimed event, because its handler asks for it. False: it was paused already.

    Raises `LedgerUnavailable`.
    """
    return bool(await ledger.run(_PAUSE, pattern=claim.type, handler=f"handler {handler}"))


class Pauses:
    """What this process knows of the pauses. `patterns`: types, `prefix.*` or `*`, as handlers are declared for."""

    def __init__(self) -> None:
        self.patterns: frozenset[str] = frozenset()

    def update(self, patterns: Iterable[str]) -> None:
        """Note what the ledger says now."""
        self.patterns = frozenset(patterns)

    def cover(self, event_type: str) -> bool:
        """Whether events of this type are paused."""
        return bool(self.patterns) and any(covers(pattern, event_type) for pattern in self.patterns)

    def touch(self, handler_pattern: str) -> bool:
        """Whether all or some of the types of a handler with this pattern are paused."""
        return any(
            covers(each, handler_pattern) or (covers(handler_pattern, each) and not is_follow_up(each))
            for each in self.patterns
        )
