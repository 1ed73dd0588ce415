"""GET /livez and /readyz.

Guarantees: `/livez` contacts no store. `/readyz` runs all health checks concurrently and answers within
`PROBE_SECONDS`, even if a check hangs. A check that hangs is neither cancelled nor started a second time: later
requests wait for the same run. The body has one JSON line per check.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from firstclaim.errors import FirstclaimError
from firstclaim.inbox.slots import Slots

PROBE_SECONDS = 1.0  # shorter than the timeout of any prober, longer than a healthy store needs


class Health(StrEnum):
    """The health that a check reports."""

    OK = "ok"
    DEGRADED = "degraded"  # something is wrong, but events are still recorded
    DOWN = "down"


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of a probe."""

    health: Health
    detail: str | None = None


Probe = Callable[[], Awaitable[Finding]]


@dataclass(slots=True)
class HealthCheck:
    """A named probe. `failing` is the health that is reported when the probe fails."""

    name: str
    probe: Probe
    failing: Health = Health.DOWN
    _running: asyncio.Task[Finding] | None = field(default=None, init=False)

    async def run(self) -> tuple[Finding, float]:
        """Run the probe. Returns its finding and how long it took, in milliseconds."""
        began = time.perf_counter()
        if self._running is None or self._running.done():
            self._running = asyncio.ensure_future(self._guarded())
        # Not cancelled at the deadline, because cancelling a call to a frozen store waits for that store.
        await asyncio.wait({self._running}, timeout=PROBE_SECONDS)
        if not self._running.done():
            finding = Finding(self.failing, f"no answer within {PROBE_SECONDS:g} s")
        else:
            finding = self._running.result()
        return finding, round((time.perf_counter() - began) * 1000, 1)

    async def _guarded(self) -> Finding:
        try:
            return await self.probe()
        except FirstclaimError as error:
            return Finding(self.failing, str(error))
        except Exception as error:  # noqa: BLE001  (a probe that raises has failed)
            return Finding(self.failing, type(error).__name__)


class Liveness:
    """`/livez`: 200 while the event loop runs; 503 once only a restart can free a handler slot."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots

    async def report(self, _request: Request) -> Response:
        """The answer. Contacts no store."""
        if self._slots.all_hung:
            body = b'{"status":"down","detail":"every handler slot is held by a thread past its deadline"}\n'
            return Response(body, 503, media_type="application/json")
        return Response(b'{"status":"ok"}\n', media_type="application/json")


class Readiness:
    """`/readyz`: 200 while events can be recorded and finished, otherwise 503."""

    def __init__(self, checks: list[HealthCheck]) -> None:
        self._checks = checks

    async def report(self, _request: Request) -> Response:
        """Run all checks concurrently."""
        results = await asyncio.gather(*(check.run() for check in self._checks))
        lines = [
            _line(check.name, finding, milliseconds)
            for check, (finding, milliseconds) in zip(self._checks, results, strict=True)
        ]
        down = any(finding.health is Health.DOWN for finding, _ in results)
        return Response(
            b"".join(lines),
            503 if down else 200,
            {"Cache-Control": "no-store"},
            media_type="application/x-ndjson",
        )


def _line(name: str, finding: Finding, milliseconds: float) -> bytes:
    line: dict[str, Any] = {"part": name, "status": finding.health, "milliseconds": milliseconds}
    if finding.detail:
        line["detail"] = finding.detail
    return orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)
