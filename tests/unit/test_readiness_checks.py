"""What `/readyz` asks of the process itself; the stores' own probes are asked on real ones, in acceptance."""

from typing import cast

from firstclaim.inbox.lock import Lock
from firstclaim.inbox.recovery import Recovery
from firstclaim.postgres.connection import Pool
from firstclaim.shutdown import Stop
from firstclaim.web.health import Finding, Health
from firstclaim.web.readiness_checks import readiness_checks


async def test_a_process_that_was_asked_to_stop_is_not_ready() -> None:
    """From the first signal on it says so, while it still serves: a balancer needs the time to look elsewhere."""
    stop = Stop(drain_seconds=60, shutdown_seconds=90)
    process, *_ = readiness_checks(stop, cast(Lock, None), cast(Pool, None), cast(Recovery, None))
    assert (await process.ask())[0] == Finding(Health.OK)
    stop._asked_at = 0.0
    assert (await process.ask())[0] == Finding(Health.DOWN, "draining")
