"""Row 57: a process is killed while it forwards, and the target does everything that a target can do wrong."""

import asyncio
from pathlib import Path

from firstclaim.status import Status
from tests.acceptance.harness import Overrides, Row, Sample, Sandbox, eventually, post, sample
from tests.chaos.history import History
from tests.forward_target import ENDLESS, FROZEN, OK, SILENT, SLOW_HEAD, ForwardTarget, Received, status, targets_file

EVENTS = 40
TROUBLE = [
    FROZEN,
    SILENT,
    SLOW_HEAD,
    ENDLESS,
    b"\x00garbage\r\n\r\n",
    status(500),
    status(429, b"", "Retry-After: 1\r\n"),
    status(301, b"", "Location: /elsewhere\r\n"),
]


async def test_row_57_killed_while_it_forwards(history: History, tmp_path: Path) -> None:
    """A process dies in its request, the target hangs and sends garbage: each event arrives, under one id, in the end.

    There are no effects in the database to count: what counts is what the target has got.
    """
    sandbox = history.sandbox
    async with ForwardTarget().listening() as target:
        path = targets_file(tmp_path / "targets.toml", {"name": "crm", "url": target.url, "timeout_seconds": 1})
        settings: Overrides = {
            "handlers": "firstclaim.handlers.forward",
            "forward_targets": str(path),
            "lease_seconds": 4,
        }
        services = [await sandbox.service(settings).start() for _ in range(2)]
        target.hold = asyncio.Event()
        first, events = sample(), [sample() for _ in range(EVENTS)]
        sandbox.waived |= {first.id, *(event.id for event in events)}  # their effects are the target's
        lost = asyncio.create_task(post(services[0].url, first.body))
        await eventually(lambda: _arrived(target), lambda number: number == 1)
        await services[0].kill()
        await asyncio.wait({lost})
        assert lost.exception() is not None
        target.hold.set()
        row = await _completed(sandbox, first)
        assert row.action == "forwarded"
        assert row.abandoned >= 1
        assert [each.event_id for each in target.received][:2] == [first.id] * 2
        await services[0].start()
        trouble = TROUBLE * 3

        def respond(_: Received) -> bytes:
            return trouble.pop() if trouble else OK

        target.respond = respond
        answers = await asyncio.gather(
            *(post(services[number % 2].url, event.body) for number, event in enumerate(events))
        )
        assert {answer.status for answer in answers} <= {200, 202, 500}
        rows = [await _completed(sandbox, event) for event in events]
        assert {row.action for row in rows} == {"forwarded"}
        assert not trouble
        assert target.ids == {first.id, *(event.id for event in events)}
        for received in target.received:
            received.check()


async def _completed(sandbox: Sandbox, event: Sample) -> Row:
    row = await eventually(lambda: sandbox.row(event), lambda row: row is not None and row.status is Status.COMPLETED)
    assert row is not None
    return row


async def _arrived(target: ForwardTarget) -> int:
    return len(target.received)
