"""What operators did, and how far a replay has come.

Guarantees: a replay's progress is read from its events' current status, so it is true for whichever replica handles
them, and says which of them wait because their type is paused. An event that was replayed twice counts for both
replays.
"""

from typing import Final

from starlette.responses import Response

from firstclaim.admin.ledger import AdminLedger
from firstclaim.admin.request import AdminRequest, PageError
from firstclaim.operations.pauses import Paused, paused_pending
from firstclaim.operations.selection import Selection
from firstclaim.status import Status

_PAGE_ACTIONS: Final = 50
_EVENTS_SHOWN: Final = 100
_WAITING: Final = (Status.PENDING, Status.PROCESSING)


class Audit:
    """The list of actions, and one action."""

    def __init__(self, ledger: AdminLedger) -> None:
        self._ledger = ledger

    async def show_list(self, request: AdminRequest) -> Response:
        """One page of the audit."""
        before = request.query_value("before") or ""
        start = int(before) if before.isdecimal() and before.isascii() else None
        async with self._ledger.connect() as ledger:
            found = await ledger.actions(start, _PAGE_ACTIONS + 1)
        actions, more = found[:_PAGE_ACTIONS], len(found) > _PAGE_ACTIONS
        older = f"{request.home}/audit?before={actions[-1].action_id}" if more else None
        return request.render("audit.html", actions=actions, older=older, start=start)

    async def show(self, request: AdminRequest) -> Response:
        """One action, with the progress of its events."""
        async with self._ledger.connect() as ledger:
            action = await ledger.action(request.http_request.path_params["action_id"])
            if action is None:
                raise PageError(404, "No such action", "The audit does not have it.")
            ids = action.event_ids
            counts = await ledger.count(Selection(ids)) if ids else {}
            events = await ledger.list_events(Selection(ids), _EVENTS_SHOWN) if ids else []
            paused = await paused_pending(ledger, ids) if counts.get(Status.PENDING) else Paused(0, [])
        waiting = sum(counts.get(status, 0) for status in _WAITING)
        number = sum(counts.values())
        return request.render(
            "action.html",
            action=action,
            counts=counts,
            events=events,
            waiting=waiting,
            done=number - waiting,
            number=number,
            paused=paused,
        )
