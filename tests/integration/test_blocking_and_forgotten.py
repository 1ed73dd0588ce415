"""Mistakes that Python lets pass: a forgotten `await`, and a handler that blocks the event loop."""

import asyncio
import re
import time
import warnings
from collections.abc import Callable, Coroutine, Iterator, Mapping
from typing import Any

import pytest
from sqlalchemy import text
from structlog.testing import capture_logs

from firstclaim import Context, Event
from firstclaim.inbox import loop_watch
from firstclaim.inbox.loop_watch import LoopWatch
from firstclaim.inbox.unawaited import detected
from firstclaim.outcome import Kind
from firstclaim.status import Status
from tests.integration.test_dispatch import ends, fails
from tests.integration.world import Function, World, effect, effect_from_thread

SECONDS = 20.0


@pytest.fixture(autouse=True)
def detecting() -> Iterator[None]:
    """As the service does while it runs."""
    with detected():
        yield


async def send_mail() -> None:
    """What a handler calls."""


# -- a forgotten await ----------------------------------------------------------------------------------


async def calls(event: Event, context: Context) -> None:
    await effect(event, context)
    send_mail()  # type: ignore[unused-coroutine]


async def keeps(event: Event, context: Context) -> None:
    await effect(event, context)
    _kept = send_mail()


async def fetches(event: Event, context: Context) -> None:
    await effect(event, context)
    context.fetch("SELECT 1")  # type: ignore[unused-coroutine]


async def executes(event: Event, context: Context) -> None:
    await effect(event, context)
    context.connection.execute(text("SELECT 1"))  # type: ignore[unused-coroutine]


async def flushes(event: Event, context: Context) -> None:
    await effect(event, context)
    async with context.session() as session:
        session.flush()  # type: ignore[unused-coroutine]


async def calls_in_a_task(event: Event, context: Context) -> None:
    await effect(event, context)
    async with asyncio.TaskGroup() as group:
        group.create_task(helper())


async def helper() -> None:
    send_mail()  # type: ignore[unused-coroutine]


async def calls_in_a_thread(event: Event, context: Context) -> None:
    await effect(event, context)
    await asyncio.to_thread(drop)


def drop() -> None:
    send_mail()  # type: ignore[unused-coroutine]


def calls_in_a_sync_handler(event: Event, context: Context) -> None:
    effect_from_thread(event, context)
    send_mail()  # type: ignore[unused-coroutine]


def returns(event: Event, context: Context) -> Coroutine[Any, Any, None]:
    effect_from_thread(event, context)
    return send_mail()


async def returns_from_async(event: Event, context: Context) -> Coroutine[Any, Any, None]:
    await effect(event, context)
    return send_mail()


def returns_through_a_lambda() -> Function:
    return lambda event, context: calls(event, context)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (calls, "send_mail"),
        (keeps, "send_mail"),
        (fetches, "HandlerConnection.fetch"),
        (executes, "AsyncConnection.execute"),
        (flushes, "AsyncSession.flush"),
        (calls_in_a_task, "send_mail"),
        (calls_in_a_thread, "send_mail"),
        (calls_in_a_sync_handler, "send_mail"),
        (returns, "send_mail"),
        (returns_from_async, "send_mail"),
        (returns_through_a_lambda(), "calls"),
    ],
)
async def test_a_forgotten_await_is_a_failure(world: World, function: Function, name: str) -> None:
    """Each time, the same line too, and nothing of it is kept: the coroutine's name and what to write are said."""
    for _ in range(2):
        row = await fails(world, function, f"a handler must await what it calls: {name} was never awaited")
        assert "write `await`" in row["last_error"]


async def returns_a_future(event: Event, context: Context) -> Any:
    await effect(event, context)
    return asyncio.get_running_loop().create_future()


async def test_an_awaitable_is_no_action(world: World) -> None:
    """A task or future that is returned would not be waited for."""
    await fails(world, returns_a_future, "Future was never awaited")


async def test_what_is_awaited_is_fine(world: World) -> None:
    """Awaited, gathered, started as a task, or closed: none of these was forgotten."""

    async def function(event: Event, context: Context) -> None:
        await effect(event, context)
        await send_mail()
        await asyncio.gather(send_mail(), send_mail())
        await asyncio.create_task(send_mail())
        send_mail().close()
        await asyncio.wait_for(send_mail(), 1)

    await ends(world, function, Kind.PROCESSED, Status.COMPLETED, effects=1)


async def test_the_handlers_own_error_is_kept(world: World) -> None:
    """A handler that raises has said what is wrong."""

    async def function(event: Event, context: Context) -> None:
        send_mail()  # type: ignore[unused-coroutine]
        raise RuntimeError("boom")

    await fails(world, function, "RuntimeError: boom")


async def test_handlers_do_not_answer_for_each_other(world: World) -> None:
    """Of two that run at once, the one that forgot an await fails, and the other is completed."""
    both = asyncio.Event()

    async def forgets(event: Event, context: Context) -> None:
        both.set()
        await calls(event, context)

    async def careful(event: Event, context: Context) -> None:
        await both.wait()
        await effect(event, context)

    one, other = await world.claim(), await world.claim()
    results = await asyncio.gather(world.dispatch(careful, one), world.dispatch(forgets, other))
    assert [result.kind for result in results] == [Kind.PROCESSED, Kind.FAILED]


def test_other_warnings_are_shown() -> None:
    """What no handler has dropped, and what is no such warning, goes where it went before."""
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        with detected():
            send_mail()  # type: ignore[unused-coroutine]
            warnings.warn("coroutine 'x' was never awaited", UserWarning, stacklevel=1)
    assert [str(each.message) for each in shown] == [
        "coroutine 'send_mail' was never awaited",
        "coroutine 'x' was never awaited",
    ]


# -- a blocked event loop -------------------------------------------------------------------------------


@pytest.fixture
def watched(world: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The log while the test's loop is watched, with a limit that a test can wait for."""
    monkeypatch.setattr(loop_watch, "_LIMIT_SECONDS", 0.2)
    monkeypatch.setattr(loop_watch, "_PERIOD_SECONDS", 0.1)
    with capture_logs() as logged:
        yield logged


def block(seen: Callable[[], bool]) -> None:
    """Block the thread until it is seen, or the test has failed."""
    until = time.monotonic() + SECONDS
    while not seen() and time.monotonic() < until:
        time.sleep(0.01)


def blocked(logged: list[Any]) -> list[Mapping[str, Any]]:
    return [each for each in logged if each["event"] == "event_loop_blocked"]


async def test_a_handler_that_blocks_the_loop_is_named(world: World, watched: list[Any]) -> None:
    """Once, while it still blocks: handler, event and place. Beside it another handler waits, which is not named."""
    started = asyncio.Event()

    async def function(event: Event, context: Context) -> None:
        await effect(event, context)
        started.set()
        block(lambda: bool(blocked(watched)))

    async def patient(event: Event, context: Context) -> None:
        await started.wait()
        await effect(event, context)

    claim = await world.claim()
    with LoopWatch(lambda: world.components.transaction_watch.calls).running():
        await asyncio.gather(world.dispatch(function, claim), world.dispatch(patient, await world.claim()))
    [line] = blocked(watched)
    assert (line["event_id"], line["type"], line["attempt"]) == (claim.event_id, claim.type, 1)
    assert line["handler"].endswith("test_a_handler_that_blocks_the_loop_is_named.<locals>.function")
    assert re.fullmatch(r"tests/integration/test_blocking_and_forgotten\.py:\d+ in block", line["place"])
    assert line["log_level"] == "warning"


async def test_what_blocks_the_loop_beside_handlers_is_named_by_its_place(world: World, watched: list[Any]) -> None:
    """An application that the service is mounted into, say: there is no handler to name."""
    with LoopWatch(lambda: world.components.transaction_watch.calls).running():
        block(lambda: bool(blocked(watched)))
    [line] = blocked(watched)
    assert line.keys() == {"event", "log_level", "place"}
    assert line["place"].endswith(" in block")


async def test_a_thread_blocks_nothing(world: World, watched: list[Any]) -> None:
    """A sync handler may take its time: the loop turns meanwhile."""
    turns = 0

    def function(event: Event, context: Context) -> None:
        effect_from_thread(event, context)
        block(lambda: turns >= 100)

    async def turn() -> None:
        nonlocal turns
        while turns < 100:
            await asyncio.sleep(0.005)
            turns += 1

    with LoopWatch(lambda: world.components.transaction_watch.calls).running():
        await asyncio.gather(world.dispatch(function, await world.claim()), turn())
    assert not blocked(watched)
