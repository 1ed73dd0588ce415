"""The load generator against a receiver that counts: what it reports as sent and answered is what happened."""

import io
import shutil
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from firstclaim.loadtest.plan import AnswerKind, Observed, Plan, Result, entries
from firstclaim.loadtest.runner import generate
from tests.fixtures import SECRET
from tests.receiver import PROCESSED, Receiver, Reply, receiving, reply

TOGETHER_SECONDS = 20.0


def load(receiver: Receiver, **changes: Any) -> Result:
    parameters: dict[str, Any] = {
        "url": receiver.url,
        "secret": SECRET,
        "types": ("invoice.paid", "customer.created"),
        "users": 4,
        "deliveries_per_second": 0.0,
        "duration_seconds": 1.0,
        "duplicates_percent": 0.0,
        "concurrent_percent": 0.0,
        "copies": 4,
        "seed": 1,
    }
    return generate(Plan(**(parameters | changes)), Console(file=io.StringIO()))


def number_of(event_id: str) -> int:
    return int(event_id[-8:])


def test_every_delivery_is_counted_once_under_what_it_was_told(tmp_path: Path) -> None:
    """Ten kinds of answers, a closed connection and a redirect among them: the counts and the journal are exact."""
    replies = [
        PROCESSED,
        reply(200, "ignored"),
        reply(200, "ignored", processed=True),
        reply(202, "deferred"),
        reply(200, "dead"),
        reply(500, "failed"),
        reply(503, "unavailable"),
        reply(400, "rejected"),
        (502, b"<html>Bad gateway</html>"),
        (307, b""),
        (200, b"\xff"),
        None,
    ]
    kinds = dict(zip(replies, (*AnswerKind, AnswerKind.OTHER, AnswerKind.OTHER, AnswerKind.NO_ANSWER), strict=False))
    kinds[replies[8]] = kinds[replies[9]] = kinds[replies[10]] = AnswerKind.OTHER
    kinds[None] = AnswerKind.NO_ANSWER
    kinds[replies[1]], kinds[replies[2]] = AnswerKind.IGNORED, AnswerKind.UNHANDLED
    html = tmp_path / "report.html"
    with receiving(lambda event_id: replies[number_of(event_id) % len(replies)]) as receiver:
        seen = load(receiver, duplicates_percent=30, concurrent_percent=30, duration_seconds=2, html=str(html))
    expected = Counter(kinds[answer] for _, answer in receiver.answers)
    assert set(expected) == set(AnswerKind), "too few deliveries to prove anything"
    assert {kind: latencies.count for kind, latencies in seen.by_kind.items()} == expected
    assert seen.total.count == len(receiver.answers)
    assert sum(seen.errors.values()) == expected[AnswerKind.NO_ANSWER]
    journal = dict(entries(seen.journal))
    assert set(journal) == {number_of(event_id) for event_id, _ in receiver.answers}
    acknowledged = {number_of(event_id) for event_id, answer in receiver.answers if answer and 200 <= answer[0] < 300}
    assert {number for number, observed in journal.items() if Observed.ACKNOWLEDGED in observed} == acknowledged
    processed = Counter(number_of(event_id) for event_id, answer in receiver.answers if answer is PROCESSED)
    again = {number for number, observed in journal.items() if Observed.PROCESSED_AGAIN in observed}
    assert again == {number for number, times in processed.items() if times > 1}
    assert '"name": "no answer"' in html.read_text()
    assert not {"locust", "gevent"} & set(sys.modules), "the load belongs into a process of its own"


def only_together(copies: int) -> Callable[[str], Reply]:
    """A receiver that answers no copy of an event before all have arrived; 503 if that takes too long."""
    together = threading.Condition()
    arrived: Counter[str] = Counter()

    def respond(event_id: str) -> Reply:
        with together:
            arrived[event_id] += 1
            together.notify_all()
            whole = together.wait_for(lambda: arrived[event_id] == copies, TOGETHER_SECONDS)
        return PROCESSED if whole else reply(503, "unavailable")

    return respond


def test_copies_are_in_flight_at_the_same_instant() -> None:
    """A receiver that answers no copy before all have arrived gets all of them: none waits for an answer."""
    with receiving(only_together(10)) as receiver:
        seen = load(receiver, users=2, concurrent_percent=100, copies=10)
    assert set(seen.by_kind) == {AnswerKind.PROCESSED}
    assert set(Counter(event_id for event_id, _ in receiver.answers).values()) == {10}


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate for 127.0.0.1 and its key, in one file; it is not trusted yet."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl to make a certificate")
    path = tmp_path / "certificate.pem"
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    made = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-keyout", f"{path}.key", "-out", f"{path}"]
    subprocess.run(["openssl", *made, *subject], check=True, capture_output=True, timeout=60)
    path.write_text(path.read_text() + Path(f"{path}.key").read_text())
    return path


def test_over_tls_users_do_not_wait_for_each_other(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies are in flight at the same instant over TLS too; a server without a trusted certificate gets nothing."""
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    with receiving(only_together(5), tls) as receiver:
        refused = load(receiver, users=2)
        assert set(refused.by_kind) == {AnswerKind.NO_ANSWER}
        assert all("CERTIFICATE_VERIFY_FAILED" in cause for cause in refused.errors)
        assert not receiver.answers
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        trusted = load(receiver, users=4, concurrent_percent=100, copies=5)
    assert set(trusted.by_kind) == {AnswerKind.PROCESSED}
    assert trusted.total.count == len(receiver.answers)


def test_the_latency_is_that_of_each_request() -> None:
    """One answer in ten takes a second: p95 and p99 show the slow tenth, and the median does not."""

    def respond(event_id: str) -> Reply:
        if number_of(event_id) % 10 == 9:
            time.sleep(1)
        return PROCESSED

    with receiving(respond) as receiver:
        seen = load(receiver, users=5, duration_seconds=4)
    took = seen.total
    assert took.p50 < 1000 <= took.p95 <= took.p99 <= took.slowest * 1.01, took
    assert took.count == len(receiver.answers)


def test_at_a_fixed_rate_a_slow_service_is_not_spared_the_wait_that_it_caused() -> None:
    """20 deliveries a second are due and 4 are answered: latency counts from when each was due, so it grows."""

    def respond(_: str) -> Reply:
        time.sleep(0.25)
        return PROCESSED

    with receiving(respond) as receiver:
        seen = load(receiver, users=1, deliveries_per_second=20, duration_seconds=3)
    assert seen.total.count <= 13
    assert seen.total.slowest > 1500, seen.total


def test_a_fixed_rate_is_not_exceeded() -> None:
    """With copies and repetitions in the mix, no more deliveries are sent than the rate allows."""
    with receiving(lambda _: PROCESSED) as receiver:
        seen = load(
            receiver,
            users=10,
            deliveries_per_second=40,
            duration_seconds=2,
            concurrent_percent=50,
            duplicates_percent=50,
        )
    assert 1 < seen.total.count <= 40 * seen.seconds + 4
    assert seen.total.count == len(receiver.answers)


def test_nobody_listens() -> None:
    """Every delivery is a failed connection: counted as no answer, with its cause, and no event is acknowledged."""
    with receiving(lambda _: PROCESSED) as receiver:
        pass
    seen = load(receiver, deliveries_per_second=50)
    assert set(seen.by_kind) == {AnswerKind.NO_ANSWER}
    assert set(entries(seen.journal)) == {(number, Observed.SENT) for number in range(seen.total.count)}
    [(cause, count)] = seen.errors.items()
    assert "ConnectionRefusedError" in cause
    assert count == seen.total.count
