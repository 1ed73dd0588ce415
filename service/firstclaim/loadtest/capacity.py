"""How many events a second the handlers of a service can take: its slots, and how long its handlers took.

Guarantees: the figures are those of the service's own `/metrics`, of the time between two readings. Where that shows
none (another receiver, or a closed `/metrics`), the ceiling is unknown, and nothing fails.
"""

import re
from dataclasses import dataclass
from urllib.parse import urlsplit

import httpx

from firstclaim.formatting import number_of

# An event holds its slot for longer than its handler runs: for the round trips of the transaction, and its COMMIT.
OVERHEAD_SECONDS = 0.005
_TIMEOUT_SECONDS = 10.0  # a scrape may wait for the ledger for half of it
_SAMPLE = re.compile(r"^firstclaim_handler_(slots|seconds_count|seconds_sum)(?:\{.*\})? ([\d.e+-]+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Reading:
    """The slots of all workers, and the runs of their handlers since the start."""

    slots: int
    runs: int
    seconds: float


def metrics_url(webhook_url: str, webhook_path: str, endpoint: str = "") -> str:
    """The address of `/metrics` beside an endpoint, which may have a name, and be below a prefix."""
    parts = urlsplit(webhook_url)
    prefix = parts.path.rstrip("/").removesuffix(f"/{endpoint}" if endpoint else "").removesuffix(webhook_path)
    return parts._replace(path=f"{prefix}/metrics", query="").geturl()


def read(url: str) -> Reading | None:
    """The reading of now; None if there is nothing to read."""
    try:
        text = httpx.get(url, timeout=_TIMEOUT_SECONDS).text
    except (httpx.HTTPError, httpx.InvalidURL):
        return None
    total = {"slots": 0.0, "seconds_count": 0.0, "seconds_sum": 0.0}
    for name, value in _SAMPLE.findall(text):
        total[name] += float(value)
    return Reading(int(total["slots"]), int(total["seconds_count"]), total["seconds_sum"]) if total["slots"] else None


def ceiling(before: Reading | None, after: Reading | None) -> str:
    """The sentence on what slots and latency allow. The processor may allow less."""
    if before is None or after is None or (runs := after.runs - before.runs) <= 0:
        return "What the handlers' latency allows is unknown: the service's /metrics cannot be read, or show no run."
    seconds = max(0.0, after.seconds - before.seconds) / runs
    rate = after.slots / (seconds + OVERHEAD_SECONDS)
    return (
        f"handlers took {seconds * 1000:.1f} ms on average; {number_of(after.slots, 'slot allows', 'slots allow')} "
        f"{after.slots} / ({seconds * 1000:.1f} ms + {OVERHEAD_SECONDS * 1000:.0f} ms) = {rate:,.0f} events a second, "
        "of all workers together"
    )
