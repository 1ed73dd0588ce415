"""The users of a load test, on locust: its fast HTTP user, its runner, its statistics, its HTML report.

Guarantees: every delivery is in the statistics once, under the kind of its answer, also if there was none. Its latency
is that of its own request. At a fixed rate it counts from the instant at which the delivery was due, so a stall of the
service is not hidden by users that wait. No user has more than one turn in flight, and no delivery outlives its
timeout.

Runs in a process of its own (`firstclaim.loadtest.runner` starts it): locust is built on gevent, which does not work
beside an asyncio loop, and the generator must not share an interpreter with the code that draws the progress.
"""

import logging
import signal
import time
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import gevent
from gevent.event import Event
from gevent.ssl import PROTOCOL_TLS_CLIENT, SSLContext
from locust import FastHttpUser, stats, task
from locust.contrib.fasthttp import LocustUserAgent
from locust.env import Environment
from locust.html import get_html_report

from firstclaim.loadtest.plan import AnswerKind, Bodies, Journal, Latencies, Mix, Pace, Plan, Progress, Result, kind_of
from firstclaim.sending.client import sign

_TIMEOUT_SECONDS = 30.0  # as `firstclaim send`: after this time the server hangs, and that is the result
_PROGRESS_SECONDS = 0.5
_USERS_STARTED_PER_SECOND = 100.0  # locust warns above this
_CHART_POINTS_MOST = 600


class Load:
    """The state that all users share."""

    def __init__(self, plan: Plan) -> None:
        url = urlsplit(plan.url)
        self.plan = plan
        self.host = urlunsplit((url.scheme, url.netloc, "", "", ""))
        self.path = urlunsplit(("", "", url.path or "/", url.query, ""))
        self.mix = Mix(plan)
        self.bodies = Bodies(plan)
        self.pace = Pace(plan.deliveries_per_second)
        self.journal = Journal()
        self.last_answer_at = 0.0  # seconds from the start
        self.over = False
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._started


@cache
def _tls(cafile: str) -> Any:
    """One context for all users: loading the certificates takes longer than a delivery.

    It is gevent's own class. The standard library's, which `create_default_context` returns where nothing is patched,
    would block all users during the TLS handshake of one.
    """
    context = SSLContext(PROTOCOL_TLS_CLIENT)  # verifies the name and the chain
    context.load_verify_locations(cafile)
    return context


class Sender(FastHttpUser):
    """Takes a turn, waits until it is due, sends its copies."""

    network_timeout = connection_timeout = _TIMEOUT_SECONDS
    insecure = False
    ssl_context_factory = staticmethod(_tls)
    max_redirects = 0  # to Stripe a redirect is a failed delivery
    load: Load

    def on_start(self) -> None:
        """Wait for the first turn too."""
        self.client.client.cookiejar = None
        self.wait()

    def wait_time(self) -> float:
        """Take the next turn. locust waits this long, and may kill the user meanwhile: nothing was sent yet."""
        self.turn = self.load.mix.next()
        self.due = self.load.pace.due(self.turn.copies, self.load.seconds)
        return max(0.0, self.due - self.load.seconds)

    @task
    def deliver(self) -> None:
        """Send every copy before any answer is read: a greenlet yields only when it waits for an answer."""
        if self.load.over:
            # locust kills users that wait. A user that wakes up at that moment would be killed during its request,
            # and the delivery would be missing in the statistics.
            return
        body = self.load.bodies.of(self.turn)
        self.load.journal.sent(self.turn.number)
        # Copies at the same instant have the same timestamp, and so the same signature.
        headers = {
            "Content-Type": "application/json; charset=utf-8",
            "Stripe-Signature": sign(body, self.load.plan.secret),
            "Accept-Encoding": "identity",
        }
        if self.turn.copies == 1:
            self._post(body, headers)
        else:
            copies = [gevent.spawn(self._post, body, headers) for _ in range(self.turn.copies)]
            gevent.joinall(copies, raise_error=True)

    def _post(self, body: bytes, headers: dict[str, str]) -> None:
        try:
            self._post_and_record(body, headers)
        except Exception as error:  # noqa: BLE001  (locust's client cannot read the answer)
            self.environment.events.request.fire(
                request_type="POST",
                name=AnswerKind.NO_ANSWER,
                response_time=(self.load.seconds - self.due) * 1000,
                response_length=0,
                exception=_cause(error),
            )

    def _post_and_record(self, body: bytes, headers: dict[str, str]) -> None:
        waited_ms = (self.load.seconds - self.due) * 1000 if self.load.plan.deliveries_per_second else 0.0
        with (
            gevent.Timeout(_TIMEOUT_SECONDS),  # for all of it: the client's own start again with every byte
            self.client.post(
                self.load.path,
                data=body,  # type: ignore[arg-type]  # its docstring allows bytes
                headers=headers,
                catch_response=True,
            ) as response,
        ):
            status = response.status_code
            kind = kind_of(status, response.content or b"")
            self.load.journal.answered(self.turn.number, status, kind)
            self.load.last_answer_at = self.load.seconds
            response.request_meta["name"] = kind
            response.request_meta["response_time"] += waited_ms
            if kind is AnswerKind.NO_ANSWER:
                response.failure(_cause(response.error))
            elif not 200 <= status < 300:
                response.failure(f"{status} {kind}")


def _cause(error: BaseException) -> str:
    """A short text, the same for the same cause, because the texts are counted."""
    error = getattr(error, "original", error)  # the cause of an error that locust's client could retry
    text = f"{type(error).__name__}: {error}".removesuffix(": ")
    return text if text.isprintable() else ascii(text)  # an unknown server may have written a part of it


# -- the run ------------------------------------------------------------------------------------------


def generate(plan: Plan, pipe: Connection) -> None:
    """Run the plan; sends `Progress` on the pipe, and a `Result` at the end. SIGTERM ends it early."""
    stop = Event()
    gevent.signal_handler(signal.SIGTERM, stop.set)
    _set_up_locust(plan)
    load = Sender.load = Load(plan)
    environment = Environment(user_classes=[Sender], host=load.host, stop_timeout=_TIMEOUT_SECONDS + 5)
    runner = environment.create_local_runner()
    runner.start(plan.users, spawn_rate=min(plan.users, _USERS_STARTED_PER_SECOND))
    runner.greenlet.spawn(stats.stats_history, runner)
    runner.greenlet.spawn(_report, load, runner.stats, pipe, stop)
    cpu_before = time.process_time()
    stop.wait(plan.duration_seconds)
    seconds, load.over = load.seconds, True
    runner.stop()  # requests in flight get their answer
    seconds = max(seconds, load.last_answer_at)
    result = _result(load, runner.stats, seconds, time.process_time() - cpu_before)
    if plan.html is not None:
        Path(plan.html).write_text(get_html_report(environment, show_download_link=False), encoding="utf-8")
    runner.quit()
    pipe.send(result)


def _set_up_locust(plan: Plan) -> None:
    logging.disable(logging.WARNING)  # its one warning, about CPU usage, is in our report
    settings: Any = stats
    settings.bucket_response_time = _three_digits
    settings.HISTORY_STATS_INTERVAL_SEC = max(1.0, plan.duration_seconds / _CHART_POINTS_MOST)
    LocustUserAgent.valid_response_codes = frozenset(range(100, 1000))  # none is a failure here: `kind_of` decides
    Sender.concurrency = plan.copies


def _three_digits(milliseconds: float) -> float:
    """Round to three digits. locust rounds to whole milliseconds, and a duplicate takes about one."""
    return float(f"{milliseconds:.3g}")


def _report(load: Load, statistics: stats.RequestStats, pipe: Connection, stop: Event) -> None:
    while True:
        gevent.sleep(_PROGRESS_SECONDS)
        counts = {AnswerKind(name): entry.num_requests for (name, _), entry in statistics.entries.items()}
        try:
            pipe.send(Progress(load.seconds, counts))
        except OSError:  # the parent process ended
            stop.set()
            return


def _result(load: Load, statistics: stats.RequestStats, seconds: float, cpu_seconds: float) -> Result:
    return Result(
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        total=_latencies(statistics.total),
        by_kind={AnswerKind(name): _latencies(entry) for (name, _), entry in statistics.entries.items()},
        errors={
            str(each.error): each.occurrences
            for each in statistics.errors.values()
            if each.name == AnswerKind.NO_ANSWER
        },
        journal=load.journal.close(),
    )


def _latencies(entry: stats.StatsEntry) -> Latencies:
    p50, p95, p99 = (float(entry.get_response_time_percentile(each)) for each in (0.5, 0.95, 0.99))
    return Latencies(entry.num_requests, p50, p95, p99, float(entry.max_response_time))
