"""The first look at a body: it finds the event that parsing finds, or leaves the answer to parsing."""

import json

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from firstclaim import event as event_module
from firstclaim.errors import Rejected
from firstclaim.event import Delivery, Event
from firstclaim.web.first_look import first_look
from tests.fixtures import MISSING, event_body
from tests.hostile import ACCEPTED, JSON, NEARLY, bodies
from tests.unit.test_event import parse

HOSTILE = bodies()


def looked(body: bytes) -> Delivery | Rejected:
    """The delivery or the rejection. Any other exception fails the test."""
    try:
        return first_look(body)
    except Rejected as error:
        return error


def parsed(delivery: Delivery) -> Event | Rejected:
    """The event that the delivery is parsed into, or the rejection."""
    try:
        return delivery.event
    except Rejected as error:
        return error


def assert_as_parsed(body: bytes) -> None:
    """Fails unless the first look ends as parsing does: in the same event, or in the same rejection, now or later."""
    seen, expected = looked(body), parse(body)
    result = parsed(seen) if isinstance(seen, Delivery) else seen
    if isinstance(expected, Rejected):
        assert isinstance(result, Rejected)
        assert (result.kind, result.reason, result.status) == (expected.kind, expected.reason, expected.status)
    else:
        assert isinstance(seen, Delivery)
        assert (seen.event_id, seen.type, seen.body, result) == (expected.id, expected.type, body, expected)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bodies_are_read_alike(name: str) -> None:
    """Of every hostile body, both find the same event, or it is rejected for the same reason."""
    assert_as_parsed(HOSTILE[name])


@settings(deadline=None, database=None, max_examples=200)
@given(JSON | NEARLY, st.booleans())
def test_any_json_is_read_alike(document: object, ascii_only: bool) -> None:
    """So is any JSON document, also one that is almost an event."""
    assert_as_parsed(json.dumps(document, ensure_ascii=ascii_only).encode(errors="replace"))


@settings(deadline=None, database=None, max_examples=200)
@given(
    st.lists(st.sampled_from(["id", "type", "livemode", r"\u0069d", r"typ\u0065", "ID", "iD ", "object"]), max_size=6),
    st.lists(
        st.sampled_from(['"evt_1"', '"evt_2"', '"evt_00000000000000"', "true", "false", "null", "1", "{}", '"event"']),
        min_size=6,
        max_size=6,
    ),
)
def test_repeated_and_escaped_keys_are_read_alike(keys: list[str], values: list[str]) -> None:
    """A field that is there several times, or whose name is escaped, is the same field to both."""
    fields = "".join(f', "{key}": {value}' for key, value in zip(keys, values, strict=False))
    assert_as_parsed(event_body().rstrip(b"}") + b"}" * trailing(event_body()) + fields.encode() + b"}")


def trailing(body: bytes) -> int:
    """The braces at the end of the body, but for the last one."""
    return len(body) - len(body.rstrip(b"}")) - 1


def test_a_duplicate_is_not_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first look at a valid event does not parse it; what needs the event does, once."""
    parses: list[bytes] = []
    parse_event = event_module.parse_event

    def counted(body: bytes, endpoint: str | None) -> Event:
        parses.append(body)
        return parse_event(body, endpoint)

    monkeypatch.setattr(event_module, "parse_event", counted)
    seen = first_look(event_body("invoice.paid", "evt_1"))
    assert (seen.event_id, seen.type, parses) == ("evt_1", "invoice.paid", [])
    assert seen.event is seen.event
    assert len(parses) == 1


@pytest.mark.parametrize(
    ("changes", "event_type"),
    [
        ({"type": None}, None),
        ({"type": 1}, None),
        ({"type": "in\nvoice"}, None),
        ({"type": MISSING}, None),
        ({"object": "charge"}, "invoice.paid"),
        ({"livemode": "yes"}, "invoice.paid"),
        ({"created": "yesterday"}, "invoice.paid"),
        ({"data": []}, "invoice.paid"),
        ({"data": MISSING}, "invoice.paid"),
    ],
)
def test_with_an_id_the_rest_may_be_odd(changes: dict[str, object], event_type: str | None) -> None:
    """A body that parsing refuses has an id all the same; only a valid type is told."""
    fields = orjson.loads(event_body("invoice.paid", "evt_1")) | changes
    body = orjson.dumps({name: value for name, value in fields.items() if value is not MISSING})
    seen = first_look(body)
    assert (seen.event_id, seen.type) == ("evt_1", event_type)
    assert isinstance(parsed(seen), Rejected)


def test_some_hostile_bodies_have_an_id_and_some_have_none() -> None:
    """The bodies above prove both: accepted ones have an id, and of the others some do."""
    with_id = {name for name, body in HOSTILE.items() if isinstance(looked(body), Delivery)}
    assert ACCEPTED < with_id < set(HOSTILE)
