"""Row 55: a type is paused while its events arrive and processes are killed, and resumed."""

import asyncio

from firstclaim.operations import pauses
from firstclaim.operations.commands import Commands
from firstclaim.status import Status
from tests.acceptance.harness import DEFERRED, PROCESSED, Service, eventually, sample
from tests.chaos.actions import dispatched, rounds
from tests.chaos.history import History
from tests.chaos.verdict import verdict
from tests.operator import GIVE_UP_SECONDS, OPERATOR

PAUSED, OTHER = "invoice.payment_failed", "invoice.paid"
EVENTS = 30


async def test_row_55_paused_while_processes_die(history: History) -> None:
    """Events of a paused type arrive, processes are killed: none of them starts; resumed, each has one effect."""
    services = [await history.service().start() for _ in range(2)]
    async with Commands.connect(history.sandbox.database_url, 10) as operations:
        assert await pauses.pause(operations, OPERATOR, PAUSED)
        seen = [await rounds(service) for service in services]
        await eventually(lambda: _rounds(services, seen), lambda done: done)
        events = [sample(type=PAUSED) for _ in range(EVENTS)]
        for number, event in enumerate(events):
            if number == EVENTS // 2:
                await services[0].kill()
                await services[0].start()
            answer = await history.deliver(services[number % 2], event)
            assert answer is not None
            assert answer.result == DEFERRED
        other = sample(type=OTHER)
        answer = await history.deliver(services[0], other)
        assert answer is not None
        assert answer.result == PROCESSED
        assert [dispatched(history, event) for event in events] == [[]] * EVENTS
        assert await history.sandbox.statuses() == {Status.PENDING: EVENTS, Status.COMPLETED: 1}
        assert await pauses.resume(operations, OPERATOR, PAUSED, give_up_seconds=GIVE_UP_SECONDS) == EVENTS
    for row in await history.sandbox.all_settled([*events, other]):
        assert row.counts == (1, 0, 0)
    await verdict(history)


async def _rounds(services: list[Service], before: list[int]) -> bool:
    """Whether each has made two rounds since: the first of them may have begun before."""
    now = await asyncio.gather(*(rounds(service) for service in services))
    return all(later >= earlier + 2 for earlier, later in zip(before, now, strict=True))
