"""Stripe's event, parsed from verified bytes into a frozen value.

Guarantees: an event that `parse_event` accepts can be stored (no column holds a NUL or a lone surrogate), logged (ids
and types are printable ASCII) and dispatched. The raw body is kept beside the event, byte for byte, because it is what
Stripe signed; of nine hostile but signed bodies, `jsonb` refused seven. A `StripeObject` is built only for a handler
that asks for it: plain dicts are easier to compare and copy, and building the objects halved the measured throughput.

Test deliveries that Stripe renders from a fixture have a placeholder for an id, the same one for every event
(`evt_00000000000000`). In test mode such an id gets a suffix, or the second event ever sent so would count as a
duplicate of the first. The suffix is a digest of the body: that is all which tells such an event from another, and it
is the same in a retry, because a fixture is stored nowhere and nothing renders it anew. So the same fixture, sent
twice on purpose, is a duplicate too: a retry and a second press of the button are the same bytes, and only a retry
must never run twice. A live event is never renamed: its id is Stripe's, and is unique.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Generic

from firstclaim.errors import Rejected

# A superset of Stripe's ids and types that is safe in a Redis key, a column and a log line.
EVENT_ID = re.compile(r"[A-Za-z0-9_.:\-]{1,255}")
# `evt_00000000000000`, as long as Stripe's ids have been; no id that Stripe draws is all zeros.
_PLACEHOLDER = re.compile(r"(?:[a-z]{1,16}_){1,3}0{14,24}")
_SUFFIX_CHARACTERS = 24  # 96 bits of the body's SHA-256
_TYPE = re.compile(r"[A-Za-z0-9_.\[\]\-]{1,255}")

# The driver stores the first and the last instant of a datetime as infinite.
_YEARS = (2, 9998)

SNAPSHOT = "event"
THIN = "v2.core.event"


if TYPE_CHECKING:
    from typing_extensions import TypeVar

    # The class of `Event.object`. `Event` alone is `Event[Any]`.
    ObjectT = TypeVar("ObjectT", covariant=True, default=Any)
else:
    from typing import TypeVar

    ObjectT = TypeVar("ObjectT", covariant=True)


@dataclass(frozen=True, slots=True)
class Event(Generic[ObjectT]):
    """One event. `created` is an aware UTC datetime. Do not order by it: it has whole seconds, and is not unique.

    `data` is Stripe's `data` (`{"object": {...}, "previous_attributes": {...}}`). It is `{}` for most thin events,
    which have a `related_object` instead (see `payload`). `object_id` is the id of the object that the event is about.
    `id` is Stripe's, except for a placeholder in test mode, which has a suffix that `payload["id"]` lacks.
    `endpoint` is the name of the endpoint that first received it, whose secret it was signed with; None: the endpoint
    without a name.
    """

    id: str
    type: str
    account: str | None
    livemode: bool
    created: datetime
    api_version: str | None
    object_id: str | None
    data: dict[str, Any] = field(repr=False)
    payload: dict[str, Any] = field(repr=False, compare=False)
    endpoint: str | None = None
    _object: Any = field(default=None, init=False, repr=False, compare=False)

    @property
    def object(self) -> ObjectT:
        """`data["object"]` as stripe-python's own object, for example a `stripe.Invoice`. Built on first use.

        It has the fields of the event's API version, and the type those of the installed library's. Its own requests
        (`refresh()`) use `stripe.api_key`, and go to the event's account. Raises `AttributeError` for a thin event,
        which has no object, unless the handler is declared with `fresh=True`, which fetches it.
        """
        if self._object is None:
            object.__setattr__(self, "_object", self._build())
        built: ObjectT = self._object
        return built

    def _build(self) -> Any:
        import stripe

        if "object" not in self.data:
            raise AttributeError(
                'a thin event has no object: declare the handler with fresh=True, or fetch payload["related_object"]'
            )
        if str(self.data["object"].get("object")).startswith("v2."):  # the library names such classes apart
            return stripe.StripeClient("unused").deserialize(self.data["object"], api_mode="V2")
        values = {"data": {"object": self.data["object"]}}
        return stripe.Event.construct_from(values, None, stripe_account=self.account).data.object

    @property
    def thin(self) -> bool:
        """Whether this is a `v2.core.event`, whose object has to be fetched from Stripe."""
        return self.payload.get("object") == THIN

    def with_object(self, current: dict[str, Any]) -> "Event[ObjectT]":
        """The same event with `current` as its object. `payload` stays what was signed."""
        return replace(self, data={**self.data, "object": current})


@dataclass(frozen=True, slots=True)
class EventHead:
    """The id and the type of an event that is not parsed yet. `id` is that of `Event`; an invalid type is None."""

    id: str
    type: str | None


class Delivery:
    """One POST of an event: the bytes that were signed, and the event, or at first only its id and type.

    `headers` are those of the request: names in lower case, and values. `endpoint`: the name of the endpoint that it
    came to.
    """

    __slots__ = ("_event", "body", "endpoint", "event_id", "headers", "type")

    def __init__(
        self,
        event: Event | EventHead,
        body: bytes,
        headers: Iterable[tuple[bytes, bytes]] = (),
        endpoint: str | None = None,
    ) -> None:
        self.event_id = event.id
        self.type = event.type
        self.body = body
        self.headers = headers
        self.endpoint = endpoint
        self._event = event if isinstance(event, Event) else None

    def __repr__(self) -> str:
        return f"Delivery({self.event_id!r}, {self.type!r})"

    @property
    def event(self) -> Event:
        """The whole event (see `parse`)."""
        return self.parse()

    def parse(self) -> Event:
        """Parse the body, unless it is parsed already. Raises `Rejected` (400) if it is not valid."""
        if self._event is None:
            event = parse_event(self.body, self.endpoint)
            if event.id != self.event_id:  # two parsers read it differently: the lock would be another event's
                raise _rejected('"id" is ambiguous')
            self._event = event
        return self._event


def head_of(event_id: str, event_type: object, *, livemode: bool, body: bytes) -> EventHead | None:
    """The head of an event with these fields. None without a valid id."""
    if not EVENT_ID.fullmatch(event_id):
        return None
    valid_type = isinstance(event_type, str) and _TYPE.fullmatch(event_type)
    return EventHead(_unique(event_id, livemode, body), str(event_type) if valid_type else None)


def parse_event(body: bytes, endpoint: str | None = None) -> Event:
    """Parse the verified body of a snapshot event or a thin event. Raises `Rejected` (400) with a generic reason.

    `endpoint`: the name of the endpoint that it came to, which the body does not hold.

    Formats: docs.stripe.com/api/events/object and docs.stripe.com/api/v2/core/events/object.
    """
    import orjson

    try:
        payload = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise _rejected("body is not valid JSON") from None
    if not isinstance(payload, dict) or payload.get("object") not in (SNAPSHOT, THIN):
        raise _rejected('body is not an event: "object" must be "event" or "v2.core.event"')
    thin = payload["object"] == THIN
    data = payload.get("data")
    if data is None and thin:
        data = {}
    if not isinstance(data, dict) or not (thin or isinstance(data.get("object"), dict)):
        raise _rejected('"data.object" must be an object')
    livemode = payload.get("livemode")
    if not isinstance(livemode, bool):
        raise _rejected('"livemode" must be true or false')
    about = payload.get("related_object") if thin else data["object"]
    return Event(
        id=_unique(_required(payload, "id", EVENT_ID), livemode, body),
        type=_required(payload, "type", _TYPE),
        account=_optional(payload.get("account") or (payload.get("context") if thin else None)),
        livemode=livemode,
        created=_instant(payload.get("created")),
        api_version=_optional(payload.get("api_version")),
        object_id=_optional(about.get("id")) if isinstance(about, dict) else None,
        data=data,
        payload=payload,
        endpoint=endpoint,
    )


def _rejected(reason: str) -> Rejected:
    return Rejected("content", reason)


def _required(payload: dict[str, Any], name: str, pattern: re.Pattern[str]) -> str:
    value = payload.get(name)
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise _rejected(f'"{name}" is missing or malformed')
    return value


def _unique(event_id: str, livemode: bool, body: bytes) -> str:
    """The id; in test mode a placeholder gets a suffix, which is the same for every delivery of the same bytes."""
    if livemode or not _PLACEHOLDER.fullmatch(event_id):
        return event_id
    import hashlib

    return f"{event_id}-{hashlib.sha256(body).hexdigest()[:_SUFFIX_CHARACTERS]}"


def _optional(value: object) -> str | None:
    """An optional text. An invalid value is dropped, because it is no reason to refuse the event."""
    return value if isinstance(value, str) and value.isprintable() and 0 < len(value) <= 255 else None


def _instant(value: object) -> datetime:
    try:
        if isinstance(value, int) and not isinstance(value, bool):
            instant = datetime.fromtimestamp(value, UTC)
        elif isinstance(value, str):
            instant = datetime.fromisoformat(value)
            instant = instant.astimezone(UTC) if instant.tzinfo else instant.replace(tzinfo=UTC)
        else:
            raise ValueError
        if not _YEARS[0] <= instant.year <= _YEARS[1]:
            raise ValueError
    except (ValueError, OverflowError, OSError):
        raise _rejected('"created" must be unix seconds or an ISO 8601 time') from None
    return instant
