"""Tries several hosts side by side: the first that accepts is used.

Guarantees: a host that is silent (frozen, or behind a network that swallows packets) delays the next one by
`_STAGGER_SECONDS` at most, and each host may take the caller's whole time. A host that fails starts the next one at
once. While another one is silent, a host that has failed is tried again every `_AGAIN_SECONDS`: a standby may be
promoted meanwhile, and its caller may wait for half a minute. Once all have failed, nobody waits any longer.

The driver tries hosts one after the other, with one timeout for all. So the first one that is silent takes all the
time, and no connection is ever opened to the next one.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Protocol, TypeVar


class _Terminable(Protocol):
    def terminate(self) -> None:
        """Close it at once."""


C = TypeVar("C", bound=_Terminable)

# As in RFC 8305. A server in another region answers in less, so that usually one host alone is tried.
_STAGGER_SECONDS = 0.25
_AGAIN_SECONDS = 0.25


async def first_to_accept(
    attempts: Sequence[Callable[[], Awaitable[C]]], failures: dict[int, Exception]
) -> tuple[int, C] | None:
    """The number of the first attempt that succeeds, and its connection; None once each has failed.

    `failures` gets the latest error of each that has failed, also if the caller's time ends meanwhile. All other
    attempts are cancelled, and connections that they have opened are closed.
    """
    failed = [asyncio.Event() for _ in attempts]
    hopeless = asyncio.Event()

    async def persist(number: int) -> tuple[int, C]:
        if number:
            with suppress(TimeoutError):
                async with asyncio.timeout(number * _STAGGER_SECONDS):
                    await failed[number - 1].wait()
        while True:
            try:
                return number, await attempts[number]()
            except Exception as error:  # noqa: BLE001  (the caller decides what each error means)
                failures[number] = error
            failed[number].set()
            if len(failures) == len(attempts):
                hopeless.set()
            await asyncio.sleep(_AGAIN_SECONDS)

    tasks = [asyncio.create_task(persist(number)) for number in range(len(attempts))]
    giving_up = asyncio.create_task(hopeless.wait())
    try:
        await asyncio.wait((*tasks, giving_up), return_when=asyncio.FIRST_COMPLETED)
        winner = next((task for task in tasks if task.done()), None)
        if winner is None:
            return None
        tasks.remove(winner)
        return winner.result()
    finally:
        for task in (*tasks, giving_up):
            task.cancel()
        for task in tasks:
            task.add_done_callback(_close)


def _close(loser: "asyncio.Task[tuple[int, C]]") -> None:
    """Close the connection of an attempt that has succeeded too late."""
    if not loser.cancelled() and loser.exception() is None:
        loser.result()[1].terminate()
