"""/livez and /readyz: what makes a process unready, and that a check that hangs does not delay the answer."""

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
from firstclaim.inbox.slots import Slots
from firstclaim.web import health
from firstclaim.web.health import Finding, Health, HealthCheck, Liveness, Probe, Readiness

NO_REQUEST = cast(Request, None)


def finds(finding: Finding) -> Probe:
    async def probe() -> Finding:
        return finding

    return probe


def raises(error: Exception) -> Probe:
    async def probe() -> Finding:
        raise error

    return probe


OK, DEGRADED, DOWN = (finds(Finding(each)) for each in Health)


async def readyz(*checks: HealthCheck) -> tuple[int, list[dict[str, object]]]:
    """The status and the lines, with their milliseconds checked and removed."""
    response = await Readiness(list(checks)).report(NO_REQUEST)
    lines = [orjson.loads(line) for line in bytes(response.body).splitlines()]
    assert response.headers["cache-control"] == "no-store"
    assert all(line.pop("milliseconds") >= 0 for line in lines)
    return response.status_code, lines


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A probe deadline that is short enough for a test."""
    monkeypatch.setattr(health, "PROBE_SECONDS", 0.02)


async def test_livez_uses_no_store() -> None:
    """While the event loop runs, the process is alive, whatever the state of its stores."""
    app = Starlette(routes=[Route("/livez", Liveness(Slots(1)).report)])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as client:
        response = await client.get("/livez")
    assert (response.status_code, response.json()) == (200, {"status": "ok"})


async def test_a_process_without_a_usable_slot_is_not_alive() -> None:
    """Every slot is held by a thread past its deadline: only a restart helps, so the prober has to order one."""
    slots = Slots(2)
    app = Starlette(routes=[Route("/livez", Liveness(slots).report)])
    threads = [asyncio.get_running_loop().create_future() for _ in range(2)]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as client:
        for number, thread in enumerate(threads):
            assert (await client.get("/livez")).status_code == 200
            slots.hang(f"evt_{number}", thread)
        assert (await client.get("/livez")).status_code == 503
        threads[0].set_result(None)
        await asyncio.sleep(0)
        assert (await client.get("/livez")).status_code == 200


async def test_all_healthy_is_a_200() -> None:
    """There is one line per check, in their order, with a detail only if the finding has one."""
    status, lines = await readyz(HealthCheck("one", OK), HealthCheck("two", finds(Finding(Health.OK, "at 0001"))))
    assert status == 200
    assert lines == [{"part": "one", "status": "ok"}, {"part": "two", "status": "ok", "detail": "at 0001"}]


async def test_down_is_a_503() -> None:
    """One check that is down makes the process unready, and its line says which check it is."""
    status, lines = await readyz(HealthCheck("one", OK), HealthCheck("two", DOWN), HealthCheck("three", OK))
    assert status == 503
    assert [line["status"] for line in lines] == ["ok", "down", "ok"]


async def test_degraded_stays_ready() -> None:
    """A degraded check leaves the process ready: without Redis, events are still recorded."""
    status, lines = await readyz(HealthCheck("one", OK), HealthCheck("two", DEGRADED))
    assert (status, lines[1]["status"]) == (200, "degraded")


@pytest.mark.parametrize(("failing", "status"), [(Health.DOWN, 503), (Health.DEGRADED, 200)])
async def test_a_probe_that_raises_has_failed(failing: Health, status: int) -> None:
    """It reports the check's `failing` health, and of an exception that is not ours only the class."""
    ours = HealthCheck("ours", raises(LedgerUnavailable("ConnectionRefusedError")), failing)
    theirs = HealthCheck("theirs", raises(RuntimeError("password=c4n4rypw")), failing)
    found, lines = await readyz(ours, theirs)
    assert found == status
    assert lines == [
        {"part": "ours", "status": failing, "detail": "ConnectionRefusedError"},
        {"part": "theirs", "status": failing, "detail": "RuntimeError"},
    ]


class Hangs:
    """A probe that returns once `answer` is set, and counts how often it was started."""

    def __init__(self) -> None:
        self.started = 0
        self.answer = asyncio.Event()

    async def __call__(self) -> Finding:
        self.started += 1
        await self.answer.wait()
        return Finding(Health.OK)


@pytest.mark.usefixtures("short")
async def test_a_hanging_check_fails_at_its_deadline() -> None:
    """A check that hangs counts as failed at its deadline, and does not delay the answer further."""
    probe = Hangs()
    began = time.monotonic()
    status, lines = await readyz(HealthCheck("hangs", probe), HealthCheck("healthy", OK))
    assert time.monotonic() - began < 1  # the deadline is 0.02 s; the machine may be busy
    assert status == 503
    assert lines == [
        {"part": "hangs", "status": "down", "detail": "no answer within 0.02 s"},
        {"part": "healthy", "status": "ok"},
    ]
    probe.answer.set()


@pytest.mark.usefixtures("short")
async def test_a_hanging_probe_is_not_started_twice() -> None:
    """However often /readyz is requested, a frozen store has one pending call; once it returns, the next one starts."""
    probe = Hangs()
    check = HealthCheck("hangs", probe)
    for _ in range(3):
        assert (await readyz(check))[0] == 503
    assert probe.started == 1
    probe.answer.set()
    assert await readyz(check) == (200, [{"part": "hangs", "status": "ok"}])
    assert await readyz(check) == (200, [{"part": "hangs", "status": "ok"}])
    assert probe.started > 1


async def test_checks_run_concurrently() -> None:
    """Ten checks take as long as the slowest one: all are started before the first one returns."""
    probes = [Hangs() for _ in range(10)]
    request = asyncio.ensure_future(readyz(*(HealthCheck(str(number), probe) for number, probe in enumerate(probes))))
    for _ in range(20):  # iterations of the event loop
        await asyncio.sleep(0)
    assert [probe.started for probe in probes] == [1] * 10
    for probe in probes:
        probe.answer.set()
    assert (await request)[0] == 200


async def test_a_finding_is_fresh() -> None:
    """Findings are not cached: a check that starts to fail is reported by the next request."""
    found = Finding(Health.OK)

    async def probe() -> Finding:
        return found

    check = HealthCheck("one", probe)
    assert (await readyz(check))[0] == 200
    found = Finding(Health.DOWN)
    assert (await readyz(check))[0] == 503
