"""How a service ends: by a signal, with work in flight; and when its supervisor is killed."""

import asyncio
import signal
import socket
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import orjson
import pytest

from firstclaim.status import Status
from tests.acceptance.harness import (
    DEFERRED,
    PROCESSED,
    Overrides,
    Sandbox,
    Service,
    eventually,
    sample,
)

HASTY: Overrides = {"answer_budget_seconds": 1.5, "shutdown_seconds": 4, "lock_ttl_seconds": 1}


@pytest.mark.smoke
async def test_the_drain_delay_keeps_serving(sandbox: Sandbox) -> None:
    """During FIRSTCLAIM_DRAIN_SECONDS /readyz says 503 and deliveries are still processed; then it exits with 0."""
    drain_seconds = 3
    service = await sandbox.service({"drain_seconds": drain_seconds}).start()
    service.terminate()
    ends = time.monotonic() + drain_seconds
    await eventually(service.components, lambda seen: seen[0] == 503)
    status, components = await service.components()
    assert (status, [name for name, found in components.items() if found != "ok"]) == (503, ["process"])
    while time.monotonic() < ends - 0.5:
        assert (await sandbox.deliver(service, sample())).result == PROCESSED
    assert await service.wait_for_exit() == 0, service.output
    with pytest.raises(httpx.TransportError):
        await service.get("/livez")


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_stop_loses_no_line_of_the_log(workers: int, sandbox: Sandbox) -> None:
    """SIGTERM right after the answers: the log has a whole line for each delivery."""
    service = await sandbox.service(workers=workers).start()
    event = sample()
    for _ in range(50):
        await sandbox.deliver(service, event)
    service.terminate()
    assert await service.wait_for_exit() == 0, service.output
    lines = [orjson.loads(line) for line in service.output.splitlines() if line.startswith("{")]
    assert [line["event_id"] for line in lines if line["event"] == "delivery"] == [event.id] * 50


async def test_a_second_signal_skips_the_drain_delay(sandbox: Sandbox) -> None:
    """Ctrl-C twice, or an impatient operator: the delay is cut short, and the exit is still a clean one."""
    service = await sandbox.service({"drain_seconds": 60, "shutdown_seconds": 90}).start()
    service.terminate()
    await eventually(service.components, lambda seen: seen[0] == 503)
    service.terminate()
    assert await service.wait_for_exit() == 0, service.output


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_hangup_drains(workers: int, sandbox: Sandbox, tmp_path: Path) -> None:
    """SIGHUP, as a closed terminal sends it, is a SIGTERM: the work in flight ends, and the exit code is 0."""
    service = await sandbox.service(workers=workers).start()
    gate = tmp_path / "gate"
    event = sample("hold", gate=str(gate))
    answer = asyncio.create_task(sandbox.deliver(service, event))
    await sandbox.settled(event, Status.PROCESSING)
    service.terminate(signal.SIGHUP)
    await eventually(_says(service, "Shutting down"))
    gate.touch()
    assert await service.wait_for_exit() == 0, service.output
    assert (await answer).result == PROCESSED
    assert (await sandbox.settled(event)).counts == (1, 0, 0)


async def test_workers_leave_with_their_killed_supervisor(sandbox: Sandbox, tmp_path: Path) -> None:
    """kill -9 of the supervisor: its workers end their work and leave by themselves, and the port is free again."""
    service = await sandbox.service(HASTY, workers=2).start()
    gate = tmp_path / "gate"
    event = sample("hold", gate=str(gate))
    answer = asyncio.create_task(sandbox.deliver(service, event))
    await sandbox.settled(event, Status.PROCESSING)
    assert len(await service.pids()) >= 3

    service.kill_supervisor()
    assert await service.wait_for_exit() == -signal.SIGKILL
    await eventually(_says(service, "supervisor_vanished"))
    gate.touch()
    await eventually(service.pids, lambda members: not members)
    assert (await answer).result in (PROCESSED, DEFERRED)
    assert (await sandbox.settled(event)).counts == (1, 0, 0)
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", service.port))


def _says(service: Service, words: str) -> Callable[[], Awaitable[bool]]:
    async def said() -> bool:
        return words in service.output

    return said
