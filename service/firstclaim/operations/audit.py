"""What operators did: the table `operator_actions`, read for the audit page.

Guarantees: nothing here changes a row. A list holds only the beginning of each selection, which can have ten
thousand ids. `changed` is None while an action goes on, and stays so if it was interrupted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from firstclaim.operations.queries import Queries
from firstclaim.postgres.statement import statement

FILTER_MARK: Final = " filter: "  # between the ids of a selection and the words of its filter
NAMED_MOST: Final = 10_000  # ids of a replay by filters: 300 kB, which the history of each event looks through
_SHOWN_CHARACTERS: Final = 400
_ID_MOST: Final = 2**63 - 1

_ACTIONS = statement("""
SELECT action_id, at, operator, action, left(selection, :characters) AS selection, changed,
       split_part(selection, :mark, 2) AS words
  FROM firstclaim.operator_actions
 WHERE CAST(:before AS bigint) IS NULL OR action_id < CAST(:before AS bigint)
 ORDER BY action_id DESC LIMIT :limit
""")
_ACTION = statement("""
SELECT action_id, at, operator, action, selection, changed, split_part(selection, :mark, 2) AS words
  FROM firstclaim.operator_actions WHERE action_id = :action_id
""")


def replay_selection(event_ids: Sequence[str], words: str) -> str:
    """What the audit has of a replay: the ids, for the history of each of the events, and by which filters.

    Of more than `NAMED_MOST` events that filters have selected, it has the filters only.
    """
    if words and len(event_ids) > NAMED_MOST:
        return words
    return " ".join(event_ids) + (f"{FILTER_MARK}{words}" if words else "")


@dataclass(frozen=True, slots=True)
class Action:
    """One action of an operator. `words` say what was chosen, if the page recorded it beside the ids."""

    action_id: int
    at: datetime
    operator: str
    action: str
    selection: str
    changed: int | None
    words: str

    @property
    def event_ids(self) -> list[str]:
        """The ids of the events that a replay chose. The audit of an older build has none where filters chose them."""
        if self.action != "replay":
            return []
        words = self.selection.partition(FILTER_MARK)[0].split()
        return [word for word in words if "=" not in word and word != "all"]

    @property
    def filter(self) -> str:
        """What was chosen, without the ids."""
        if self.words or self.action != "replay":
            return self.words or self.selection
        return " ".join(word for word in self.selection.split(" ") if "=" in word or word == "all")


class AuditQueries(Queries):
    """Queries of the audit page on one connection."""

    async def actions(self, before: int | None, limit: int) -> list[Action]:
        """The actions before the one with that id, the newest first. A selection may be cut off."""
        before = None if before is None else min(before, _ID_MOST)
        rows = await self.fetch(_ACTIONS, before=before, limit=limit, characters=_SHOWN_CHARACTERS, mark=FILTER_MARK)
        return [Action(**row) for row in rows]

    async def action(self, action_id: int) -> Action | None:
        """That action, with its whole selection, or None."""
        if action_id > _ID_MOST:
            return None
        rows = await self.fetch(_ACTION, action_id=action_id, mark=FILTER_MARK)
        return next((Action(**row) for row in rows), None)
