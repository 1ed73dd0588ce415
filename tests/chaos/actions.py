"""Actions that several rows of the matrix share: deliver, arm a failpoint, read the dispatched attempts, replay."""

import os
import re
import signal
from collections.abc import Sequence
from pathlib import Path

from tests import operator
from tests.acceptance.harness import (
    UNAVAILABLE,
    Answer,
    Overrides,
    Sample,
    Sandbox,
    Service,
    eventually,
    post_at_once,
)
from tests.chaos import trace
from tests.chaos.history import History


async def answered(history: History, service: Service, event: Sample) -> Answer:
    """Deliver the event; there must be an answer."""
    answer = await history.deliver(service, event)
    assert answer is not None, f"{event} was not answered"
    return answer


async def retried(history: History, service: Service, event: Sample) -> Answer:
    """Deliver the event until the answer is not a 503: connections have to be opened again."""
    return await eventually(lambda: answered(history, service, event), lambda answer: answer.result != UNAVAILABLE)


async def deliver_at_once(history: History, posts: Sequence[tuple[Service, Sample]]) -> list[Answer]:
    """Deliver all events at the same moment, and record the answers."""
    answers = await post_at_once([(service.url, event.body) for service, event in posts])
    await history.note_all(posts, answers)
    return answers


def dispatched(history: History, event: Sample) -> list[int]:
    """The attempts that called the event's handler, in order."""
    lines = trace.read(history.trace)
    return [line.attempt for line in lines if (line.what, line.event_id) == (trace.START, event.id)]


async def rounds(service: Service) -> int:
    """The number of successful rounds of recovery."""
    found = re.search(r'recovery_rounds_total\{result="good"\} (\d+)', (await service.get("/metrics")).text)
    assert found
    return int(found[1])


# -- processes that stop themselves -------------------------------------------------------------------


def armed(
    points: str, folder: Path, *, send: signal.Signals = signal.SIGKILL, arrivals: int = 1, times: int = 1
) -> Overrides:
    """Settings of a process that signals itself at one of `points` (see `tests.failpoints`); makes `folder`."""
    folder.mkdir()
    return {
        "TEST_FAILPOINT": points,
        "TEST_FAILPOINT_FOLDER": str(folder),
        "TEST_FAILPOINT_SIGNAL": send.name,
        "TEST_FAILPOINT_ARRIVALS": arrivals,
        "TEST_FAILPOINT_TIMES": times,
    }


async def stopped(service: Service) -> None:
    """Wait until a service without workers has stopped itself."""

    async def seen() -> bool:
        return _has_stopped(service.pid)

    await eventually(seen)


def _has_stopped(pid: int) -> bool:
    child, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
    return child == pid and os.WIFSTOPPED(status)


def resume(service: Service) -> None:
    """Resume it where it stopped."""
    os.kill(service.pid, signal.SIGCONT)


async def killed(service: Service) -> None:
    """Wait until a service without workers has killed itself."""
    assert await service.wait_for_exit() == -signal.SIGKILL


# -- what an operator does ----------------------------------------------------------------------------


async def replay(sandbox: Sandbox, event: Sample) -> None:
    """Make the event due again, as `firstclaim events replay` does."""
    assert await operator.replay(sandbox.database_url, [event.id]) == [event.id]
