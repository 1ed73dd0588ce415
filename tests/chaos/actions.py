"""What several rows of the matrix do: deliver, fire at once, arm a process, see who was dispatched, replay."""

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
    """Deliver it; there must be an answer."""
    answer = await history.deliver(service, event)
    assert answer is not None, f"{event} was not answered"
    return answer


async def retried(history: History, service: Service, event: Sample) -> Answer:
    """The first answer that is not 503: connections are made anew."""
    return await eventually(lambda: answered(history, service, event), lambda answer: answer.result != UNAVAILABLE)


async def fire(history: History, posts: Sequence[tuple[Service, Sample]]) -> list[Answer]:
    """Deliver all of them at the same moment, and note what came back."""
    answers = await post_at_once([(service.url, event.body) for service, event in posts])
    await history.note_all(posts, answers)
    return answers


def dispatched(history: History, event: Sample) -> list[int]:
    """The attempts on which the event's handler was called, in that order."""
    lines = trace.read(history.trace)
    return [line.attempt for line in lines if (line.what, line.event_id) == (trace.START, event.id)]


async def rounds(service: Service) -> int:
    """How many good ones recovery has had."""
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
    """Let it go on where it stopped."""
    os.kill(service.pid, signal.SIGCONT)


async def killed(service: Service) -> None:
    """Wait until a service without workers has killed itself."""
    assert await service.wait_for_exit() == -signal.SIGKILL


# -- what an operator does ----------------------------------------------------------------------------


async def replay(sandbox: Sandbox, event: Sample) -> None:
    """It is due again, as after the command."""
    assert await operator.replay(sandbox.database_url, [event.id]) == [event.id]
