"""The health check of the process itself. The checks of the stores are tested on real stores, in tests/acceptance."""

from typing import cast

from firstclaim.inbox.lock import Lock
from firstclaim.inbox.recovery import Recovery
from firstclaim.postgres.pool import Pool
from firstclaim.shutdown import Shutdown
from firstclaim.web.health import Finding, Health
from firstclaim.web.readiness_checks import readiness_checks


async def test_a_process_that_is_shutting_down_is_not_ready() -> None:
    """From the first signal the process reports itself down while it still serves, so that a balancer can react."""
    shutdown = Shutdown(drain_seconds=60, shutdown_seconds=90)
    process, *_ = readiness_checks(shutdown, cast(Lock, None), cast(Pool, None), cast(Recovery, None))
    assert (await process.run())[0] == Finding(Health.OK)
    shutdown._requested_at = 0.0
    assert (await process.run())[0] == Finding(Health.DOWN, "draining")
