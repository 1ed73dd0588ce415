"""Our content checks compared with stripe-python: both accept the same events, except for the listed differences."""

import json
import math
import re
import sys
from collections.abc import Callable, Collection, Mapping
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

import orjson
import pytest
import stripe
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from firstclaim.event import THIN, Event
from firstclaim.sending.events import build_event, shipped_types
from tests.fixtures import MISSING, SECRET, event_body, signed
from tests.hostile import JSON, NEARLY, bodies, nested
from tests.unit.test_event import parse

Document = dict[str, Any]

HOSTILE: Final = bodies()
THIN_TYPE: Final = "v1.billing.meter.error_report_triggered"
CLIENT: Final = stripe.StripeClient("sk_test_never_used")
FIRST_SECOND: Final = datetime(2, 1, 1, tzinfo=UTC).timestamp()
LAST_SECOND: Final = datetime(9999, 1, 1, tzinfo=UTC).timestamp()


def theirs(body: bytes) -> Document | None:
    """The fields of the event that stripe-python builds, by its method for that kind of event; None if it raises."""
    arguments = body, signed(body)["Stripe-Signature"], SECRET
    try:
        if is_thin(body):
            return vars(CLIENT.parse_event_notification(*arguments))
        return CLIENT.construct_event(*arguments).to_dict()
    except Exception:  # noqa: BLE001  (any exception means that there is no event)
        return None


def document(body: bytes) -> Document:
    """The body parsed by Python's json, as stripe-python does. An empty dict if it is not an object."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def is_thin(body: bytes) -> bool:
    return bool(document(body).get("object") == THIN)


# -- the differences ----------------------------------------------------------------------------------


class Difference(NamedTuple):
    """Documents that only one side accepts: a predicate for them, and an example body."""

    applies: Callable[[Document], bool]
    body: bytes


def matches(pattern: str, value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(pattern, value) is not None


def is_instant(value: object) -> bool:
    """Whether it is unix seconds or ISO 8601, in a year that both Postgres and Python support."""
    if isinstance(value, str):
        try:
            found = datetime.fromisoformat(value)
        except ValueError:
            return False
        value = found.replace(tzinfo=found.tzinfo or UTC).timestamp()
    elif type(value) is not int:
        return False
    return FIRST_SECOND <= value < LAST_SECOND


def has_related_object(found: Document) -> bool:
    about = found.get("related_object")
    return isinstance(about, dict) and about.keys() >= {"id", "type", "url"}


def depth(value: object) -> int:
    """How deep containers are nested. Computed level by level, because Python's recursion limit is too low."""
    levels, level = 0, [value]
    while level := [each for outer in level for each in inner(outer)]:
        levels += 1
    return levels


def inner(value: object) -> Collection[object]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def has_data(found: Document) -> bool:
    data = found.get("data")
    if found.get("object") == THIN:
        return data is None or isinstance(data, dict)
    return isinstance(data, dict) and isinstance(data.get("object"), dict)


# stripe-python builds an event from these, and we refuse them: they could not be stored, logged or dispatched.
REFUSED: Final[Mapping[str, Difference]] = {
    "not an event": Difference(
        lambda found: found.get("object") not in ("event", THIN), event_body(object="charge", data={"object": {}})
    ),
    "an id with other characters": Difference(
        lambda found: not matches(r"[A-Za-z0-9_.:-]{1,255}", found.get("id")), event_body(id="evt 1")
    ),
    "a type with other characters": Difference(
        lambda found: not matches(r"[A-Za-z0-9_.\[\]-]{1,255}", found.get("type")),
        event_body().replace(b"invoice.payment_failed", b"invoice.*"),
    ),
    "no data object": Difference(lambda found: not has_data(found), event_body(data=MISSING)),
    "livemode neither true nor false": Difference(
        lambda found: type(found.get("livemode")) is not bool, event_body(livemode=1)
    ),
    "no valid time": Difference(lambda found: not is_instant(found.get("created")), event_body(created="soon")),
}
# These are refused because they are not valid JSON.
NOT_JSON: Final[Mapping[str, bytes]] = {
    name: HOSTILE[name]
    for name in (
        "NaN",
        "Infinity",
        "1e999999",
        "integer of 400 digits",
        "lone high surrogate",
        "lone low surrogate",
        "BOM",
    )
}
# Since Python 3.12, a call of a function in Python no longer counts against the limit of the C stack.
TOO_DEEP: Final = 500 if sys.version_info < (3, 12) else 1_000
# We accept these, because an invalid optional field is no reason to refuse an event; stripe-python raises.
ACCEPTED_BY_US: Final[Mapping[str, Difference]] = {
    "nesting deeper than its objects can be": Difference(lambda found: depth(found) > 300, nested(TOO_DEEP)),
    "a related object with a missing field": Difference(
        lambda found: found.get("object") == THIN and not has_related_object(found),
        event_body(THIN_TYPE, related_object=None),
    ),
    "a context that is not text": Difference(
        lambda found: not isinstance(found.get("context") or "", str), event_body(THIN_TYPE, context=7)
    ),
    "a reason with a missing field": Difference(
        lambda found: bool(found.get("reason")), event_body(THIN_TYPE, reason={"request": None})
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_each_listed_refusal_is_real(name: str) -> None:
    """stripe-python accepts the example, we refuse it, and no other difference applies: each entry is needed."""
    body = REFUSED[name].body
    assert theirs(body) is not None
    assert not isinstance(parse(body), Event)
    assert refused_for(document(body)) == [name]


@pytest.mark.parametrize("name", NOT_JSON)
def test_json_that_only_python_accepts_is_refused(name: str) -> None:
    """Bodies outside of RFC 8259, or outside of doubles and UTF-8, are refused: other parsers refuse them too."""
    assert theirs(NOT_JSON[name]) is not None
    assert not isinstance(parse(NOT_JSON[name]), Event)
    assert refused_for(document(NOT_JSON[name])) == []


@pytest.mark.parametrize("name", ACCEPTED_BY_US)
def test_each_listed_acceptance_is_real(name: str) -> None:
    """We accept the example, stripe-python raises, and no other difference applies."""
    body = ACCEPTED_BY_US[name].body
    assert theirs(body) is None
    assert isinstance(parse(body), Event)
    assert [each for each, difference in ACCEPTED_BY_US.items() if difference.applies(document(body))] == [name]


def refused_for(found: Document) -> list[str]:
    return [name for name, difference in REFUSED.items() if difference.applies(found)]


# -- the same event -----------------------------------------------------------------------------------


def assert_agreed(body: bytes) -> None:
    """Fails unless both accept the same event, or both refuse the body, or a listed difference applies."""
    ours, their, found = parse(body), theirs(body), document(body)
    if not isinstance(ours, Event):
        assert their is None or refused_for(found) or body in NOT_JSON.values()
        return
    assert not refused_for(found)
    if their is None:
        assert any(difference.applies(found) for difference in ACCEPTED_BY_US.values())
        return
    assert (ours.id, ours.type, ours.livemode) == (their["id"], their["type"], their["livemode"])
    if not ours.thin:
        assert ours.object_id in (None, their["data"]["object"].get("id"))
        assert ours.account in (None, their.get("account"))
        assert ours.api_version in (None, their.get("api_version"))
        assert not isinstance(their["created"], int) or ours.created.timestamp() == their["created"]


@pytest.mark.parametrize("event_type", shipped_types())
def test_ordinary_events_are_the_same(event_type: str) -> None:
    """Every shipped template, also a thin one, is the same event for both, including its object."""
    body = build_event(event_type)
    ours, their = parse(body), theirs(body)
    assert isinstance(ours, Event)
    assert_agreed(body)
    assert their is not None
    assert ours.object_id == (their["related_object"].id if ours.thin else their["data"]["object"].get("id"))
    if not ours.thin:
        assert their.keys() == ours.payload.keys()
        assert their["data"]["object"].keys() == ours.data["object"].keys()


@pytest.mark.parametrize("name", [name for name in HOSTILE if "100,000" not in name])
def test_hostile_content_is_the_same(name: str) -> None:
    """Every hostile body is the same event for both, or is refused by both, or a listed difference applies."""
    assert_agreed(HOSTILE[name])


VALID: Final = st.builds(
    lambda base, changes: base | changes,
    st.sampled_from([orjson.loads(build_event(each)) for each in ("invoice.payment_failed", THIN_TYPE)]),
    NEARLY | st.just({}) | st.dictionaries(st.sampled_from(["account", "context", "api_version", "extra"]), JSON),
)


@settings(deadline=None, database=None, max_examples=200)
@given(VALID | NEARLY | JSON)
def test_any_json_is_the_same_to_both(found: object) -> None:
    """Any changed event and any other JSON document is the same for both, except for the listed differences."""
    assume(all(math.isfinite(number) for number in numbers(found)))
    assert_agreed(json.dumps(found).encode())


def numbers(found: object) -> list[float]:
    """Every float in the document."""
    return [found] if isinstance(found, float) else [number for each in inner(found) for number in numbers(each)]
