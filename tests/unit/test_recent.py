"""The window of requests: what belongs to it, and what "all of the last requests" means."""

import pytest

from firstclaim.observability import metrics, recent
from firstclaim.observability.recent import LastRefusal, RecentRequests


class Counters:
    """The counters of a process, and a clock."""

    def __init__(self) -> None:
        self.now = 0.0
        self.accepted = 1000
        self.unrecorded = 30
        self.refused: dict[str, int] = {"signature_mismatch": 7, "path": 0}
        self.endpoints = {name: {"verified": 5, "signature_refused": 2} for name in ("-", "eu", "connect")}

    def totals(self, name: str) -> dict[str, int]:
        delivered = {"processed": self.accepted, "unavailable": self.unrecorded}
        return delivered if name == "firstclaim_deliveries" else dict(self.refused)

    def endpoint_totals(self) -> dict[str, dict[str, int]]:
        return {name: dict(results) for name, results in self.endpoints.items()}


@pytest.fixture
def counters(monkeypatch: pytest.MonkeyPatch) -> Counters:
    """Instead of those of this process."""
    counters = Counters()
    monkeypatch.setattr(metrics, "totals", counters.totals)
    monkeypatch.setattr(metrics, "endpoint_totals", counters.endpoint_totals)
    return counters


@pytest.fixture
def requests(counters: Counters) -> RecentRequests:
    return RecentRequests(lambda: counters.now)


def test_what_was_counted_before_the_window_is_not_in_it(counters: Counters, requests: RecentRequests) -> None:
    """The window begins with its oldest sample; without a sample nothing is claimed."""
    assert requests.read() is None
    requests.sample()
    counters.now += 60
    counters.accepted += 3
    counters.refused["signature_mismatch"] += 1
    counters.refused["path"] += 5  # no delivery of Stripe's
    window = requests.read()
    assert window is not None
    assert (window.seconds, window.accepted, window.refused, window.all) == (60, 3, {"signature_mismatch": 1}, 4)


def test_the_requests_since_the_last_accepted_one(counters: Counters, requests: RecentRequests) -> None:
    """Once every request is refused, the window begins after the last accepted one, whatever came before."""
    for _ in range(4):
        requests.sample()
        counters.now += 5
        counters.accepted += 100
    for _ in range(3):
        requests.sample()
        counters.now += 5
        counters.refused["signature_mismatch"] += 100
    window = requests.read()
    assert window is not None
    assert (window.seconds, window.accepted, window.refused) == (15, 0, {"signature_mismatch": 300})
    counters.accepted += 1
    window = requests.read()
    assert window is not None
    assert (window.accepted, window.all) == (401, 701)


def test_an_endpoint_of_which_nothing_is_verified_any_more(counters: Counters, requests: RecentRequests) -> None:
    """Its refused requests count from its last verified one, whatever others accept; a verified one ends it."""
    for _ in range(3):
        requests.sample()
        counters.now += 5
        counters.accepted += 100
        for name in ("-", "eu"):
            counters.endpoints[name]["verified"] += 1
            counters.endpoints[name]["signature_refused"] += 1
    for _ in range(4):
        requests.sample()
        counters.now += 5
        counters.accepted += 100
        counters.endpoints["-"]["verified"] += 1
        counters.endpoints["eu"]["signature_refused"] += 1
    window = requests.read()
    assert window is not None
    assert window.accepted
    assert window.unverified == {"eu": 4}
    counters.endpoints["eu"]["verified"] += 1
    window = requests.read()
    assert window is not None
    assert window.unverified == {}


def test_the_requests_of_an_endpoint_are_those_of_the_metric() -> None:
    """By its name, or `-`, and by result."""
    before = metrics.endpoint_totals()
    for name in (None, "recent"):
        metrics.endpoint_requests(name)["signature_refused"].inc()
    after = metrics.endpoint_totals()
    assert after["recent"] == {"verified": 0, "signature_refused": 1}
    assert after["-"]["signature_refused"] == before.get("-", {}).get("signature_refused", 0) + 1


def test_the_last_refusal_of_each_kind(counters: Counters, requests: RecentRequests) -> None:
    """How long ago it was, to one interval, and how many requests were accepted since; a new one is now."""
    requests.sample()
    for kind in ("signature_mismatch", "signature_stale"):
        counters.now += 5
        counters.refused[kind] = counters.refused.get(kind, 0) + 3
        requests.sample()
    counters.now += 60
    counters.accepted += 8
    window = requests.read()
    assert window is not None
    assert window.last == {"signature_mismatch": LastRefusal(65, 8), "signature_stale": LastRefusal(60, 8)}
    counters.refused["signature_stale"] += 1
    window = requests.read()
    assert window is not None
    assert window.last == {"signature_mismatch": LastRefusal(65, 8), "signature_stale": LastRefusal(0, 0)}


def test_what_was_not_recorded_is_neither_accepted_nor_refused(counters: Counters, requests: RecentRequests) -> None:
    """During an outage of Postgres nothing is accepted, and a few refusals among the 503 are not all requests."""
    requests.sample()
    counters.now += 5
    counters.refused["signature_mismatch"] += 3
    requests.sample()
    counters.now += 60
    counters.unrecorded += 1500
    requests.sample()
    window = requests.read()
    assert window is not None
    assert (window.accepted, window.unrecorded, window.verified, window.all) == (0, 1500, 1500, 1503)
    assert window.last == {"signature_mismatch": LastRefusal(60, 0, 1500)}
    assert window.last_unrecorded == LastRefusal(0, 0)
    counters.now += 5
    counters.refused["signature_mismatch"] += 3  # and only now are all of the last ones refused
    window = requests.read()
    assert window is not None
    assert (window.seconds, window.verified, window.refused) == (5, 0, {"signature_mismatch": 3})


def test_samples_are_forgotten(counters: Counters, requests: RecentRequests) -> None:
    """Memory is bounded, and what is older than the window is not in it."""
    for _ in range(1000):
        requests.sample()
        counters.now += recent._INTERVAL_SECONDS
        counters.accepted += 1
    window = requests.read()
    assert window is not None
    assert window.seconds == pytest.approx(recent.WINDOW_SECONDS, abs=2 * recent._INTERVAL_SECONDS)
    assert window.accepted == pytest.approx(window.seconds / recent._INTERVAL_SECONDS, abs=1)
