"""Sends the events of a nemesis run as Stripe would: each one repeatedly until a 2xx, and some of them as duplicates.

Guarantees: `run` ends when every event has been answered with a 2xx. Every answer is recorded in the history. Answers
that no fault explains (a 400, for example) are collected in `unexplained`.
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from tests.acceptance.harness import Answer, Service, StalledDelivery
from tests.chaos.history import History
from tests.chaos.plan import Order

_FIRST_SECONDS: Final = 0.1
_MOST_SECONDS: Final = 2.0
_AT_ONCE_MOST: Final = 100  # events in flight; more of them wait, as in a sender's queue
_EXPLAINED: Final = {200, 202, 408, 500, 503}  # 408: the process was frozen for longer than a body may take

AnswerResult = tuple[int, bool, str]


@dataclass(slots=True)
class Sender:
    """Sends `orders`, in that order, each to one of `services`, a list that may change meanwhile."""

    history: History
    services: Sequence[Service]
    orders: Iterator[Order]
    sent: list[Order] = field(default_factory=list, init=False)
    results: Counter[AnswerResult | None] = field(default_factory=Counter, init=False)
    unexplained: list[tuple[Order, Answer]] = field(default_factory=list, init=False)
    _in_flight: set[asyncio.Task[None]] = field(default_factory=set, init=False)

    async def run(self, stop: asyncio.Event) -> None:
        """Send new events until `stop`, then wait until all of them are accepted."""
        places = asyncio.Semaphore(_AT_ONCE_MOST)
        async with asyncio.TaskGroup() as tasks:
            while not stop.is_set():
                order = next(self.orders)
                with suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), order.pause_seconds)
                await places.acquire()
                self.sent.append(order)
                task = tasks.create_task(self._send(order))
                self._in_flight.add(task)
                task.add_done_callback(self._in_flight.discard)
                task.add_done_callback(lambda _: places.release())

    @property
    def in_flight(self) -> int:
        """The number of events that are being sent, or will be repeated."""
        return len(self._in_flight)

    async def _send(self, order: Order) -> None:
        chance = random.Random(order.seed)
        if order.hangs_up:
            await self._hang_up(order, chance)
        copies = [self._once(order, chance) for _ in range(order.copies - 1)]
        await asyncio.gather(self._until_accepted(order, chance), *copies)
        for seconds in sorted(order.repeats_after_seconds):
            await asyncio.sleep(seconds / len(order.repeats_after_seconds))
            await self._until_accepted(order, chance)

    async def _until_accepted(self, order: Order, chance: random.Random) -> None:
        pause = _FIRST_SECONDS
        while (answer := await self._once(order, chance)) is None or answer.status > 299:
            await asyncio.sleep(pause * chance.uniform(0.5, 1))
            pause = min(2 * pause, _MOST_SECONDS)

    async def _once(self, order: Order, chance: random.Random) -> Answer | None:
        answer = await self.history.deliver(await self._service(chance), order.event)
        if answer and answer.status not in _EXPLAINED:
            self.unexplained.append((order, answer))
        self.results[answer.result if answer else None] += 1
        return answer

    async def _hang_up(self, order: Order, chance: random.Random) -> None:
        service, sent_at = await self._service(chance), time.monotonic_ns()
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout(5):
                client = await StalledDelivery.begin(service.url, order.event.body)
                client.finish()
                await client.hang_up()
        await self.history.note(service, order.event, None, sent_at)
        self.results[None] += 1

    async def _service(self, chance: random.Random) -> Service:
        while not self.services:  # noqa: ASYNC110  (all services are being started)
            await asyncio.sleep(_FIRST_SECONDS)
        return chance.choice(self.services)
