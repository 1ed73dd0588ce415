"""Signed deliveries at full speed, and two receivers of them side by side, for the benchmarks.

By wrk where it is installed, else by the load test's own users, which take far more of the machine.

Guarantees: everything is signed before the clock starts, so what is measured is the receiver; `fresh` never
counts a round in which an event was sent twice; anything but 2xx raises, because the rate of an error page is
no rate. Event ids are random, which is the hardest: an index that is large is then hit everywhere. Those that one sees
of Stripe's rise with time (evt_1Q..., evt_1R..., evt_1S...), and hit it in one place: `Ids.RISING`.
"""

import io
import itertools
import secrets
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from urllib.parse import urlsplit

import orjson
from rich.console import Console
from rich.table import Table

from firstclaim.loadtest.plan import AnswerKind, Plan
from firstclaim.loadtest.runner import generate
from firstclaim.sending.client import sign
from firstclaim.sending.events import marked_event

COPIES = 20
CONNECTIONS = 32
_MARK = b"\xff" * 12

_GOOD = {AnswerKind.PROCESSED, AnswerKind.IGNORED, AnswerKind.UNHANDLED, AnswerKind.DEFERRED}

_SCRIPT = """
local requests, at = {}, 0
function init(arguments)
  local file = assert(io.open(arguments[1], "rb"))
  while true do
    local signature = file:read("*l")
    if not signature then break end
    local body = file:read(tonumber(file:read("*l")))
    local headers = {["Stripe-Signature"] = signature, ["Content-Type"] = "application/json; charset=utf-8"}
    requests[#requests + 1] = wrk.format("POST", arguments[2], headers, body)
  end
end
function request()
  at = at % #requests + 1
  return requests[at]
end
function done(summary, latency)
  local errors = summary.errors
  io.write(string.format('\\n{"count": %d, "seconds": %f, "p99_ms": %f, "refused": %d, "unanswered": %d}\\n',
    summary.requests, summary.duration / 1e6, latency:percentile(99) / 1e3, errors.status,
    errors.connect + errors.read + errors.write + errors.timeout))
end
"""


class Kind(StrEnum):
    """What is sent."""

    FRESH = "fresh"  # every event once
    DUPLICATES = "duplicates"  # every event 20 times in a row
    COMPLETED = "completed"  # only events that were answered before


class Ids(StrEnum):
    """How the ids of events follow each other."""

    RANDOM = "random"
    RISING = "rising"


@dataclass(frozen=True, slots=True)
class Rate:
    """What a receiver did."""

    deliveries: int
    per_second: float
    p99_ms: float


@dataclass(slots=True)
class Driver:
    """Sends to one URL; `seconds` is how long one `run` takes."""

    url: str
    secret: str
    seconds: float
    connections: int = CONNECTIONS
    event_type: str = "invoice.payment_failed"
    ids: Ids = Ids.RANDOM
    _completed: list[bytes] = field(default_factory=list)
    _prepared_per_second: int = 2_000  # doubled until it is enough

    def run(self, kind: Kind) -> Rate:
        """One round."""
        if shutil.which("wrk") is None:
            return self._by_users(kind)
        if kind is Kind.COMPLETED:
            if not self._completed:
                self._completed = list(self._events(500))
                self._by_wrk(self._completed)
            return self._by_wrk(self._completed)
        prepared = int(self._prepared_per_second * self.seconds)
        if kind is Kind.DUPLICATES:
            return self._by_wrk([event for event in self._events(prepared // COPIES) for _ in range(COPIES)])
        rate = self._by_wrk(list(self._events(prepared)))
        if rate.deliveries > prepared:  # the last of them were not fresh any more
            self._prepared_per_second *= 2
            return self.run(kind)
        return rate

    def events(self, per_second: float) -> list[bytes]:
        """The bodies of the fresh events of one round at this rate."""
        return list(self._events(int(per_second * self.seconds)))

    def _events(self, count: int) -> Iterator[bytes]:
        marked = marked_event(self.event_type, "evt_1", _MARK)
        digits = len(_MARK)
        for number in itertools.islice(itertools.count(time.time_ns() // 100_000), count):  # 10,000 a second
            name = f"{number:0{digits}x}" if self.ids is Ids.RISING else secrets.token_hex(digits // 2)
            yield marked.replace(_MARK, name.encode())

    def _by_wrk(self, bodies: list[bytes]) -> Rate:
        parts = urlsplit(self.url)
        with tempfile.TemporaryDirectory() as folder:
            script, deliveries = Path(folder, "post.lua"), Path(folder, "deliveries")
            script.write_text(_SCRIPT)
            with deliveries.open("wb") as file:
                for body in bodies:
                    file.write(b"%b\n%d\n%b" % (sign(body, self.secret).encode(), len(body), body))
            load = ["-t1", f"-c{self.connections}", f"-d{self.seconds:.0f}", "--timeout", "30", "-s", str(script)]
            where = [f"{parts.scheme}://{parts.netloc}", "--", str(deliveries), parts.path]
            done = subprocess.run(["wrk", *load, *where], check=True, capture_output=True)
        said = orjson.loads(done.stdout.splitlines()[-1])
        if said["refused"] or said["unanswered"]:
            raise SystemExit(f"{self.url}: {said['refused']} answers were no 2xx, {said['unanswered']} were none")
        return Rate(said["count"], said["count"] / said["seconds"], said["p99_ms"])

    def _by_users(self, kind: Kind) -> Rate:
        if kind is Kind.COMPLETED:
            raise SystemExit("to send completed events again, wrk is needed (a package of that name)")
        copies = COPIES if kind is Kind.DUPLICATES else 1
        plan = Plan(
            url=self.url,
            secret=self.secret,
            types=(self.event_type,),
            users=max(1, self.connections // copies),
            deliveries_per_second=0,
            duration_seconds=self.seconds,
            duplicates_percent=0,
            concurrent_percent=100 if copies > 1 else 0,
            copies=copies,
            seed=0,
        )
        seen = generate(plan, Console(file=io.StringIO()))
        if bad := set(seen.by_kind) - _GOOD:
            raise SystemExit(f"{self.url}: answers were {', '.join(sorted(bad))}")
        return Rate(seen.total.count, seen.total.count / seen.seconds, seen.total.p99)


def side_by_side(sides: dict[str, Driver], kinds: Sequence[Kind], rounds: int) -> Table:
    """Alternating rounds of two receivers; above 1 is better for the first, in both ratios."""
    (one, first), (other, second) = sides.items()
    table = Table("load", "round")
    for column in (f"{one} /s", f"{other} /s", "ratio", f"{one} p99 ms", f"{other} p99 ms", "p99 ratio"):
        table.add_column(column, justify="right")
    for kind in kinds:
        for driver in sides.values():
            driver.run(kind)  # warm, and not counted
        ratios: list[tuple[float, float]] = []
        for turn in range(rounds):
            if turn % 2:
                mine, its = first.run(kind), second.run(kind)
            else:
                its, mine = second.run(kind), first.run(kind)
            ratios.append((mine.per_second / its.per_second, its.p99_ms / mine.p99_ms))
            speeds = f"{mine.per_second:,.0f}", f"{its.per_second:,.0f}", f"{ratios[-1][0]:.2f}"
            waits = f"{mine.p99_ms:,.1f}", f"{its.p99_ms:,.1f}", f"{ratios[-1][1]:.2f}"
            table.add_row(kind, str(turn + 1), *speeds, *waits)
        speed, wait = (f"{statistics.median(each):.2f}" for each in zip(*ratios, strict=True))
        table.add_row(kind, "median", "", "", speed, "", "", wait, end_section=True)
    return table
