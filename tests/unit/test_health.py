"""/livez and /readyz: what makes a process unready, and that a part that hangs cannot hang the answer."""

import asyncio
import time
from typing import cast

import httpx
import orjson
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Route

from firstclaim.errors import LedgerUnavailable
from firstclaim.web import health
from firstclaim.web.health import Finding, Health, HealthCheck, Probe, Readiness, livez

NOBODY = cast(Request, None)


def finds(finding: Finding) -> Probe:
    async def probe() -> Finding:
        return finding

    return probe


def raises(error: Exception) -> Probe:
    async def probe() -> Finding:
        raise error

    return probe


OK, DEGRADED, DOWN = (finds(Finding(each)) for each in Health)


async def ask(*parts: HealthCheck) -> tuple[int, list[dict[str, object]]]:
    """The status and the lines, their milliseconds checked and taken off."""
    response = await Readiness(list(parts)).report(NOBODY)
    lines = [orjson.loads(line) for line in bytes(response.body).splitlines()]
    assert response.headers["cache-control"] == "no-store"
    assert all(line.pop("milliseconds") >= 0 for line in lines)
    return response.status_code, lines


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A probe's deadline that a test can wait for."""
    monkeypatch.setattr(health, "PROBE_SECONDS", 0.02)


async def test_livez_touches_nothing() -> None:
    """As long as the event loop turns, the process is alive, whatever its stores do."""
    app = Starlette(routes=[Route("/livez", livez)])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as client:
        response = await client.get("/livez")
    assert (response.status_code, response.json()) == (200, {"status": "ok"})


async def test_all_well_is_a_200() -> None:
    """A line per part, in their order; a detail only where there is one."""
    status, lines = await ask(HealthCheck("one", OK), HealthCheck("two", finds(Finding(Health.OK, "at 0001"))))
    assert status == 200
    assert lines == [{"part": "one", "status": "ok"}, {"part": "two", "status": "ok", "detail": "at 0001"}]


async def test_down_is_a_503() -> None:
    """One part that is down makes the process unready, and its line says which."""
    status, lines = await ask(HealthCheck("one", OK), HealthCheck("two", DOWN), HealthCheck("three", OK))
    assert status == 503
    assert [line["status"] for line in lines] == ["ok", "down", "ok"]


async def test_degraded_stays_ready() -> None:
    """Without Redis events are still recorded: traffic must go on."""
    status, lines = await ask(HealthCheck("one", OK), HealthCheck("two", DEGRADED))
    assert (status, lines[1]["status"]) == (200, "degraded")


@pytest.mark.parametrize(("failing", "status"), [(Health.DOWN, 503), (Health.DEGRADED, 200)])
async def test_a_probe_that_raises_is_a_finding(failing: Health, status: int) -> None:
    """It counts as that part counts; of a stranger's exception only the class is shown."""
    ours = HealthCheck("ours", raises(LedgerUnavailable("ConnectionRefusedError")), failing)
    theirs = HealthCheck("theirs", raises(RuntimeError("password=c4n4rypw")), failing)
    found, lines = await ask(ours, theirs)
    assert found == status
    assert lines == [
        {"part": "ours", "status": failing, "detail": "ConnectionRefusedError"},
        {"part": "theirs", "status": failing, "detail": "RuntimeError"},
    ]


class Hangs:
    """A probe that answers when told to, and counts how often it was started."""

    def __init__(self) -> None:
        self.started = 0
        self.answer = asyncio.Event()

    async def __call__(self) -> Finding:
        self.started += 1
        await self.answer.wait()
        return Finding(Health.OK)


@pytest.mark.usefixtures("short")
async def test_a_hanging_part_is_answered_for() -> None:
    """At its deadline it counts as failed, and the other parts are not kept waiting."""
    probe = Hangs()
    began = time.monotonic()
    status, lines = await ask(HealthCheck("hangs", probe), HealthCheck("well", OK))
    assert time.monotonic() - began < 1  # the deadline is 0.02 s; a machine may be busy
    assert status == 503
    assert lines == [
        {"part": "hangs", "status": "down", "detail": "no answer within 0.02 s"},
        {"part": "well", "status": "ok"},
    ]
    probe.answer.set()


@pytest.mark.usefixtures("short")
async def test_a_hanging_probe_is_not_started_twice() -> None:
    """However often a prober asks, a frozen store has one call of ours; once it has answered it is asked again."""
    probe = Hangs()
    part = HealthCheck("hangs", probe)
    for _ in range(3):
        assert (await ask(part))[0] == 503
    assert probe.started == 1
    probe.answer.set()
    assert await ask(part) == (200, [{"part": "hangs", "status": "ok"}])
    assert await ask(part) == (200, [{"part": "hangs", "status": "ok"}])
    assert probe.started > 1


async def test_parts_are_asked_side_by_side() -> None:
    """Ten parts take as long as the slowest: all are asked before one has answered."""
    probes = [Hangs() for _ in range(10)]
    asking = asyncio.ensure_future(ask(*(HealthCheck(str(number), probe) for number, probe in enumerate(probes))))
    for _ in range(20):  # turns of the loop
        await asyncio.sleep(0)
    assert [probe.started for probe in probes] == [1] * 10
    for probe in probes:
        probe.answer.set()
    assert (await asking)[0] == 200


async def test_a_finding_is_fresh() -> None:
    """An answer is never older than the question: a part that went down is seen at once."""
    found = Finding(Health.OK)

    async def probe() -> Finding:
        return found

    part = HealthCheck("one", probe)
    assert (await ask(part))[0] == 200
    found = Finding(Health.DOWN)
    assert (await ask(part))[0] == 503
