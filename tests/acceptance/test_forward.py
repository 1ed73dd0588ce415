"""Forwarding to a receiver in another language: the page's file and the page's code for Node, as they stand."""

import asyncio
import contextlib
import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from firstclaim.handlers.forward.signing import key_of
from firstclaim.handlers.forward.targets import load_targets
from firstclaim.status import Status
from tests.acceptance.harness import Overrides, Sandbox, eventually, sample
from tests.blocks import block
from tests.forward_target import SECRET, targets_file

PAGE = "docs/how-to/forward.md"
FORWARD: Overrides = {"handlers": "firstclaim.handlers.forward"}
NODE = shutil.which("node")
needs_node = pytest.mark.skipif(NODE is None, reason="needs node, to run the receiver of docs/how-to/forward.md")


@dataclass(slots=True)
class Receiver:
    """The page's receiver. `lines` are those that it has printed."""

    url: str = ""
    lines: list[str] = field(default_factory=list)

    async def handled(self) -> list[str]:
        """The ids that it has handled."""
        return [line.split()[1] for line in self.lines if line.startswith("handled ")]


@asynccontextmanager
async def receiving(folder: Path, secret: str) -> AsyncIterator[Receiver]:
    """The page's receiver.mjs as a process of node, while the block runs."""
    assert NODE is not None
    (folder / "receiver.mjs").write_text(block(PAGE, "receiver.mjs"))
    environment = {"PATH": os.environ["PATH"], "CRM_WEBHOOK_SECRET": secret, "PORT": "0"}
    process = await asyncio.create_subprocess_exec(
        NODE, "receiver.mjs", cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout is not None
    receiver = Receiver()

    async def read() -> None:
        assert process.stdout is not None
        async for line in process.stdout:
            receiver.lines.append(line.decode().strip())

    first = (await process.stdout.readline()).decode()
    assert first.startswith("listening on "), first
    receiver.url = f"http://127.0.0.1:{int(first.split()[-1])}/webhooks"
    reading = asyncio.create_task(read())
    try:
        yield receiver
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        await reading


def test_the_files_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's command makes a secret, and its file is accepted with it."""
    command = block(PAGE, "secret") + 'printf %s "$CRM_WEBHOOK_SECRET"'
    secret = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True).stdout
    assert len(key_of(secret)) == 32
    for name in ("CRM_WEBHOOK_SECRET", "WAREHOUSE_WEBHOOK_SECRET"):
        monkeypatch.setenv(name, secret)
    (tmp_path / "targets.toml").write_text(block(PAGE, "targets.toml"))
    targets = load_targets(tmp_path / "targets.toml", deadline_seconds=30)
    assert [(each.name, each.timeout_seconds, each.concurrency) for each in targets] == [
        ("crm", 10, 8),
        ("warehouse", 5, 2),
    ]


@needs_node
async def test_a_receiver_in_node(sandbox: Sandbox, tmp_path: Path) -> None:
    """It verifies each event and handles it once, also one that is forwarded again; a wrong secret is refused."""
    async with receiving(tmp_path, SECRET) as receiver:
        path = targets_file(tmp_path / "targets.toml", {"name": "crm", "url": receiver.url, "types": ["invoice.*"]})
        service = await sandbox.service({**FORWARD, "forward_targets": str(path)}).start()
        events = [sample() for _ in range(5)]
        sandbox.waived |= {event.id for event in events}  # their effects are the receiver's
        for event in events:
            answer = await sandbox.deliver(service, event)
            assert answer.content["action"] == "forwarded", answer
        await eventually(receiver.handled, lambda ids: sorted(ids) == sorted(event.id for event in events))
        await sandbox.fetch(  # as if its answer had been lost
            "UPDATE firstclaim.stripe_events SET status = 'pending', settled_at = NULL, due_at = clock_timestamp()"
            " WHERE event_id = $1",
            events[0].id,
        )
        row = await eventually(
            lambda: sandbox.row(events[0]), lambda row: row is not None and row.status is Status.COMPLETED
        )
        assert row is not None
        assert row.attempt == 2
        assert len(await receiver.handled()) == 5
    async with receiving(tmp_path, SECRET.replace("A", "B")) as receiver:
        path = targets_file(tmp_path / "targets.toml", {"name": "crm", "url": receiver.url, "types": ["invoice.*"]})
        service = await sandbox.service({**FORWARD, "forward_targets": str(path)}).start()
        event = sample()
        assert (await sandbox.deliver(service, event)).status == 500
        row = await sandbox.row(event)
        assert row is not None
        assert row.last_error == "TargetFailed: crm answered 400: bad signature"
        assert not await receiver.handled()


async def test_a_file_with_faults_does_not_start(sandbox: Sandbox, tmp_path: Path) -> None:
    """`serve` ends with every fault, and without a traceback."""
    path = targets_file(tmp_path / "targets.toml", {"name": "crm"}, {"name": "erp", "url": "x"})
    service = sandbox.service({**FORWARD, "forward_targets": str(path)})
    with pytest.raises(AssertionError):
        await service.start()
    assert "target 1 (crm): url: is missing" in service.output
    assert "target 2 (erp): url: expected http:// or https://" in service.output
    assert "Traceback" not in service.output
