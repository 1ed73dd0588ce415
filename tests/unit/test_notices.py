"""What a notice says, and when refused signatures are worth one."""

import itertools
from typing import Any

import orjson
import pytest

from firstclaim.notify.notice import Notice
from firstclaim.notify.refusals import Refusals
from firstclaim.observability import metrics

CONTENT: dict[str, Any] = {
    "kind": "event_dead",
    "events": 1,
    "handler": "shop.make.<locals>.grant",
    "error_class": "A&B",
    "place": "shop/handlers.py:12 in make.<locals>.grant",
    "group": "0f3a",
    "type": "invoice.paid",
    "example_id": "evt_1",
    "first_at": "2026-01-01T00:00:00+00:00",
    "last_at": "2026-01-01T00:00:07.123456+00:00",
    "reason": "signature_mismatch",
}


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("event_dead", "1 event is dead in the handler"),
        ("handler_failing", "has been failing since 2026-01-01 00:00:00 UTC:"),
        ("handler_recovered", "has recovered"),
        ("signatures_refused", "1 request was refused: signature_mismatch"),
    ],
)
def test_each_kind_is_a_sentence(kind: str, words: str) -> None:
    """It says what happened; names of code are not read as Slack's markup; the fields have them as they are."""
    notice = Notice("topic", "id", {**CONTENT, "kind": kind}, 1)
    sent = orjson.loads(notice.body())
    assert words in sent["text"]
    assert "<" not in sent["text"]
    if "make" in sent["text"]:
        assert "shop.make.&lt;locals&gt;.grant" in sent["text"]
    assert sent["handler"] == CONTENT["handler"]
    assert ("events" in sent) == (kind in ("event_dead", "signatures_refused"))
    assert (sent["first_at"], sent["last_at"]) == ("2026-01-01T00:00:00+00:00", "2026-01-01T00:00:07+00:00")
    assert ".123" not in sent["text"]
    assert (sent["id"], sent["kind"]) == ("id", kind)


def test_what_is_not_known_is_left_out() -> None:
    """A field without a value is not sent, nor is one that is no field of a notice."""
    content = {**CONTENT, "group": None, "handler": None, "error_class": None, "place": None, "watched": ["evt_2"]}
    sent = orjson.loads(Notice("topic", "id", content, 1).body())
    assert not {"group", "handler", "error_class", "place", "reason_", "watched"} & sent.keys()
    assert "invoice.paid" in sent["text"]


def refuse(number: int, *, accepted: int = 0) -> None:
    """Count requests as the endpoint does."""
    for _ in range(number):
        metrics.rejected["signature_mismatch"].inc()
    for _ in range(accepted):
        next(iter(metrics.deliveries.values())).inc()


def test_a_few_refusals_among_many_requests_are_no_incident() -> None:
    """Three are told, unless they are less than one in ten of all; what was told is forgotten."""
    refusals = Refusals()
    refuse(2)
    assert refusals.take().by_kind == {}
    refuse(1)
    assert refusals.take().by_kind == {"signature_mismatch": 3}
    assert refusals.take().by_kind == {}
    refuse(3, accepted=28)
    assert refusals.take().by_kind == {}
    refuse(1)
    assert refusals.take().by_kind == {"signature_mismatch": 4}


def test_the_traffic_before_a_roll_does_not_delay_its_report() -> None:
    """After an hour of traffic, all requests of a minute are refused: told at the next look, with those before."""
    now = 0.0
    refusals = Refusals(lambda: now)
    refuse(1, accepted=3000)
    for _ in range(5):
        now += 30.0
        assert refusals.take().by_kind == {}
    refuse(3)
    now += 5.0
    assert refusals.take().by_kind == {"signature_mismatch": 4}
    assert refusals.take().by_kind == {}
    refuse(3, accepted=3000)
    assert refusals.take().by_kind == {}  # among so many in the same minute, they are nobody's deliveries


def test_the_refusals_of_one_endpoint_are_told_whatever_its_share() -> None:
    """Three, of which none was verified at that endpoint, among thousands accepted at another."""
    rolled, other = (metrics.endpoint_requests(name) for name in ("rolled", "other"))
    refusals = Refusals()
    refuse(3, accepted=3000)
    other["verified"].inc(3000)
    rolled["verified"].inc()
    rolled["signature_refused"].inc(3)
    assert refusals.take().by_kind == {}  # one was verified
    refusals = Refusals()
    refuse(3, accepted=3000)
    other["verified"].inc(3000)
    rolled["signature_refused"].inc(2)
    assert refusals.take().by_kind == {}
    rolled["signature_refused"].inc()
    assert refusals.take().by_kind == {"signature_mismatch": 3}
    assert refusals.take().by_kind == {}


def test_requests_that_stripe_never_sends_are_not_told() -> None:
    """A stranger's request has no signature, or a malformed one."""
    refusals = Refusals()
    for _ in range(9):
        metrics.rejected["signature_missing"].inc()
        metrics.rejected["signature_malformed"].inc()
    assert refusals.take().by_kind == {}


def test_refusals_of_the_last_hour_count() -> None:
    """Two a day are forgotten, and never become three."""
    clock = itertools.count(0.0, 3601.0)
    refusals = Refusals(lambda: next(clock))
    for _ in range(5):
        refuse(2)
        assert refusals.take().by_kind == {}
