"""The list of events, one event, and its payload.

Guarantees: a list is one page of bounded size, which says how far was looked; a payload is shown only when it was
asked for by a form of its own, so that no link shows one and none stays in a browser's history, and every look at one
is logged with the event's id.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Final
from urllib.parse import urlencode

import structlog
from starlette.responses import Response

from firstclaim.admin.ledger import AdminLedger
from firstclaim.admin.rendering import laid_out
from firstclaim.admin.request import PATH, AdminRequest, Refused
from firstclaim.errors import StatementTimeout
from firstclaim.operations.queries import Selection
from firstclaim.operations.search import UNSUCCESSFUL, Cursor, Search
from firstclaim.status import Status

log = structlog.get_logger(__name__)

PAGE_EVENTS: Final = 50
REPLAYED_MOST: Final = 1000  # at once: more is the command's, which shows how far it is
_DAY = 86_400.0
# What may be chosen as the age: (newer than, older than), seconds.
AGES: Final[Mapping[str, tuple[str, float | None, float | None]]] = {
    "1h": ("last hour", 3600.0, None),
    "24h": ("last 24 hours", _DAY, None),
    "7d": ("last 7 days", 7 * _DAY, None),
    "30d": ("last 30 days", 30 * _DAY, None),
    "over-1d": ("over a day ago", None, _DAY),
    "over-7d": ("over 7 days ago", None, 7 * _DAY),
}


@dataclass(frozen=True, slots=True)
class Filters:
    """What the list was asked for, as its form and its address hold it."""

    q: str | None = None
    statuses: tuple[Status, ...] = ()
    type: str | None = None
    account: str | None = None
    age: str | None = None

    @classmethod
    def of(cls, values: Mapping[str, list[str]]) -> "Filters":
        """From an address or a form; what is none of the choices counts as not chosen."""

        def one(name: str) -> str | None:
            return next(iter(values.get(name, [])), None)

        chosen = values.get("status", [])
        age = one("age")
        statuses = tuple(each for each in Status if each in chosen)
        return cls(one("q"), statuses, one("type"), one("account"), age if age in AGES else None)

    @property
    def search(self) -> Search:
        """An event's id is the event's, a customer's is looked for in payloads too, any other is an object's."""
        _, newer, older = AGES.get(self.age or "", ("", None, None))
        selection = Selection(None, self.statuses or None, self.type, self.account, older, newer)
        if self.q is None:
            return Search(selection)
        if self.q.startswith("evt_"):
            return Search(replace(selection, event_ids=[self.q]))
        return Search(selection, self.q, customer=self.q.startswith("cus_"))

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """For an address or a form."""
        single = {"q": self.q, "type": self.type, "account": self.account, "age": self.age}
        return [(name, value) for name, value in single.items() if value] + [("status", each) for each in self.statuses]

    def address(self, **more: str) -> str:
        """Of the list."""
        query = urlencode([*self.pairs, *more.items()])
        return f"{PATH}/events" + (f"?{query}" if query else "")


class Events:
    """The list and what it leads to."""

    def __init__(self, asking: AdminLedger) -> None:
        self._asking = asking

    async def browse(self, visit: AdminRequest) -> Response:
        """A page of the list."""
        names = ("q", "status", "type", "account", "age")
        filters = Filters.of({name: visit.words(name) for name in names})
        place = _place(visit.word("from"))
        async with self._asking.ledger() as ledger:
            found = await ledger.page(filters.search, place, PAGE_EVENTS)
            try:
                replayable = len(await ledger.replayable(filters.search, REPLAYED_MOST + 1))
            except StatementTimeout:
                replayable = 0  # the list is here; what has to be looked for longer is not offered
        return visit.page(
            "events.html",
            filters=filters,
            found=found,
            place=place,
            older=None if found.next_cursor is None else filters.address(**{"from": _told(found.next_cursor)}),
            newest=filters.address(),
            all_ticked=filters.address(tick="all", **({} if place is None else {"from": _told(place)})),
            ticked=visit.word("tick") == "all",
            replayable=replayable,
            replayed_most=REPLAYED_MOST,
            can_be_replayed=UNSUCCESSFUL,
            ages=AGES,
            looked_at=filters.search.scan_limit,
        )

    async def show(self, visit: AdminRequest) -> Response:
        """One event."""
        event_id = visit.request.path_params["event_id"]
        if not event_id.isprintable():
            raise _unknown()
        async with self._asking.ledger() as ledger:
            event = await ledger.find(event_id)
            if event is None:
                raise _unknown()
            timeline = await ledger.timeline(event)
        return visit.page("event.html", event=event, timeline=timeline, can_be_replayed=UNSUCCESSFUL)

    async def show_payload(self, visit: AdminRequest) -> Response:
        """The event's payload; a form's answer."""
        event_id = visit.field("event")
        if not event_id.isprintable():
            raise _unknown()
        async with self._asking.ledger() as ledger:
            event = await ledger.find(event_id)
            body = await ledger.payload(event_id)
        if event is None:
            raise _unknown()
        log.info("admin_payload_shown", event_id=event.event_id, address=visit.address, there=body is not None)
        text = None if body is None else laid_out(body.decode(errors="replace"))
        return visit.page("payload.html", event=event, payload=text, size_bytes=len(body or b""))


def _unknown() -> Refused:
    return Refused(404, "No such event", "The ledger does not have it: it never came, or it has been pruned.")


def _told(place: Cursor) -> str:
    return f"{place.received_at.isoformat()}~{place.event_id}"


def _place(text: str | None) -> Cursor | None:
    """Where a page begins; what is no place is the beginning."""
    at, _, event_id = (text or "").partition("~")
    try:
        parsed = datetime.fromisoformat(at)
    except ValueError:
        return None
    return Cursor(parsed, event_id) if parsed.tzinfo is not None and event_id else None
