"""Parsing: snapshot and thin events, malformed events, and hostile content under a valid signature."""

import hashlib
import json
import re
from datetime import UTC, datetime
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from firstclaim.errors import Rejected
from firstclaim.event import Delivery, Event, EventHead, parse_event
from tests.fixtures import MISSING, event_body
from tests.hostile import ACCEPTED, JSON, NEARLY, bodies

THIN = "v1.billing.meter.error_report_triggered"
HOSTILE = bodies()


def parse(body: bytes) -> Event | Rejected:
    """The event or the rejection. Any other exception fails the test."""
    try:
        return parse_event(body)
    except Rejected as error:
        return error


def assert_storable(event: Event) -> None:
    """Fails unless ids and types are printable ASCII, and the other columns are text that Postgres accepts."""
    assert re.fullmatch(r"[A-Za-z0-9_.:\-]{1,255}", event.id)
    assert re.fullmatch(r"[A-Za-z0-9_.\[\]\-]{1,255}", event.type)
    for text in (event.account, event.api_version, event.object_id):
        assert text is None or (0 < len(text) <= 255 and text.isprintable() and text.encode())
    assert isinstance(event.livemode, bool)
    assert event.created.tzinfo is UTC
    assert isinstance(event.data, dict)


def assert_harmless(error: Rejected) -> None:
    """Fails unless the rejection is a 400 with one of our own reasons."""
    assert (error.kind, error.status) == ("content", 400)
    assert error.reason in REASONS


REASONS = {
    "body is not valid JSON",
    'body is not an event: "object" must be "event" or "v2.core.event"',
    '"data.object" must be an object',
    '"livemode" must be true or false',
    '"id" is missing or malformed',
    '"type" is missing or malformed',
    '"created" must be unix seconds or an ISO 8601 time',
}


# -- snapshot and thin events -------------------------------------------------------------------------


def test_a_snapshot_is_parsed() -> None:
    """Every field of a snapshot event is read from where Stripe documents it."""
    body = event_body(
        "invoice.paid",
        "evt_1",
        account="acct_1",
        livemode=True,
        created=1_793_610_041,
        api_version="2026-10-28.clover",
        data={"object": {"id": "in_1"}, "previous_attributes": {"paid": False}},
    )
    event = parse_event(body)
    assert (event.id, event.type, event.account, event.livemode) == ("evt_1", "invoice.paid", "acct_1", True)
    assert event.created == datetime(2026, 11, 2, 9, 0, 41, tzinfo=UTC)
    assert (event.api_version, event.object_id, event.thin) == ("2026-10-28.clover", "in_1", False)
    assert event.data["previous_attributes"] == {"paid": False}
    assert event.payload == orjson.loads(body)


def test_a_thin_event_is_parsed() -> None:
    """A `v2.core.event` has no data: its object is the related object, and its account is the context."""
    event = parse_event(
        event_body(
            THIN,
            "evt_2",
            data=MISSING,
            context="acct_2",
            created="2026-11-02T09:00:41.500Z",
            related_object={"id": "mtr_1", "type": "billing.meter", "url": "/v1/billing/meters/mtr_1"},
        )
    )
    assert (event.id, event.type, event.account, event.object_id) == ("evt_2", THIN, "acct_2", "mtr_1")
    assert event.created == datetime(2026, 11, 2, 9, 0, 41, 500_000, tzinfo=UTC)
    assert (event.thin, event.data) == (True, {})


# -- placeholder ids -----------------------------------------------------------------------------------

PLACEHOLDERS = ["evt_00000000000000", "evt_000000000000000000000000", "evt_test_00000000000000"]


@pytest.mark.parametrize("placeholder", PLACEHOLDERS)
def test_a_placeholder_in_test_mode_gets_the_digest_of_its_body(placeholder: str) -> None:
    """Two test events of one placeholder id have two ids, which begin with it; the same bytes always have the same."""
    paid = event_body("invoice.paid", placeholder)
    failed = event_body("invoice.payment_failed", placeholder)
    ids = [parse_event(body).id for body in (paid, failed, paid)]
    assert ids[0] == ids[2] != ids[1]
    assert ids[0] == f"{placeholder}-{hashlib.sha256(paid).hexdigest()[:24]}"
    assert parse_event(paid).payload["id"] == placeholder
    assert_storable(parse_event(paid))


@pytest.mark.parametrize("placeholder", PLACEHOLDERS)
def test_a_live_event_is_never_renamed(placeholder: str) -> None:
    """In live mode an id is Stripe's and unique, whatever it looks like."""
    assert parse_event(event_body("invoice.paid", placeholder, livemode=True)).id == placeholder


@pytest.mark.parametrize("real", ["evt_1", "evt_0000000000000", "evt_1Sca5RKdVq2Wn7RtLxQt0Jx7", "evt_00000000000001"])
def test_an_id_that_stripe_drew_is_kept(real: str) -> None:
    """In test mode too, every id that is not all zeros is kept."""
    assert parse_event(event_body("invoice.paid", real)).id == real


@pytest.mark.parametrize("related", [None, MISSING, [], "mtr_1", {"id": 7}, {"id": MISSING}])
def test_a_thin_event_may_have_no_related_object(related: object) -> None:
    """A thin event with a missing or invalid related object is accepted without an object id."""
    assert parse_event(event_body(THIN, related_object=related)).object_id is None


@pytest.mark.parametrize(
    ("created", "instant"),
    [
        (0, datetime(1970, 1, 1, tzinfo=UTC)),
        (-1, datetime(1969, 12, 31, 23, 59, 59, tzinfo=UTC)),
        ("2026-11-02T09:00:41Z", datetime(2026, 11, 2, 9, 0, 41, tzinfo=UTC)),
        ("2026-11-02T10:00:41+01:00", datetime(2026, 11, 2, 9, 0, 41, tzinfo=UTC)),
        ("2026-11-02T09:00:41", datetime(2026, 11, 2, 9, 0, 41, tzinfo=UTC)),
    ],
)
def test_created_is_an_aware_instant(created: int | str, instant: datetime) -> None:
    """`created` as unix seconds or in ISO 8601, with an offset or without, becomes an aware UTC datetime."""
    found = parse_event(event_body(created=created)).created
    assert (found, found.tzinfo) == (instant, UTC)


@pytest.mark.parametrize("field", ["account", "api_version"])
@pytest.mark.parametrize("value", [MISSING, None, "", 7, [], {}, "x" * 256, "a\nb", "a\0b", "\u202e"])
def test_an_invalid_optional_field_is_dropped(field: str, value: Any) -> None:
    """An invalid optional field is None, and the event is accepted."""
    assert getattr(parse_event(event_body(**{field: value})), field) is None


def test_the_repr_shows_no_payload() -> None:
    """The repr of a delivery, which may get into a log, shows nothing of the payload."""
    body = event_body(data={"object": {"customer_email": "jo@example.com"}})
    assert "jo@" not in repr(Delivery(parse_event(body), body))


def test_a_body_with_another_id_is_refused() -> None:
    """A delivery is that of one event: if parsing finds another id than the first look did, it is refused."""
    delivery = Delivery(EventHead("evt_2", None), event_body(id="evt_1"))
    with pytest.raises(Rejected, match="ambiguous"):
        delivery.parse()


# -- malformed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"id": MISSING}, '"id" is missing or malformed'),
        ({"id": None}, '"id" is missing or malformed'),
        ({"id": 7}, '"id" is missing or malformed'),
        ({"id": ""}, '"id" is missing or malformed'),
        ({"id": "x" * 256}, '"id" is missing or malformed'),
        ({"id": "evt 1"}, '"id" is missing or malformed'),
        ({"id": "evt_1\n"}, '"id" is missing or malformed'),
        ({"id": "evt_\N{LATIN SMALL LETTER E WITH ACUTE}"}, '"id" is missing or malformed'),
        ({"id": "evt/../1"}, '"id" is missing or malformed'),
        ({"type": MISSING}, '"type" is missing or malformed'),
        ({"type": ["invoice.paid"]}, '"type" is missing or malformed'),
        ({"type": "invoice paid"}, '"type" is missing or malformed'),
        ({"type": "invoice.*"}, '"type" is missing or malformed'),
        ({"object": MISSING}, 'body is not an event: "object" must be "event" or "v2.core.event"'),
        ({"object": "invoice"}, 'body is not an event: "object" must be "event" or "v2.core.event"'),
        ({"object": ["event"]}, 'body is not an event: "object" must be "event" or "v2.core.event"'),
        ({"data": MISSING}, '"data.object" must be an object'),
        ({"data": None}, '"data.object" must be an object'),
        ({"data": []}, '"data.object" must be an object'),
        ({"data": {"object": None}}, '"data.object" must be an object'),
        ({"data": {"object": "in_1"}}, '"data.object" must be an object'),
        ({"livemode": MISSING}, '"livemode" must be true or false'),
        ({"livemode": "false"}, '"livemode" must be true or false'),
        ({"livemode": 0}, '"livemode" must be true or false'),
        *(
            ({"created": value}, '"created" must be unix seconds or an ISO 8601 time')
            for value in (MISSING, None, True, 1.5, "soon", "", [], 10**17, -(10**17), "0001-01-01T00:00:00+23:59")
        ),
    ],
)
def test_a_malformed_event_is_rejected(changes: dict[str, Any], reason: str) -> None:
    """Each malformed field is a 400 whose reason names the field and not its value."""
    event = orjson.loads(event_body()) | changes
    error = parse(orjson.dumps({name: value for name, value in event.items() if value is not MISSING}))
    assert isinstance(error, Rejected)
    assert_harmless(error)
    assert error.reason == reason


@pytest.mark.parametrize("data", [[], "x", 7, True])
def test_a_thin_event_with_invalid_data_is_rejected(data: object) -> None:
    """`data` is optional in a thin event, but must be an object if it exists."""
    error = parse(event_body(THIN, data=data))
    assert isinstance(error, Rejected)
    assert error.reason == '"data.object" must be an object'


@pytest.mark.parametrize("body", [b"null", b"[]", b"7", b'"event"', b"true", b"{}"])
def test_json_that_is_not_an_event_is_rejected(body: bytes) -> None:
    """A JSON document that is not an event is rejected with that reason."""
    error = parse(body)
    assert isinstance(error, Rejected)
    assert error.reason.startswith("body is not an event")


# -- hostile ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_body_is_an_event_or_a_400(name: str) -> None:
    """A hostile body is either an event that can be stored, logged and dispatched, or a generic rejection."""
    result = parse(HOSTILE[name])
    if name in ACCEPTED:
        assert isinstance(result, Event)
        assert_storable(result)
    else:
        assert isinstance(result, Rejected)
        assert_harmless(result)


def test_the_last_of_a_repeated_key_is_used() -> None:
    """If the id is given twice, the last one is used, as by every common JSON parser."""
    body = HOSTILE["the id twice"]
    assert parse_event(body).id == orjson.loads(body)["id"] != "evt_first"


def assert_event_or_rejected(body: bytes) -> None:
    result = parse(body)
    if isinstance(result, Rejected):
        assert_harmless(result)
    else:
        assert_storable(result)


@settings(deadline=None, database=None)
@given(st.binary())
def test_any_bytes_are_an_event_or_a_400(body: bytes) -> None:
    """No bytes raise anything but `Rejected`."""
    assert_event_or_rejected(body)


@settings(deadline=None, database=None, max_examples=100)
@given(JSON | NEARLY)
def test_any_json_is_an_event_or_a_400(document: object) -> None:
    """No JSON document raises anything but `Rejected`, even if it is almost an event."""
    assert_event_or_rejected(json.dumps(document).encode())
