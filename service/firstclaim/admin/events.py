"""The list of events, one event, and its payload.

Guarantees: the list has a bounded size, and says how far back it was searched. A payload is shown only in response to a
form, so that no link shows one and none is in the browser's history. Every view of a payload is logged with the
event's id.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Final
from urllib.parse import urlencode

import structlog
from starlette.responses import Response

from firstclaim.admin import stripe_links
from firstclaim.admin.json_view import changes, first_lines, fold, pretty_json
from firstclaim.admin.ledger import AdminLedger
from firstclaim.admin.ranges import as_text, parse_instant
from firstclaim.admin.request import AdminRequest, PageError
from firstclaim.errors import StatementTimeout
from firstclaim.inbox.routes import Routes
from firstclaim.operations.keys import key_is_held
from firstclaim.operations.pauses import paused_among
from firstclaim.operations.queries import FOLLOW_UPS_SHOWN, EventRow
from firstclaim.operations.search import UNSUCCESSFUL, Cursor, Search
from firstclaim.operations.selection import Selection
from firstclaim.status import Status

log = structlog.get_logger(__name__)

PAGE_EVENTS: Final = 50
REPLAYED_MOST: Final = 1000  # in one replay: for more there is the command, which shows its progress
FILTERS: Final = (
    "q",
    "status",
    "type",
    "account",
    "age",
    "since",
    "until",
    "group",
    "endpoint",
    "kind",
)  # the names in an address or a form
KINDS: Final[Mapping[str, bool]] = {"events": False, "follow-ups": True}  # whether the rows are follow-ups
_ROW_IDS: Final = ("evt_", "task_", "handler_")
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
    since: datetime | None = None
    until: datetime | None = None
    group: str | None = None
    endpoint: str | None = None
    kind: str | None = None
    unread: tuple[str, ...] = ()  # the names of the filters that have a value which is none, and are left out

    @classmethod
    def of(cls, values: Mapping[str, list[str]]) -> "Filters":
        """The filters in an address or a form."""

        def first(name: str) -> str | None:
            return next(iter(values.get(name, [])), None)

        chosen = values.get("status", [])
        age, kind = first("age"), first("kind")
        statuses = tuple(each for each in Status if each in chosen)
        since, until = (parse_instant(first(name)) for name in ("since", "until"))
        unread = {
            "status": len(statuses) < len(set(chosen)),
            "age": age is not None and age not in AGES,
            "since": first("since") is not None and since is None,
            "until": first("until") is not None and until is None,
            "kind": kind is not None and kind not in KINDS,
        }
        return cls(
            first("q"),
            statuses,
            first("type"),
            first("account"),
            age if age in AGES else None,
            since,
            until,
            first("group"),
            first("endpoint"),
            kind if kind in KINDS else None,
            tuple(name for name, is_unread in unread.items() if is_unread),
        )

    @property
    def search(self) -> Search:
        """The search for an event's id, for a customer's id (also in payloads), or for any other object's id."""
        _, newer, older = AGES.get(self.age or "", ("", None, None))
        selection = Selection(
            None,
            self.statuses or None,
            self.type,
            self.account,
            older,
            newer,
            self.group,
            self.since,
            self.until,
            "" if self.endpoint == "-" else self.endpoint,
            KINDS.get(self.kind or ""),
        )
        if self.q is None:
            return Search(selection)
        if self.q.startswith(_ROW_IDS):
            return Search(replace(selection, event_ids=[self.q]))
        return Search(selection, self.q, customer=self.q.startswith("cus_"))

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The filters as parameters of an address or fields of a form."""
        single = {
            "q": self.q,
            "type": self.type,
            "account": self.account,
            "age": self.age,
            "since": None if self.since is None else as_text(self.since),
            "until": None if self.until is None else as_text(self.until),
            "group": self.group,
            "endpoint": self.endpoint,
            "kind": self.kind,
        }
        return [(name, value) for name, value in single.items() if value] + [("status", each) for each in self.statuses]

    @property
    def words(self) -> str:
        """The filters in words: what is said before a replay, and written into the audit."""
        age = AGES.get(self.age or "", ("",))[0]
        parts = {
            "status": ", ".join(self.statuses),
            "type": self.type,
            "account": self.account,
            "id": self.q,
            "received": age,
            "since": None if self.since is None else as_text(self.since),
            "until": None if self.until is None else as_text(self.until),
            "failure group": self.group,
            "endpoint": self.endpoint,
            "only": self.kind,
        }
        return "; ".join(f"{name} {value}" for name, value in parts.items() if value)

    def address(self, home: str, **more: str) -> str:
        """The address of the list with these filters."""
        query = urlencode([*self.pairs, *more.items()])
        return f"{home}/events" + (f"?{query}" if query else "")


class Events:
    """The pages of events."""

    def __init__(self, ledger: AdminLedger, routes: Routes, endpoints: Sequence[str]) -> None:
        self._ledger = ledger
        self._routes = routes
        self._endpoints = endpoints  # the names, for the filter

    def _is_replayable(self, event: EventRow) -> bool:
        return is_replayable(event.status, event.type, event.livemode, self._routes)

    async def show_list(self, request: AdminRequest) -> Response:
        """One page of the list."""
        filters = Filters.of({name: request.query_values(name) for name in FILTERS})
        cursor, home = _parse_cursor(request.query_value("from")), request.home
        async with self._ledger.connect() as ledger:
            found = await ledger.page(filters.search, cursor, PAGE_EVENTS)
            among = (Status.IGNORED,) if filters.statuses == (Status.IGNORED,) else UNSUCCESSFUL
            try:
                replayable_count = len(await ledger.replayable(filters.search, REPLAYED_MOST + 1, among))
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
            replays_ignored=Status.IGNORED in among,
            is_replayable=self._is_replayable,
            any_replayable=any(map(self._is_replayable, found.events)),
            ages=AGES,
            kinds=KINDS,
            scan_limit=filters.search.scan_limit,
            as_text=as_text,
            endpoints=self._endpoints,
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
            deliveries = await ledger.deliveries(event_id)
            try:
                follow_ups = await ledger.follow_ups(event_id)
            except StatementTimeout:  # a large ledger without the index of 0014
                follow_ups = []
            waits = event.status in (Status.PENDING, Status.FAILED)
            paused = await paused_among(ledger, {event.type: 1} if waits else {})
            handler = self._routes.handler_of(event.type, event.livemode) if waits else None
            key = None if handler is None else handler.options.key
            key_held = None if key is None else await key_is_held(ledger, event, key)
        return request.render(
            "event.html",
            event=event,
            timeline=timeline,
            deliveries=deliveries,
            follow_ups=follow_ups,
            follow_ups_shown=FOLLOW_UPS_SHOWN,
            paused=paused,
            key_held=key_held,
            is_replayable=self._is_replayable(event),
            event_link=stripe_links.to_event(event),
            object_link=stripe_links.to_object(event),
        )

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
        log.info(
            "admin_payload_shown",
            event_id=event.event_id,
            address=request.address,
            user=request.required_session.user,
            pruned=body is None,
        )
        text = None if body is None else body.decode(errors="replace")
        shown, left_out = ("", 0) if text is None else first_lines(pretty_json(text))
        return request.render(
            "payload.html",
            event=event,
            lines=None if text is None else fold(shown),
            left_out=left_out,
            changes=[] if text is None else changes(text),
            size_bytes=len(body or b""),
            event_link=stripe_links.to_event(event),
        )


def is_replayable(status: Status, event_type: str, livemode: bool, routes: Routes) -> bool:
    """Whether the page offers to replay such an event: a failed or dead one, or an ignored one with a handler now."""
    return status in UNSUCCESSFUL or (status is Status.IGNORED and routes.wants(event_type, livemode))


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
