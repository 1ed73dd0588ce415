"""`python -m tests.load.open_loop --ours URL --peer URL`: the latency of fresh events that come whether or not earlier
ones are answered.

A closed loop, as `compare` is, sends less when the receiver is slow, so its percentiles are those of a load that the
receiver chose. Here events arrive at random times (a Poisson process), at a share of what the peer can do in a closed
loop, and the latency of each counts from the time at which it was due, even if the sender was late. The receivers take
turns. Anything but 2xx, or no answer, ends the run.
"""

import argparse
import asyncio
import contextlib
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import uvloop
from rich.console import Console
from rich.table import Table

from firstclaim.sending.client import sign
from tests.load.driver import Driver, Kind

_HEAD_END = b"\r\n\r\n"
_LAST_ANSWERS_SECONDS = 10.0
_YIELD_SECONDS = 0.001  # a sender that is later than this lets answers in before it sends on
_QUANTILES = (0.5, 0.9, 0.99)


class _Connection(asyncio.Protocol):
    """One connection, which has one request at a time."""

    def __init__(self, run: "_Run") -> None:
        self._run = run
        self._answer = b""
        self._due_at = 0.0
        self._write: Callable[[bytes], None]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._write = transport.write

    def send(self, request: bytes, due_at: float) -> None:
        """Send a request that was due at this time of `time.perf_counter`."""
        self._due_at = due_at
        self._write(request)

    def data_received(self, data: bytes) -> None:
        self._answer += data
        head, end, body = self._answer.partition(_HEAD_END)
        length = next((line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), b":0")
        if end and len(body) >= int(length.partition(b":")[2]):
            self._answer = b""
            self._run.answered(self, head, time.perf_counter() - self._due_at)


@dataclass(slots=True)
class _Run:
    """One round of one receiver: `count` requests."""

    count: int
    idle: list[_Connection] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    refused: int = 0
    complete: asyncio.Event = field(default_factory=asyncio.Event)

    def answered(self, connection: _Connection, head: bytes, seconds: float) -> None:
        """Note a whole answer."""
        self.seconds.append(seconds)
        self.refused += not head.startswith(b"HTTP/1.1 2")
        self.idle.append(connection)
        if len(self.seconds) == self.count:
            self.complete.set()


async def latencies(driver: Driver, per_second: float) -> list[float]:
    """The sorted latencies, in milliseconds, of one round of `driver.seconds`."""
    parts = urlsplit(driver.url)
    requests = [_request(parts.netloc, parts.path, body, driver.secret) for body in driver.events(per_second)]
    run, loop = _Run(len(requests)), asyncio.get_running_loop()
    due_at = time.perf_counter()
    for request in requests:
        due_at += random.expovariate(per_second)
        early = due_at - time.perf_counter()
        if early > 0 or early < -_YIELD_SECONDS:
            await asyncio.sleep(max(0, early))
        if run.idle:
            connection = run.idle.pop()
        else:
            _, connection = await loop.create_connection(
                lambda: _Connection(run), parts.hostname or "", parts.port or 80
            )
        connection.send(request, due_at)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(run.complete.wait(), _LAST_ANSWERS_SECONDS)
    if run.refused or not run.complete.is_set():
        missing = run.count - len(run.seconds)
        raise SystemExit(f"{driver.url}: {run.refused} answers were no 2xx, {missing} requests had none")
    return sorted(seconds * 1000 for seconds in run.seconds)


def _request(host: str, path: str, body: bytes, secret: str) -> bytes:
    lines = (
        f"POST {path} HTTP/1.1",
        f"Host: {host}",
        "Content-Type: application/json; charset=utf-8",
        f"Stripe-Signature: {sign(body, secret)}",
        f"Content-Length: {len(body)}",
    )
    return "\r\n".join(lines).encode() + _HEAD_END + body


def main() -> None:
    """Print the percentiles of every round, and the median ratio of each."""
    parser = argparse.ArgumentParser(prog="python -m tests.load.open_loop", description=__doc__)
    parser.add_argument("--ours", required=True)
    parser.add_argument("--peer", required=True)
    parser.add_argument("--secret", default="whsec_test")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10, help="of one round")
    parser.add_argument("--share", type=float, default=0.8, help="of what the peer can do in a closed loop")
    parser.add_argument("--rate", type=float, help="events a second, instead of a share")
    asked = parser.parse_args()
    ours, peer = (Driver(url, asked.secret, asked.seconds) for url in (asked.ours, asked.peer))
    for driver in (ours, peer):
        driver.run(Kind.FRESH)  # warm, and not counted
    rate = asked.rate or asked.share * peer.run(Kind.FRESH).per_second
    table = Table("round", title=f"{rate:,.0f} fresh events a second, ms")
    for column in (f"{name} p{quantile * 100:.0f}" for name in ("ours", "peer") for quantile in _QUANTILES):
        table.add_column(column, justify="right")
    ratios: list[list[float]] = []
    for turn in range(asked.rounds):
        seen = {}
        for driver in (ours, peer) if turn % 2 else (peer, ours):
            latency = uvloop.run(latencies(driver, rate))
            seen[driver.url] = [latency[int(len(latency) * quantile)] for quantile in _QUANTILES]
        table.add_row(str(turn + 1), *(f"{value:,.1f}" for driver in (ours, peer) for value in seen[driver.url]))
        ratios.append([mine / its for mine, its in zip(seen[ours.url], seen[peer.url], strict=True)])
    medians = [f"{statistics.median(column):.2f}" for column in zip(*ratios, strict=True)]
    table.add_row("ratio", *medians, *[""] * len(medians))
    Console().print(table)


if __name__ == "__main__":
    main()
