"""The health check of the process itself. The checks of the stores are tested on real stores, in tests/acceptance."""

import asyncio
from typing import cast

from firstclaim.inbox.lock import Lock
from firstclaim.inbox.recovery import Recovery
from firstclaim.inbox.slots import Slots
from firstclaim.postgres.pool import Pool
from firstclaim.shutdown import Shutdown
from firstclaim.web.health import Finding, Health
from firstclaim.web.readiness_checks import readiness_checks


async def test_a_process_that_is_shutting_down_is_not_ready() -> None:
    """From the first signal the process reports itself down while it still serves, so that a balancer can react."""
    shutdown = Shutdown(drain_seconds=60, shutdown_seconds=90)
    process, *_ = readiness_checks(shutdown, cast(Lock, None), cast(Pool, None), cast(Recovery, None), Slots(1))
    assert (await process.run())[0] == Finding(Health.OK)
    shutdown._requested_at = 0.0
    assert (await process.run())[0] == Finding(Health.DOWN, "draining")


async def test_a_thread_past_its_deadline_is_named() -> None:
    """The process still works with its other slots, so it is degraded; the event leads the operator to the handler."""
    slots = Slots(2)
    shutdown = Shutdown(drain_seconds=60, shutdown_seconds=90)
    *_, handlers = readiness_checks(shutdown, cast(Lock, None), cast(Pool, None), cast(Recovery, None), slots)
    assert (await handlers.run())[0] == Finding(Health.OK)
    thread: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    slots.hang("evt_1", thread)
    finding, _ = await handlers.run()
    assert finding == Finding(Health.DEGRADED, "1 of 2 slots are held by threads past their deadline (evt_1): restart")
    thread.set_result(None)
    await asyncio.sleep(0)
    assert (await handlers.run())[0] == Finding(Health.OK)
