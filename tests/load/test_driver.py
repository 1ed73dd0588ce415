"""The benchmarks' driver sends what it says: its figures are no better than this."""

from collections import Counter

import pytest

from firstclaim.event import parse_event
from tests.fixtures import SECRET
from tests.load.driver import COPIES, Driver, Ids, Kind, Rate, side_by_side
from tests.receiver import PROCESSED, receiving, reply


@pytest.mark.parametrize("ids", Ids)
def test_every_prepared_event_is_another(ids: Ids) -> None:
    """No two share an id, rising or not, and each is an event of the type that was requested."""
    events = [parse_event(body) for body in Driver("", SECRET, 1, ids=ids)._events(1000)]
    assert len({event.id for event in events}) == 1000
    assert (events == sorted(events, key=lambda event: event.id)) is (ids is Ids.RISING)
    assert {event.type for event in events} == {"invoice.payment_failed"}


@pytest.mark.parametrize(("kind", "times"), [(Kind.FRESH, 1), (Kind.DUPLICATES, COPIES)])
def test_events_are_sent_as_often_as_they_should_be(kind: Kind, times: int) -> None:
    """A receiver sees each event once, or 20 times, but for what the end cut off; the count is the one reported."""
    with receiving(lambda _: PROCESSED) as receiver:
        rate = Driver(receiver.url, SECRET, seconds=1, connections=COPIES).run(kind)
    seen = Counter(event_id for event_id, _ in receiver.answers)
    assert max(seen.values()) == times
    assert sum(number < times for number in seen.values()) <= COPIES
    assert 0 < rate.deliveries <= len(receiver.answers) <= rate.deliveries + COPIES


def test_the_rate_of_an_error_page_is_no_rate() -> None:
    """A receiver that answers anything but 2xx ends the benchmark."""
    with receiving(lambda _: reply(503, "unavailable")) as receiver, pytest.raises(SystemExit, match="answers were"):
        Driver(receiver.url, SECRET, seconds=1, connections=2).run(Kind.FRESH)


def test_rounds_alternate_and_the_ratio_is_the_first_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who goes first changes from round to round; the ratio is the first side's rate over the second's."""
    order: list[str] = []

    def run(driver: Driver, _: Kind) -> Rate:
        order.append(driver.url)
        return Rate(100, 300 if driver.url == "ours" else 200, 10 if driver.url == "ours" else 5)

    monkeypatch.setattr(Driver, "run", run)
    table = side_by_side({"ours": Driver("ours", "", 1), "peer": Driver("peer", "", 1)}, [Kind.FRESH], 2)
    assert order == ["ours", "peer", "peer", "ours", "ours", "peer"]
    assert list(table.columns[4].cells) == ["1.50"] * 3
    assert list(table.columns[7].cells) == ["0.50"] * 3
