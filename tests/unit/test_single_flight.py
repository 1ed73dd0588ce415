"""Concurrent deliveries of one event in a process, without stores: what the followers of the first one are told."""

import asyncio
from typing import Any

import pytest

from firstclaim.errors import LedgerUnavailable
from firstclaim.inbox.single_flight import SingleFlight


async def test_a_follower_that_hangs_up_disturbs_no_other() -> None:
    """Of three followers one is cancelled: the others get the result, and so does one that comes after it."""
    flight = SingleFlight[str]().begin("evt_1")
    followers = [asyncio.create_task(flight.follow(60)) for _ in range(3)]
    await asyncio.sleep(0)
    followers[1].cancel()
    flight.announce("recorded")
    first, cancelled, last = await asyncio.gather(*followers, return_exceptions=True)
    assert (first, last) == ("recorded", "recorded")
    assert isinstance(cancelled, asyncio.CancelledError)
    assert await flight.follow(0) == "recorded"


async def test_each_follower_waits_for_its_own_time() -> None:
    """One whose time is over leaves, and the others wait on; a result that comes later is theirs."""
    flight = SingleFlight[str]().begin("evt_1")
    patient = asyncio.create_task(flight.follow(60))
    with pytest.raises(TimeoutError):
        await flight.follow(0)
    flight.end("recorded")
    assert await patient == "recorded"


async def test_a_failure_is_every_followers() -> None:
    """The first one fails: each follower that still waits is told so."""
    flight = SingleFlight[str]().begin("evt_1")
    followers = [asyncio.create_task(flight.follow(60)) for _ in range(2)]
    with pytest.raises(TimeoutError):
        await flight.follow(0)
    flight.fail(OSError("lost"))
    told = await asyncio.gather(*followers, return_exceptions=True)
    assert [type(each) for each in told] == [LedgerUnavailable] * 2


async def test_a_follower_leaves_no_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A follower's timer ends with its wait: a burst of copies would leave one for each on the event loop."""
    loop, timers = asyncio.get_running_loop(), list[asyncio.TimerHandle]()
    call_later = loop.call_later

    def noted(*arguments: Any) -> asyncio.TimerHandle:
        timers.append(call_later(*arguments))
        return timers[-1]

    monkeypatch.setattr(loop, "call_later", noted)
    flight = SingleFlight[str]().begin("evt_1")
    follower = asyncio.create_task(flight.follow(60))
    await asyncio.sleep(0)
    flight.end("recorded")
    await follower
    assert [timer.cancelled() for timer in timers] == [True]
