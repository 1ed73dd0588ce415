"""The load generator against a receiver that keeps count: what it says it sent and was told is what happened."""

import io
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import orjson
from rich.console import Console

from service.loading import generate
from service.loading_plan import AnswerKind, Noted, Plan, Result, entries
from service.web.signature import verify
from tests.fixtures import SECRET

TOGETHER_SECONDS = 20.0

# Status and body; None closes the connection instead.
Reply = tuple[int, bytes] | None


def reply(status: int, action: str, *, processed: bool = False) -> Reply:
    return status, orjson.dumps({"event_id": None, "processed": processed, "action": action, "reason": None})


PROCESSED = reply(200, "load_effect_recorded", processed=True)


@dataclass(slots=True)
class Receiver:
    """Counts what reaches it; `respond` decides, in the request's own thread, what it is told."""

    respond: Callable[[str], Reply]
    url: str = ""
    told: list[tuple[str, Reply]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, body: bytes, signatures: list[str]) -> Reply:
        verify(body, signatures, [SECRET], tolerance_seconds=300, now=time.time())
        event_id = orjson.loads(body)["id"]
        chosen = self.respond(event_id)
        with self.lock:
            self.told.append((event_id, chosen))
        return chosen


@contextmanager
def receiving(respond: Callable[[str], Reply]) -> Iterator[Receiver]:
    receiver = Receiver(respond)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            chosen = receiver.answer(body, self.headers.get_all("Stripe-Signature", []))
            if chosen is None:
                self.close_connection = True
                return
            status, content = chosen
            self.send_response(status)
            if 300 <= status < 400:
                self.send_header("Location", receiver.url)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True  # of connections that are kept
        request_queue_size = 128

        def handle_error(self, *_: object) -> None:
            """A connection that the generator closed at its end."""

    with Server(("127.0.0.1", 0), Handler) as server:
        receiver.url = f"http://127.0.0.1:{server.server_port}/webhooks/stripe"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield receiver
        finally:
            server.shutdown()
            thread.join()


def load(receiver: Receiver, **changes: Any) -> Result:
    asked: dict[str, Any] = {
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
    return generate(Plan(**(asked | changes)), Console(file=io.StringIO()))


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
    expected = Counter(kinds[told] for _, told in receiver.told)
    assert set(expected) == set(AnswerKind), "too few deliveries to prove anything"
    assert {kind: latencies.count for kind, latencies in seen.by_kind.items()} == expected
    assert seen.total.count == len(receiver.told)
    assert sum(seen.errors.values()) == expected[AnswerKind.NO_ANSWER]
    journal = dict(entries(seen.journal))
    assert set(journal) == {number_of(event_id) for event_id, _ in receiver.told}
    acknowledged = {number_of(event_id) for event_id, told in receiver.told if told and 200 <= told[0] < 300}
    assert {number for number, noted in journal.items() if Noted.ACKNOWLEDGED in noted} == acknowledged
    processed = Counter(number_of(event_id) for event_id, told in receiver.told if told is PROCESSED)
    again = {number for number, noted in journal.items() if Noted.PROCESSED_AGAIN in noted}
    assert again == {number for number, times in processed.items() if times > 1}
    assert '"name": "no answer"' in html.read_text()
    assert not {"locust", "gevent"} & set(sys.modules), "the load belongs into a process of its own"


def test_copies_are_in_flight_at_the_same_instant() -> None:
    """A receiver that answers no copy before the last of them is there gets all of them: none waits for an answer."""
    together = threading.Condition()
    arrived: Counter[str] = Counter()
    alone: set[str] = set()

    def respond(event_id: str) -> Reply:
        with together:
            arrived[event_id] += 1
            together.notify_all()
            if not together.wait_for(lambda: arrived[event_id] == 10, TOGETHER_SECONDS):
                alone.add(event_id)
        return PROCESSED

    with receiving(respond) as receiver:
        seen = load(receiver, users=2, concurrent_percent=100, copies=10)
    assert not alone
    assert len(arrived) >= 2
    assert set(arrived.values()) == {10}
    assert seen.total.count == arrived.total()


def test_the_latency_is_that_of_each_request() -> None:
    """One answer in ten takes a second: the slow tenth shows in p95 and p99, and not in the median."""

    def respond(event_id: str) -> Reply:
        if number_of(event_id) % 10 == 9:
            time.sleep(1)
        return PROCESSED

    with receiving(respond) as receiver:
        seen = load(receiver, users=5, duration_seconds=4)
    took = seen.total
    assert took.p50 < 1000 <= took.p95 <= took.p99 <= took.slowest * 1.01, took
    assert took.count == len(receiver.told)


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
    assert seen.total.count == len(receiver.told)


def test_nobody_listens() -> None:
    """Every delivery is a failed connection: counted as no answer, with its cause, and nothing is acknowledged."""
    with receiving(lambda _: PROCESSED) as receiver:
        pass
    seen = load(receiver, deliveries_per_second=50)
    assert set(seen.by_kind) == {AnswerKind.NO_ANSWER}
    assert set(entries(seen.journal)) == {(number, Noted.SENT) for number in range(seen.total.count)}
    [(cause, count)] = seen.errors.items()
    assert "ConnectionRefusedError" in cause
    assert count == seen.total.count
