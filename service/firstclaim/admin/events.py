"""The list of events, one event, and its payload.

Guarantees: the list has a bounded size, and says how far back it was searched. A payload is shown only in response to a
form, so that no link shows one and none is in the browser's history. Every view of a payload is logged with the
event's id.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Final
from urllib.parse import urlencode

import structlog
from starlette.responses import Response

from firstclaim.admin.ledger import AdminLedger
from firstclaim.admin.rendering import pretty_json
from firstclaim.admin.request import AdminRequest, PageError
from firstclaim.errors import StatementTimeout
from firstclaim.operations.queries import Selection
from firstclaim.operations.search import UNSUCCESSFUL, Cursor, Search
from firstclaim.status import Status

log = structlog.get_logger(__name__)

PAGE_EVENTS: Final = 50
REPLAYED_MOST: Final = 1000  # in one replay: for more there is the command, which shows its progress
FILTERS: Final = ("q", "status", "type", "account", "age")  # the names in an address or a form
_DAY = 86_400.0
# The choices for the age: (label, newer than, older than), in seconds.
AGES: Final[Mapping[str, tuple[str, float | None, float | None]]] = {
    "1h": ("last hour", 3600.0, None),
    "24h": ("last 24 hours", _DAY, None),
    "7d": ("last 7 days", 7 * _DAY, None),
    "30d": ("last 30 days", 30 * _DAY, None),
    "over-1d": ("more than a day ago", None, _DAY),
    "over-7d": ("more than 7 days ago", None, 7 * _DAY),
}


@dataclass(frozen=True, slots=True)
class Filters:
    """The filters of the list, as in its form and its address."""

    q: str | None = None
    statuses: tuple[Status, ...] = ()
    type: str | None = None
    account: str | None = None
    age: str | None = None

    @classmethod
    def of(cls, values: Mapping[str, list[str]]) -> "Filters":
        """The filters in an address or a form. A value that is not a choice is ignored."""

        def first(name: str) -> str | None:
            return next(iter(values.get(name, [])), None)

        chosen = values.get("status", [])
        age = first("age")
        statuses = tuple(each for each in Status if each in chosen)
        return cls(first("q"), statuses, first("type"), first("account"), age if age in AGES else None)

    @property
    def search(self) -> Search:
        """The search for an event's id, for a customer's id (also in payloads), or for any other object's id."""
        _, newer, older = AGES.get(self.age or "", ("", None, None))
        selection = Selection(None, self.statuses or None, self.type, self.account, older, newer)
        if self.q is None:
            return Search(selection)
        if self.q.startswith("evt_"):
            return Search(replace(selection, event_ids=[self.q]))
        return Search(selection, self.q, customer=self.q.startswith("cus_"))

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The filters as parameters of an address or fields of a form."""
        single = {"q": self.q, "type": self.type, "account": self.account, "age": self.age}
        return [(name, value) for name, value in single.items() if value] + [("status", each) for each in self.statuses]

    def address(self, home: str, **more: str) -> str:
        """The address of the list with these filters."""
        query = urlencode([*self.pairs, *more.items()])
        return f"{home}/events" + (f"?{query}" if query else "")


class Events:
    """The pages of events."""

    def __init__(self, ledger: AdminLedger) -> None:
        self._ledger = ledger

    async def show_list(self, request: AdminRequest) -> Response:
        """One page of the list."""
        filters = Filters.of({name: request.query_values(name) for name in FILTERS})
        cursor, home = _parse_cursor(request.query_value("from")), request.home
        async with self._ledger.connect() as ledger:
            found = await ledger.page(filters.search, cursor, PAGE_EVENTS)
            try:
                replayable_count = len(await ledger.replayable(filters.search, REPLAYED_MOST + 1))
            except StatementTimeout:
                replayable_count = 0  # the list is complete; only the offer to replay is left out
        return request.render(
            "events.html",
            filters=filters,
            found=found,
            cursor=cursor,
            older=None if found.next_cursor is None else filters.address(home, **_from(found.next_cursor)),
            newest=filters.address(home),
            select_all=filters.address(home, select="all", **({} if cursor is None else _from(cursor))),
            all_selected=request.query_value("select") == "all",
            replayable_count=replayable_count,
            replayed_most=REPLAYED_MOST,
            replayable_statuses=UNSUCCESSFUL,
            ages=AGES,
            scan_limit=filters.search.scan_limit,
        )

    async def show(self, request: AdminRequest) -> Response:
        """One event."""
        event_id = request.http_request.path_params["event_id"]
        if not event_id.isprintable():
            raise _unknown()
        async with self._ledger.connect() as ledger:
            event = await ledger.find(event_id)
            if event is None:
                raise _unknown()
            timeline = await ledger.timeline(event)
        return request.render("event.html", event=event, timeline=timeline, replayable_statuses=UNSUCCESSFUL)

    async def show_payload(self, request: AdminRequest) -> Response:
        """The event's payload, in response to a form."""
        event_id = request.form_value("event")
        if not event_id.isprintable():
            raise _unknown()
        async with self._ledger.connect() as ledger:
            event = await ledger.find(event_id)
            body = await ledger.payload(event_id)
        if event is None:
            raise _unknown()
        log.info("admin_payload_shown", event_id=event.event_id, address=request.address, pruned=body is None)
        text = None if body is None else pretty_json(body.decode(errors="replace"))
        return request.render("payload.html", event=event, payload=text, size_bytes=len(body or b""))


def _unknown() -> PageError:
    text = "The ledger does not have the event: it was never received, or it has been pruned."
    return PageError(404, "No such event", text)


def _from(cursor: Cursor) -> dict[str, str]:
    """The parameter of an address that stands for the cursor."""
    return {"from": f"{cursor.received_at.isoformat()}~{cursor.event_id}"}


def _parse_cursor(text: str | None) -> Cursor | None:
    """The cursor in an address. None, the start of the list, if there is no valid one."""
    at, _, event_id = (text or "").partition("~")
    try:
        parsed = datetime.fromisoformat(at)
    except ValueError:
        return None
    return Cursor(parsed, event_id) if parsed.tzinfo is not None and event_id else None
