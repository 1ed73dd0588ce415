"""The logic of `firstclaim load`: what is sent, how answers are counted, and how the verdict is reached."""

import importlib.util
import io
from collections import Counter
from pathlib import Path
from typing import Any

import orjson
import pytest
from rich.console import Console

from firstclaim import outcome as outcomes
from firstclaim.errors import ConfigurationError, Rejected
from firstclaim.event import parse_event
from firstclaim.handlers.load_probe import ACTION
from firstclaim.loadtest import runner
from firstclaim.loadtest.plan import (
    IN_FLIGHT_MOST,
    AnswerKind,
    Bodies,
    Journal,
    Latencies,
    Mix,
    Observed,
    Pace,
    Plan,
    Progress,
    Result,
    Turn,
    entries,
    kind_of,
)
from firstclaim.loadtest.runner import live_line, report, report_verdict
from firstclaim.loadtest.verdict import BROKEN, EventRecord, Fate, fate_of, judge
from firstclaim.outcome import Kind, Outcome
from firstclaim.schema_name import DEFAULT_SCHEMA
from firstclaim.sending.events import shipped_types
from firstclaim.status import UNFINISHED, Status
from firstclaim.web.answers import answer, rejection

TURNS = 20_000
SENT, ACKNOWLEDGED = Observed.SENT, Observed.SENT | Observed.ACKNOWLEDGED


def plan(**changes: Any) -> Plan:
    parameters: dict[str, Any] = {
        "url": "http://127.0.0.1:8000/webhooks/stripe",
        "secret": "whsec_test",
        "types": tuple(shipped_types()),
        "users": 20,
        "deliveries_per_second": 0.0,
        "duration_seconds": 10.0,
        "duplicates_percent": 20.0,
        "concurrent_percent": 50.0,
        "copies": 5,
        "seed": 1,
    }
    return Plan(**(parameters | changes))


def turns(count: int = TURNS, **changes: Any) -> list[Turn]:
    mix = Mix(plan(**changes))
    return [mix.next() for _ in range(count)]


# -- what is sent -------------------------------------------------------------------------------------


def test_the_seed_alone_decides_the_sequence() -> None:
    """Two plans with one seed give the same turns; another seed gives others."""
    assert turns() == turns()
    assert turns() != turns(seed=2)


@pytest.mark.parametrize(("duplicates", "concurrent"), [(0, 0), (20, 50), (100, 100)])
def test_the_percentages_are_kept(duplicates: float, concurrent: float) -> None:
    """The shares of events sent twice and sent as copies are those of the plan; every type is equally frequent."""
    sent = turns(duplicates_percent=duplicates, concurrent_percent=concurrent)
    times = Counter(turn.number for turn in sent)
    events = list({turn.number: turn for turn in reversed(sent)}.values())  # each event's first turn
    settled = [turn for turn in events if turn.number < len(times) - 1000]  # the others' second time may be to come
    assert sum(times[turn.number] == 2 for turn in settled) / len(settled) * 100 == pytest.approx(duplicates, abs=2)
    assert max(times.values()) <= 2
    assert sum(turn.copies == 5 for turn in events) / len(events) * 100 == pytest.approx(concurrent, abs=2)
    by_type = Counter(turn.event_type for turn in events)
    assert set(by_type) == set(shipped_types())
    assert min(by_type.values()) > len(events) / len(by_type) * 0.8


def test_a_repetition_comes_later_and_alone() -> None:
    """The repetition is a single delivery of the same event, 1 to 1000 turns later; short and long distances occur."""
    first: dict[int, int] = {}
    apart = []
    for at, turn in enumerate(turns(duplicates_percent=100)):
        if turn.number in first:
            assert turn.copies == 1
            apart.append(at - first[turn.number])
        first.setdefault(turn.number, at)
    assert min(apart) == 1
    assert sum(each < 30 for each in apart) > len(apart) / 10
    # Only one repetition fits into a turn, so with this many of them some have to wait.
    assert sum(each > 300 for each in apart) > len(apart) / 10


def test_every_event_is_one_and_about_other_objects() -> None:
    """Each body parses as an event of its type with the run's id, and shares no object with any other event."""
    this = plan()
    bodies = Bodies(this)
    seen = set()
    for number, event_type in enumerate([*shipped_types(), *shipped_types()]):
        event = parse_event(bodies.of(Turn(number, event_type)))
        assert (event.id, event.type) == (this.event_id(number), event_type)
        if event.object_id is not None:
            assert event.object_id not in seen
            seen.add(event.object_id)
    assert len(seen) == 2 * (len(shipped_types()) - 1)


def test_a_repetition_is_the_same_bytes_and_another_run_is_not() -> None:
    """A repetition is the same bytes; a second run with the same seed shares no id with the first."""
    one, other = plan(), plan()
    bodies = Bodies(one)
    assert bodies.of(Turn(7, "invoice.paid", 5)) == bodies.of(Turn(7, "invoice.paid"))
    assert one.event_id(7) != other.event_id(7)
    assert one.event_id(7).startswith(one.id_head)


def test_a_fixed_rate_does_not_ask_how_it_goes() -> None:
    """Turns are due at the rate, a turn of several copies takes the time of all, and a delay moves no later turn."""
    pace = Pace(10)
    assert [pace.due(copies, now) for copies, now in ((1, 0), (5, 0), (1, 99), (1, 0))] == pytest.approx(
        [0, 0.1, 0.6, 0.7]
    )
    assert [Pace(0).due(5, now) for now in (0.0, 3.5)] == [0.0, 3.5]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"url": "localhost"}, "--url"),
        ({"url": "http://user:hunter2@localhost/"}, "--url"),
        ({"types": ("invoice.paid", "invoice.payed")}, "invoice.payed"),
        ({"users": 200}, f"1000 concurrent connections; at most {IN_FLIGHT_MOST}"),
        ({"deliveries_per_second": float("inf")}, "--rate"),
        ({"duration_seconds": float("nan")}, "--duration"),
        ({"html": "/no/such/folder/report.html"}, "--html"),
    ],
)
def test_an_impossible_plan_is_refused_before_anything_is_sent(changes: dict[str, Any], words: str) -> None:
    """A plan that cannot work is refused with the name of the option (exit code 2), and without a password."""
    with pytest.raises(ConfigurationError) as refused:
        runner.run(plan(**changes), "", None, DEFAULT_SCHEMA, 0, Console(file=io.StringIO()))
    assert words in str(refused.value)
    assert "hunter2" not in str(refused.value)


def test_many_users_are_possible_without_copies() -> None:
    """Connections count, not users: without concurrent duplicates each user has one."""
    assert list(plan(users=IN_FLIGHT_MOST, concurrent_percent=0).faults()) == []


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without locust: exit code 2 and the command to run."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigurationError, match=r"pip install 'firstclaim\[load\]'") as refused:
        runner.run(plan(), "", None, DEFAULT_SCHEMA, 0, Console(file=io.StringIO()))
    assert refused.value.exit_code == 2


# -- how answers are counted --------------------------------------------------------------------------

OUTCOMES: dict[AnswerKind, Outcome] = {
    AnswerKind.PROCESSED: outcomes.processed("invoice_remembered", 1),
    AnswerKind.UNHANDLED: outcomes.unhandled("Event type x not handled", 1),
    AnswerKind.IGNORED: outcomes.duplicate("evt_1"),
    AnswerKind.DEFERRED: outcomes.deferred("Recorded"),
    AnswerKind.FAILED: outcomes.failed(1),
    AnswerKind.DEAD: outcomes.dead("evt_1", 1),
    AnswerKind.UNAVAILABLE: outcomes.unavailable("Shutting down"),
}


def test_every_outcome_of_the_service_has_its_kind() -> None:
    """Each outcome that the service can answer with is counted as that outcome, and no two as one."""
    assert {each.kind for each in OUTCOMES.values()} == set(Kind)
    for kind, outcome in OUTCOMES.items():
        response = answer("evt_1", outcome)
        assert kind_of(response.status, response.body) is kind
    refused = rejection(Rejected("content", "no"))
    assert kind_of(refused.status, refused.body) is AnswerKind.REJECTED


@pytest.mark.parametrize("content", [b"", b"<html>", b"[]", b"null", b'{"action": 1}', b'{"action": "moved"}', b"\xff"])
def test_what_is_not_ours_is_counted_apart(content: bytes) -> None:
    """The answer of any other server, whatever its status, is neither processed nor ignored."""
    assert kind_of(200, content) is AnswerKind.OTHER
    assert kind_of(502, content) is AnswerKind.OTHER


def test_no_answer_is_no_answer() -> None:
    """Status 0, which stands for a refused, reset or timed out connection, is a kind of its own."""
    assert kind_of(0, b"") is AnswerKind.NO_ANSWER


def test_the_journal_keeps_what_the_answers_show() -> None:
    """One 2xx among several answers is enough; a second `processed` is detected; an unsent event has no entry."""
    journal = Journal()
    for number in (0, 2, 3, 4):
        journal.sent(number)
    journal.answered(2, 503, AnswerKind.UNAVAILABLE)
    journal.answered(3, 200, AnswerKind.PROCESSED)
    journal.answered(3, 500, AnswerKind.FAILED)
    journal.answered(4, 200, AnswerKind.PROCESSED)
    journal.answered(4, 200, AnswerKind.PROCESSED)
    assert dict(entries(journal.close())) == {
        0: SENT,
        2: SENT,
        3: ACKNOWLEDGED | Observed.PROCESSED,
        4: ACKNOWLEDGED | Observed.PROCESSED | Observed.PROCESSED_AGAIN,
    }


# -- the verdict --------------------------------------------------------------------------------------


def found(status: Status | None, effects: int, action: str | None = ACTION) -> EventRecord:
    return EventRecord("evt_1", status, action, effects)


@pytest.mark.parametrize(
    ("noted", "in_database", "fate"),
    [
        (ACKNOWLEDGED, found(Status.COMPLETED, 1), Fate.ONCE),
        (SENT, found(Status.COMPLETED, 1), Fate.ONCE),
        (ACKNOWLEDGED, found(Status.COMPLETED, 2), Fate.DOUBLED),
        (SENT, found(None, 2), Fate.DOUBLED),
        (ACKNOWLEDGED | Observed.PROCESSED_AGAIN, found(Status.COMPLETED, 1), Fate.DOUBLED),
        (ACKNOWLEDGED, None, Fate.LOST),
        (SENT, None, Fate.REFUSED),
        (ACKNOWLEDGED, found(Status.COMPLETED, 0), Fate.LOST),
        (SENT, found(Status.COMPLETED, 0), Fate.LOST),
        (ACKNOWLEDGED, found(None, 1), Fate.UNMARKED),
        (ACKNOWLEDGED, found(Status.FAILED, 1), Fate.UNMARKED),
        (ACKNOWLEDGED, found(Status.DEAD, 0, None), Fate.DEAD),
        (ACKNOWLEDGED, found(Status.COMPLETED, 0, "payment_failure_recorded"), Fate.ELSEWHERE),
        (ACKNOWLEDGED, found(Status.IGNORED, 0, "ignored"), Fate.ELSEWHERE),
        *((ACKNOWLEDGED, found(status, 0, None), Fate.UNSETTLED) for status in UNFINISHED),
    ],
)
def test_the_fate_of_an_event(noted: Observed, in_database: EventRecord | None, fate: Fate) -> None:
    """Lost: accepted or completed, and missing. Doubled: two effects. An event that was never accepted is neither."""
    assert fate_of(noted, in_database) is fate


def test_every_event_that_was_sent_has_one_fate() -> None:
    """The fates add up to the events that were sent, by id; rows of other runs and unsent numbers do not count."""
    this = plan()
    journal = bytes([ACKNOWLEDGED, 0, SENT, ACKNOWLEDGED])
    fates = judge(
        this,
        journal,
        [
            EventRecord(this.event_id(0), Status.COMPLETED, ACTION, 1),
            EventRecord("evt_another", Status.COMPLETED, ACTION, 2),
        ],
    )
    assert {fate: ids for fate, ids in fates.items() if ids} == {
        Fate.ONCE: [this.event_id(0)],
        Fate.REFUSED: [this.event_id(2)],
        Fate.LOST: [this.event_id(3)],
    }


# -- what is printed -------------------------------------------------------------------------------------


def result(journal: bytes = bytes([ACKNOWLEDGED, ACKNOWLEDGED]), **changes: Any) -> Result:
    took = Latencies(1_500, 1.5, 12.25, 99.0, 1234.5)
    seen: dict[str, Any] = {
        "seconds": 3.0,
        "cpu_seconds": 1.0,
        "total": took,
        "by_kind": {AnswerKind.PROCESSED: took},
        "errors": {},
        "journal": journal,
    }
    return Result(**(seen | changes))


def printed(this: Plan, seen: Result, fates: dict[Fate, list[str]] | None) -> tuple[int, str]:
    out = io.StringIO()
    code = report_verdict(this, seen, fates, Console(file=out, width=120))
    return code, out.getvalue()


def with_fates(**ids: list[str]) -> dict[Fate, list[str]]:
    return {fate: ids.get(fate.name.lower(), []) for fate in Fate}


def row(text: str, name: str) -> str:
    """The cell beside `name`."""
    [line] = [line for line in text.splitlines() if line.startswith(f"│ {name} ")]
    return line.split("│")[2].strip()


def test_all_once_is_0() -> None:
    """Every event has its effect once: exit code 0, and lost and doubled are 0."""
    code, text = printed(plan(), result(), with_fates(once=["evt_a", "evt_b"]))
    assert code == 0
    assert "No event was lost, and none was doubled." in text
    assert [row(text, name) for name in ("sent", "effects once", "lost", "doubled")] == ["2", "2", "0", "0"]


@pytest.mark.parametrize("fate", BROKEN)
def test_what_must_not_be_is_1_and_named(fate: Fate) -> None:
    """One event that is lost, doubled, without its mark or not settled: exit code 1, and its id is printed."""
    code, text = printed(plan(), result(), with_fates(once=["evt_a"]) | {fate: ["evt_b"]})
    assert code == 1
    assert f"{fate}: evt_b" in text
    assert f"The guarantee was broken: 1 {fate}." in text
    assert row(text, fate) == "1"


def test_many_ids_are_cut_short_and_counted() -> None:
    """Of a thousand lost events the first twenty are listed, and the number of the others."""
    _, text = printed(plan(), result(), with_fates(lost=[f"evt_{number:04}" for number in range(1000)]))
    assert "lost: evt_0019" in text
    assert "evt_0020" not in text
    assert "lost: and 980 more" in text
    assert "is it the service's own?" in text


def test_without_a_database_lost_and_doubled_are_unknown() -> None:
    """Without a database lost and doubled are unknown, never 0; the answers alone can show a doubled event."""
    code, text = printed(plan(), result(), None)
    assert code == 0
    assert [row(text, name) for name in ("effects once", "lost", "doubled")] == ["unknown"] * 3
    assert "unknown: there is no database" in text
    this = plan()
    code, text = printed(this, result(bytes([ACKNOWLEDGED | Observed.PROCESSED | Observed.PROCESSED_AGAIN])), None)
    assert code == 1
    assert f"doubled: {this.event_id(0)}" in text


def test_without_the_probe_nothing_is_known() -> None:
    """All events completed by other handlers: exit code 1, because nothing is known, and the setting is named."""
    code, text = printed(plan(), result(), with_fates(elsewhere=["evt_a", "evt_b"]))
    assert code == 1
    assert [row(text, name) for name in ("effects once", "lost", "doubled")] == ["0", "unknown", "unknown"]
    assert "Lost and doubled events are unknown" in text
    assert "FIRSTCLAIM_HANDLERS=firstclaim.handlers.load_probe" in text


def test_nothing_accepted_is_1() -> None:
    """No delivery got a 2xx: exit code 1, with a database and without one."""
    for fates in (None, with_fates(refused=["evt_a"])):
        code, text = printed(plan(), result(bytes([SENT])), fates)
        assert code == 1
        assert "No event was accepted" in text


def test_the_report_has_throughput_latency_and_causes() -> None:
    """Deliveries, rate and quantiles by answer; the requested rate; the causes of missing answers, as plain text."""
    out = io.StringIO()
    seen = result(errors={"[bold]reset[/]": 7})
    report(plan(deliveries_per_second=800), seen, Console(file=out, width=120))
    text = out.getvalue()
    [line] = [line for line in text.splitlines() if line.startswith("│ processed")]
    assert [cell.strip() for cell in line.split("│")[2:-1]] == ["1,500", "500", "1.5", "12.2", "99.0", "1,234.5"]
    assert "1,500 deliveries of 2 events in 3.0 s: 500/s; requested: 800/s" in text
    assert "no answer: [bold]reset[/] (7 times)" in text
    assert "it was the limit" not in text


def test_a_generator_that_was_the_limit_says_so() -> None:
    """If the generator used up its core, the report words that it was the limit."""
    out = io.StringIO()
    report(plan(), result(cpu_seconds=2.9), Console(file=out, width=120))
    assert "97% of a core: it was the limit" in out.getvalue()


def test_the_live_line_shows_the_rate_since_the_last() -> None:
    """Seconds, deliveries per second since the last update, and all deliveries by kind of answer."""
    now = Progress(12.5, {AnswerKind.NO_ANSWER: 1, AnswerKind.PROCESSED: 1_200})
    assert now.deliveries == 1201
    assert live_line(now, 12.0, 1_001) == "12 s, 400/s, processed 1,200, no answer 1"


def test_the_report_file_is_checked_before_the_load(tmp_path: Path) -> None:
    """A file that can be written is no fault, whether it exists or not; a folder is one."""
    assert list(runner._html_faults(str(tmp_path / "report.html"))) == []
    assert list(runner._html_faults(None)) == []
    assert list(runner._html_faults(str(tmp_path)))


def test_bodies_are_json_whatever_the_number() -> None:
    """Numbers with more than the usual digits still give a valid event with a unique id."""
    this = plan()
    body = Bodies(this).of(Turn(123_456_789, "invoice.paid"))
    assert orjson.loads(body)["id"] == this.event_id(123_456_789)
