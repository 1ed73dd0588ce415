"""What slots and the handlers' latency allow, from two readings of `/metrics`."""

import httpx
import pytest

from firstclaim.loadtest.capacity import Reading, ceiling, metrics_url, read

PAGE = """
# HELP firstclaim_handler_seconds Duration of handlers, by the pattern that they are declared for, and by the outcome.
# TYPE firstclaim_handler_seconds histogram
firstclaim_handler_seconds_bucket{handler="invoice.paid",le="0.001",outcome="completed"} 1.0
firstclaim_handler_seconds_count{handler="invoice.paid",outcome="completed"} 2.0
firstclaim_handler_seconds_sum{handler="invoice.paid",outcome="completed"} 0.2
firstclaim_handler_seconds_count{handler="invoice.paid",outcome="failed"} 1.0
firstclaim_handler_seconds_sum{handler="invoice.paid",outcome="failed"} 0.05
firstclaim_handler_seconds_count{handler="*",outcome="completed"} 1.0
firstclaim_handler_seconds_sum{handler="*",outcome="completed"} 5e-05
firstclaim_slots_in_use{handler="invoice.paid"} 3.0
# HELP firstclaim_handler_slots Handlers that can run at once, in all workers.
# TYPE firstclaim_handler_slots gauge
firstclaim_handler_slots 40.0
"""


def test_the_ceiling() -> None:
    """The latency is that of the runs between the readings, whatever was before; all workers' slots count."""
    sentence = ceiling(Reading(40, 1000, 900.0), Reading(40, 3000, 1000.0))
    assert sentence.startswith("handlers took 50.0 ms on average; 40 slots allow 40 / (50.0 ms + 5 ms) = 727 events a")


@pytest.mark.parametrize(
    ("before", "after"),
    [(None, Reading(20, 1, 1.0)), (Reading(20, 1, 1.0), None), (Reading(20, 7, 1.0), Reading(20, 7, 1.0))],
    ids=["not readable", "no longer readable", "no run"],
)
def test_the_ceiling_is_unknown(before: Reading | None, after: Reading | None) -> None:
    """Without two readings, or without a run between them, nothing is made up."""
    assert "is unknown" in ceiling(before, after)


@pytest.mark.parametrize(
    ("answer", "reading"),
    [
        (PAGE, Reading(40, 4, 0.25 + 5e-05)),
        ("<html>not found</html>", None),
        ("", None),
        (httpx.ConnectError("refused"), None),
    ],
    ids=["metrics", "another page", "nothing", "unreachable"],
)
def test_a_reading(monkeypatch: pytest.MonkeyPatch, answer: str | Exception, reading: Reading | None) -> None:
    """The runs of all handlers are added up; what is no page of metrics is no reading, and no error."""

    def get(_url: str, **_options: object) -> httpx.Response:
        if isinstance(answer, Exception):
            raise answer
        return httpx.Response(200, text=answer)

    monkeypatch.setattr(httpx, "get", get)
    assert read("http://service/metrics") == reading


@pytest.mark.parametrize(
    ("url", "metrics"),
    [
        ("http://127.0.0.1:8000/webhooks/stripe", "http://127.0.0.1:8000/metrics"),
        ("https://shop.test/pay/webhooks/stripe/", "https://shop.test/pay/metrics"),
        ("http://[::1]:9/", "http://[::1]:9/metrics"),
    ],
)
def test_the_metrics_are_beside_the_endpoint(url: str, metrics: str) -> None:
    """Below the same prefix, on the same host."""
    assert metrics_url(url, "/webhooks/stripe") == metrics
