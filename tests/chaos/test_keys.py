"""Row 58: many events of one key at two processes, one of which is killed again and again; row 59: a limit of slots."""

import asyncio
import secrets
import time
from collections.abc import Iterable, Sequence
from itertools import count, pairwise

from firstclaim.status import Status
from tests.acceptance.harness import SHORT_LEASE, Overrides, Sample, Service, eventually, sample
from tests.chaos import trace
from tests.chaos.history import TRACED_HANDLERS, History
from tests.chaos.keyed_handlers import KEYED
from tests.chaos.limited_handlers import LIMITED, SLOTS
from tests.chaos.verdict import verdict
from tests.fixtures import event_body

EVENTS = 200
OTHERS = 100
KILLS = 3
AT_ONCE = 20
_PAUSE_SECONDS = 0.05
WITH_LIMITS: Overrides = {
    "handlers": f"{TRACED_HANDLERS},tests.chaos.keyed_handlers,tests.chaos.limited_handlers",
    **SHORT_LEASE,
}


def of(customer: str, type: str = KEYED) -> Sample:  # noqa: A002
    """An event of this customer."""
    event_id = f"evt_{secrets.token_hex(12)}"
    return Sample(event_id, event_body(type, event_id, data={"object": {"metadata": {"customer": customer}}}))


def begin(history: History, services: Sequence[Service], events: Iterable[Sample]) -> list[asyncio.Task[None]]:
    """Deliver them in turn, so many at once as there are connections to read each answer's row on.

    One that gets no answer is delivered again, to the next service, as Stripe does.
    """
    free = asyncio.Semaphore(AT_ONCE)

    async def deliver(event: Sample, first: int) -> None:
        async with free:
            for number in count(first):
                if await history.deliver(services[number % len(services)], event) is not None:
                    return
                await asyncio.sleep(_PAUSE_SECONDS)

    return [asyncio.create_task(deliver(event, number)) for number, event in enumerate(events)]


async def begun(history: History, number: int) -> None:
    """Wait until so many more attempts have begun."""

    async def seen() -> int:
        return len([line for line in trace.read(history.trace) if line.what == trace.START])

    before = await seen()
    await eventually(seen, lambda now: now >= before + number)


async def killed(service: Service) -> dict[int, int]:
    """Kill the service; returns its processes, and when they were dead at the latest."""
    pids = await service.pids()
    await service.kill()
    return dict.fromkeys(pids, time.monotonic_ns())


def runs(history: History, events: Iterable[Sample], killed_at: dict[int, int]) -> list[tuple[int, int]]:
    """When each attempt at these events began and ended, or its process was killed; by the beginning."""
    ids = {event.id for event in events}
    ends = {(line.event_id, line.attempt): line.at for line in trace.read(history.trace) if line.what == trace.END}
    found = [
        (line.at, ends.get((line.event_id, line.attempt), killed_at.get(line.pid, 0)))
        for line in trace.read(history.trace)
        if line.what == trace.START and line.event_id in ids
    ]
    assert all(end > 0 for _, end in found), "each attempt has ended, or its process was killed"
    return sorted(found)


async def test_row_58_one_key_while_a_process_is_killed(history: History) -> None:
    """200 events of a key at two processes, one is killed three times: none overlaps another, each has one effect."""
    services = [await history.service(WITH_LIMITS).start() for _ in range(2)]
    events = [of("cus_1") for _ in range(EVENTS)]
    others = [sample() for _ in range(OTHERS)]
    killed_at: dict[int, int] = {}
    together = [event for pair in zip(events[:OTHERS], others, strict=True) for event in pair] + events[OTHERS:]
    deliveries: list[asyncio.Task[None]] = []
    for number in range(KILLS):  # each kill has a share of the events: however slow a start is, some are left
        deliveries += begin(history, services, together[number::KILLS])
        await begun(history, EVENTS // 10)
        killed_at |= await killed(services[0])
        await services[0].start()
    await asyncio.gather(*deliveries)
    rows = await history.sandbox.all_settled(together)
    assert {row.status for row in rows} == {Status.COMPLETED}
    assert sum(row.failures for row in rows) == 0
    assert sum(row.abandoned for row in rows[:EVENTS]) <= KILLS * 50
    order = runs(history, events, killed_at)
    overlaps = [(one, other) for one, other in pairwise(order) if other[0] < one[1]]
    assert overlaps == []
    await verdict(history)


async def test_row_59_the_slots_of_a_handler_while_its_process_is_killed(history: History) -> None:
    """60 events for two slots of their own, the process is killed: never three at once, each has one effect."""
    service = await history.service(WITH_LIMITS).start()
    events = [of("cus_1", LIMITED) for _ in range(60)]
    deliveries = begin(history, [service], events)
    await begun(history, 10)
    killed_at = await killed(service)
    await service.start()
    await asyncio.gather(*deliveries)
    rows = await history.sandbox.all_settled(events)
    assert sum(row.failures for row in rows) == 0
    assert sum(row.abandoned for row in rows) <= SLOTS + SLOTS // 2, "those that run, and those claimed ahead"
    order = runs(history, events, killed_at)
    for number, (began, _) in enumerate(order):
        assert sum(1 for _, end in order[:number] if end > began) < SLOTS
    await verdict(history)
