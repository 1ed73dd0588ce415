"""The injected clock reaches the connections of a real process."""

from firstclaim.status import Status
from tests.acceptance.harness import FAILED, Sandbox, eventually, sample
from tests.clock import installed

HOUR_SECONDS = 3600.0


async def test_an_hours_backoff_passes_in_a_moment(sandbox: Sandbox) -> None:
    """A service that retries after an hour does so when the database's clock is an hour on."""
    async with installed(sandbox.database_url) as clock:
        service = sandbox.service({"backoff_first_seconds": HOUR_SECONDS, "backoff_most_seconds": HOUR_SECONDS})
        await service.start()
        event = sample("fail", until=1)
        assert (await sandbox.deliver(service, event)).result == FAILED
        row = await sandbox.row(event)
        assert row is not None
        assert (row.status, row.due_in_seconds > HOUR_SECONDS / 4) == (Status.FAILED, True)
        await clock.advance(HOUR_SECONDS)
        await eventually(lambda: sandbox.row(event), lambda row: row is not None and row.attempt == 2)
        assert (await sandbox.settled(event)).counts == (2, 1, 0)
