"""The sentences at the top of the overview: what leads to which, and which comes first."""

from dataclasses import replace
from typing import Any

import pytest

from firstclaim.admin.findings import Component, Finding, Known, Level, find
from firstclaim.observability.recent import LastRefusal, Requests
from firstclaim.operations.queries import Backlog, Gaps
from firstclaim.operations.traffic import HandlerTraffic
from firstclaim.web.health import Health

FINE = Known(
    components=[Component("redis", Health.OK, None)],
    requests=Requests(600, 300, {}),
    host="web-1",
    gaps=Gaps(30.0, 60.0),
    backlog=Backlog(3, 2.0, 0, 0),
    traffic=[HandlerTraffic("invoice.paid", 100, 100)],
    when="in the last hour",
    within={"age": "1h"},
)


def found(**changes: Any) -> list[Finding]:
    return find(replace(FINE, **changes), ledger_read=True)


def test_nothing_is_wrong() -> None:
    """Health, requests, arrivals, backlog and handlers as usual are no finding."""
    assert found() == []


@pytest.mark.parametrize(
    ("changes", "level", "text"),
    [
        (
            {"requests": Requests(60, 0, {"signature_mismatch": 300})},
            Level.OUTAGE,
            "300 of the last 300 requests were refused: signature mismatch (replica web-1).",
        ),
        (
            {"requests": Requests(600, 290, {"signature_mismatch": 10, "content": 1})},
            Level.FAULT,
            "10 of the 301 requests of the last 10 min were refused: signature mismatch (replica web-1).",
        ),
        (
            {"requests": Requests(60, 0, {"signature_missing": 2, "signature_mismatch": 300})},
            Level.OUTAGE,
            "302 of the last 302 requests were refused: signature mismatch (300), no signature (2) (replica web-1).",
        ),
        (
            {
                "requests": Requests(
                    600,
                    290,
                    {"signature_mismatch": 10, "signature_missing": 50},
                    {"signature_mismatch": LastRefusal(240, 80), "signature_missing": LastRefusal(0, 0)},
                )
            },
            Level.WARNING,
            "10 of the 350 requests of the last 10 min were refused: signature mismatch, the last 4 min ago "
            "(replica web-1). 80 requests have been accepted since.",
        ),
        (
            {"requests": Requests(600, 290, {"signature_stale": 10}, {"signature_stale": LastRefusal(240, 2)})},
            Level.FAULT,
            "10 of the 300 requests of the last 10 min were refused: signature too old, the last 4 min ago "
            "(replica web-1).",
        ),
        (
            {"requests": Requests(600, 0, {}, unrecorded=1500)},
            Level.OUTAGE,
            "1\u2009500 of the 1\u2009500 requests of the last 10 min could not be recorded (replica web-1).",
        ),
        (
            {"requests": Requests(600, 40, {}, unrecorded=20)},
            Level.FAULT,
            "20 of the 60 requests of the last 10 min could not be recorded (replica web-1).",
        ),
        (
            {"requests": Requests(600, 40, {}, unrecorded=20, last_unrecorded=LastRefusal(120, 30))},
            Level.WARNING,
            "20 of the 60 requests of the last 10 min could not be recorded (replica web-1). 30 requests have been "
            "accepted since.",
        ),
        (
            {"requests": Requests(600, 299, {}, unrecorded=1)},
            Level.WARNING,
            "1 of the 300 requests of the last 10 min could not be recorded (replica web-1).",
        ),
        (
            {"gaps": Gaps(10_800.0, 0.004)},
            Level.FAULT,
            "No event has come for 3 h; of the gaps between the newest 1\u2009000, "
            "one in a hundred is longer than 4.0 ms.",
        ),
        (
            {"components": [Component("redis", Health.DEGRADED, "refused")]},
            Level.FAULT,
            "redis is degraded: refused.",
        ),
        ({"components": [Component("postgres", Health.DOWN, None)]}, Level.OUTAGE, "postgres is down."),
        (
            {"gaps": Gaps(10_800.0, 240.0)},
            Level.FAULT,
            "No event has come for 3 h; of the gaps between the newest 1\u2009000, "
            "one in a hundred is longer than 4 min.",
        ),
        (
            {"traffic": [HandlerTraffic("charge.refunded", 200, 0, 200, last_error="ValueError: no rate")]},
            Level.FAULT,
            "All 200 events of charge.refunded in the last hour have failed: ValueError: no rate.",
        ),
        (
            {"traffic": [HandlerTraffic("charge.refunded", 1, 0, 0, 1)]},
            Level.FAULT,
            "The only event of charge.refunded in the last hour has failed.",
        ),
        (
            {"traffic": [HandlerTraffic("charge.refunded", 2000, 1998, 1, 1)]},
            Level.WARNING,
            "2 of 2\u2009000 events of charge.refunded in the last hour have failed.",
        ),
        (
            {
                "backlog": Backlog(40, 1200.0, 0, 0),
                "traffic": [HandlerTraffic("invoice.paid", oldest_due_seconds=1200.0)],
            },
            Level.FAULT,
            "40 events are due; the oldest, of invoice.paid, has waited for 20 min.",
        ),
        (
            {"traffic": [HandlerTraffic(None, oldest_due_seconds=7200.0)]},
            Level.WARNING,
            "This build has no handler for an event that has been due for 2 h.",
        ),
        ({"backlog": Backlog(0, None, 2, 0)}, Level.WARNING, "2 claims are past their lease."),
        ({"dead": 5}, Level.WARNING, "5 events are dead: they are not retried."),
        ({"paused": ["invoice.*"]}, Level.WARNING, "invoice.* is paused: its events are recorded, and wait."),
        ({"paused": ["*"]}, Level.WARNING, "Everything is paused: its events are recorded, and wait."),
        (
            {"unread": ["handlers", "backlog"]},
            Level.WARNING,
            "The handlers and the backlog could not be read in time: what is wrong there is not said here.",
        ),
    ],
)
def test_each_fault_has_its_sentence(changes: dict[str, Any], level: Level, text: str) -> None:
    """A fault is said in one sentence, with its numbers and whose they are."""
    [finding] = found(**changes)
    assert (finding.level, finding.text) == (level, text)


@pytest.mark.parametrize(
    "changes",
    [
        {"requests": Requests(600, 0, {"signature_missing": 2})},  # somebody tries the address
        {"requests": Requests(600, 100, {"signature_missing": 50})},  # and scanners of the internet go on
        {"requests": None},
        {"traffic": [HandlerTraffic("customer.*", 22, 6, retries=16)]},  # handlers asked for these retries
        {"traffic": [HandlerTraffic("customer.*", 3, retries=3)]},
        {"gaps": Gaps(90_000.0, None)},  # too few to say what is usual
        {"gaps": Gaps(890.0, 1.0)},  # a pause of less than a quarter of an hour
        {"gaps": Gaps(40_000.0, 10_000.0)},  # nights are as long
        {"gaps": Gaps(None, None)},
        {"gaps": None, "backlog": None, "traffic": ()},  # what was not read is no finding
    ],
)
def test_what_is_usual_is_not_wrong(changes: dict[str, Any]) -> None:
    """Scanners, quiet nights, a new ledger, and numbers that are missing lead to no sentence."""
    assert found(**changes) == []


def test_a_pause_neither_is_a_fault_nor_hides_one() -> None:
    """What is paused may wait for days: only what waits beside it is overdue, and that is the handler named."""
    days = Backlog(900, 345_600.0, 0, 0)
    [only_paused] = found(paused=["payout.*"], backlog=days, traffic=())
    assert only_paused.text.startswith("payout.* is paused")
    overdue, _ = found(
        paused=["payout.*"], backlog=days, traffic=[HandlerTraffic("invoice.paid", oldest_due_seconds=120.0)]
    )
    assert (overdue.level, overdue.text) == (
        Level.FAULT,
        "900 events are due, with those that are paused; the oldest that is not, of invoice.paid, has waited for "
        "2 min.",
    )
    unknown, _ = found(paused=["payout.*"], backlog=days, traffic=None)
    assert unknown.advice == "Those of paused types are among them."


def test_refusals_during_an_outage_are_not_all_requests() -> None:
    """A few refusals before 503 answers are few of all, and what came since was not accepted."""
    last = {"signature_mismatch": LastRefusal(120, 0, 1500)}
    unrecorded, refused = found(requests=Requests(600, 0, {"signature_mismatch": 3}, last, 1500))
    assert unrecorded.text.startswith("1\u2009500 of the 1\u2009503 requests of the last 10 min could not be recorded")
    assert (refused.level, refused.text) == (
        Level.WARNING,
        "3 of the 1\u2009503 requests of the last 10 min were refused: signature mismatch, the last 2 min ago (replica "
        "web-1). 1\u2009500 requests have been verified since, of which 1\u2009500 could not be recorded.",
    )


@pytest.mark.parametrize(("endpoint", "name"), [("eu", "eu"), ("-", "without a name")])
def test_an_endpoint_that_verifies_nothing_is_named(endpoint: str, name: str) -> None:
    """Before its share of all requests, which is small. Two can be somebody's attempts, and all those of scanners."""
    window = Requests(600, 10_000, {"signature_mismatch": 3}, unverified={endpoint: 3, "connect": 2})
    finding, share = found(requests=window)
    assert (finding.level, finding.text) == (
        Level.FAULT,
        f"The last 3 requests to the endpoint {name} were refused for their signature (replica web-1).",
    )
    assert ("eu=whsec_..." in finding.advice) == (endpoint == "eu")
    assert share.text.startswith("3 of the 10")
    assert found(requests=replace(window, refused={"signature_missing": 3})) == []


def test_the_worst_comes_first() -> None:
    """An outage is before a fault, and a fault before a warning; a link leads to the events."""
    all_found = found(
        dead=1,
        traffic=[HandlerTraffic("charge.*", 9, 8, 1), HandlerTraffic("invoice.paid", 2, 0, 2)],
        requests=Requests(60, 0, {"signature_mismatch": 3}),
    )
    assert [each.level for each in all_found] == [Level.OUTAGE, Level.FAULT, Level.WARNING, Level.WARNING]
    assert [each.query for each in all_found] == [
        None,
        "type=invoice.paid&age=1h&status=failed&status=dead",
        "type=charge.%2A&age=1h&status=failed&status=dead",
        "status=dead",
    ]
    assert "Was a secret rolled" in all_found[0].advice
    [unreadable] = find(replace(FINE), ledger_read=False)
    assert (unreadable.level, unreadable.text[:28]) == (Level.OUTAGE, "The ledger cannot be read: P")
