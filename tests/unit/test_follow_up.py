"""What a handler may enqueue: what is refused, before anything is written."""

from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest

from firstclaim.errors import Retry
from firstclaim.follow_up import PAYLOAD_MOST_BYTES, Origin, Outbox, parse_task
from firstclaim.registry import on

HUGE = 10**5000  # Python cannot write it
ENDS = (datetime.min, datetime.max)  # noqa: DTZ901
EAST, WEST = timezone(timedelta(hours=2)), timezone(timedelta(hours=-2))


def enqueue(outbox: Outbox, payload: Any = None, *, after: Any = 0, at: Any = None) -> str:
    return outbox.enqueue("send", payload, Origin("evt_1", "evt_1", None, False), after=after, at=at, repeat=None)


def doubled(times: int) -> Any:
    """A list whose JSON would have 2 to the power of `times` numbers."""
    nested: Any = [1]
    for _ in range(times):
        nested = [nested, nested]
    return nested


def endless() -> Any:
    nested: list[Any] = []
    nested.append(nested)
    return nested


class NoRepr:
    """A value that cannot be shown."""

    def __repr__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize(
    ("payload", "error"),
    [
        ({"a": HUGE}, r"payload\['a'\] is an int of more than 4,300 digits"),
        ([-HUGE], r"payload\[0\] is an int of more than"),
        ({HUGE: 1}, "payload has the key a value of type int, which is no str"),
        ({"a": float("inf")}, r"payload\['a'\] is inf, which JSON does not have"),
        ({"a": float("nan")}, r"payload\['a'\] is nan"),
        (b"x", "payload is a bytes"),
        ({1, 2}, "payload is a set"),
        (NoRepr(), "payload is a NoRepr"),
        ({b"a": 1}, "payload has the key b'a', which is no str"),
        ({None: 1}, "payload has the key None, which is no str"),
        ("\ud83d\ude00", "payload is a str with a surrogate, which is no text"),
        ({"\ud800": 1}, r"payload has the key '\\ud800', which is no text"),
        (endless(), "the payload is nested more than 50 levels deep"),
        (doubled(40), "the payload has more than 65,536 values"),
        ([0] * PAYLOAD_MOST_BYTES, "the payload has more than 65,536 values"),
    ],
)
def test_a_payload_that_json_does_not_have_is_refused(payload: Any, error: str) -> None:
    """It says where the value is, in one message for all of them; nothing waits to be written."""
    outbox = Outbox({"send"})
    with pytest.raises(TypeError, match=rf'enqueue\("send"\): {error}.* Expected what JSON has'):
        enqueue(outbox, payload)
    assert outbox.follow_ups == []


def test_the_largest_payload_comes_back() -> None:
    """What is just allowed is stored and read as it was."""
    payload = {"int": 10**4299, "text": "\0 \U0001f600", "deep": doubled(5), "float": -0.5, "none": [None, True]}
    outbox = Outbox({"send"})
    enqueue(outbox, payload)
    body = outbox.follow_ups[0].body
    assert body is not None
    assert parse_task(body).payload == payload


@pytest.mark.parametrize(
    "after",
    [
        *(pytest.param(HUGE, id="huge"), pytest.param(-HUGE, id="-huge"), True, "1", None, NoRepr()),
        *(-1, float("inf"), float("-inf"), float("nan"), timedelta(-1), timedelta.max),
    ],
)
def test_a_delay_that_is_none_is_refused(after: Any) -> None:
    """The message has what was given, unless it cannot be written, and what was expected."""
    outbox = Outbox({"send"})
    with pytest.raises(ValueError, match=r'enqueue\("send", after=.+\): expected seconds or a timedelta, from 0 to'):
        enqueue(outbox, after=after)
    assert outbox.follow_ups == []


@pytest.mark.parametrize(
    ("at", "error"),
    [
        *((instant, "expected an aware datetime") for instant in ENDS),
        (datetime(2030, 1, 1), "expected an aware datetime"),  # noqa: DTZ001
        (datetime(2030, 1, 1, tzinfo=UTC).date(), "expected an aware datetime"),
        (1_900_000_000, "expected an aware datetime"),
        *(
            (instant.replace(tzinfo=zone), "expected a time within the next 366 days")
            for instant in ENDS
            for zone in (UTC, EAST, WEST)
        ),
        (datetime(1969, 12, 31, tzinfo=UTC), "expected a time within the next 366 days"),
    ],
)
def test_an_instant_that_is_none_is_refused(at: Any, error: str) -> None:
    """Naive, or so far away that no database and no handler meant it."""
    outbox = Outbox({"send"})
    with pytest.raises(ValueError, match=rf'enqueue\("send", at=.+\): {error}'):
        enqueue(outbox, at=at)
    assert outbox.follow_ups == []


def test_an_instant_in_any_zone_is_the_same() -> None:
    """It is stored in UTC; one that is past is due at once."""
    outbox = Outbox({"send"})
    at = datetime.now(EAST) + timedelta(days=1)
    enqueue(outbox, at=at)
    enqueue(outbox, at=datetime(1970, 1, 1, 2, tzinfo=EAST))
    assert [each.due_at for each in outbox.follow_ups] == [at, datetime(1970, 1, 1, tzinfo=UTC)]
    assert all(each.due_at is not None and each.due_at.tzinfo is UTC for each in outbox.follow_ups)


def test_other_refusals_can_show_any_value() -> None:
    """A number that Python cannot write does not hide what was expected."""
    with pytest.raises(ValueError, match="expected a whole number from 1 to"):
        on("a.b", slots=HUGE)
    with pytest.raises(ValueError, match="expected 0 to 259200 seconds"):
        Retry(after=HUGE)
