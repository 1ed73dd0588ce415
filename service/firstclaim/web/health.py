"""GET /livez and /readyz.

Guarantees: `/livez` touches nothing; `/readyz` asks every part side by side, each within its own deadline,
and answers in that time even when a part hangs: a probe that does not come back is left alone and not
started a second time. One JSON line per part.
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

PROBE_SECONDS = 1.0  # below the timeout of any prober; above what a store needs that is well


class Health(StrEnum):
    """How a part is."""

    OK = "ok"
    DEGRADED = "degraded"  # not well, and events are still recorded
    DOWN = "down"


@dataclass(frozen=True, slots=True)
class Finding:
    """What a probe found."""

    health: Health
    detail: str | None = None


Probe = Callable[[], Awaitable[Finding]]


@dataclass(slots=True)
class HealthCheck:
    """One thing to ask. `failing` is what its failure means for readiness."""

    name: str
    probe: Probe
    failing: Health = Health.DOWN
    _running: asyncio.Task[Finding] | None = field(default=None, init=False)

    async def run(self) -> tuple[Finding, float]:
        """The finding, and the milliseconds it took."""
        began = time.perf_counter()
        if self._running is None or self._running.done():
            self._running = asyncio.ensure_future(self._guarded())
        # Not cancelled at the deadline: cancelling a call to a frozen store waits for that store.
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
        except Exception as error:  # noqa: BLE001  (a probe that breaks is a finding)
            return Finding(self.failing, type(error).__name__)


async def livez(_request: Request) -> Response:
    """200 as long as the event loop turns."""
    return Response(b'{"status":"ok"}\n', media_type="application/json")


class Readiness:
    """`/readyz`: 200 while events can be recorded and finished, else 503."""

    def __init__(self, parts: list[HealthCheck]) -> None:
        self._parts = parts

    async def report(self, _request: Request) -> Response:
        """Ask all parts side by side."""
        answers = await asyncio.gather(*(part.run() for part in self._parts))
        lines = [
            _line(part.name, finding, milliseconds)
            for part, (finding, milliseconds) in zip(self._parts, answers, strict=True)
        ]
        down = any(finding.health is Health.DOWN for finding, _ in answers)
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
