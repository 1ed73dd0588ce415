"""The settings for a large fleet: few connections to Postgres for each process."""

import asyncio

from firstclaim.settings import Settings
from tests.acceptance.harness import DEFERRED, PROCESSED, Sandbox, Service, sample
from tests.blocks import block

MOST = 6
BACKENDS = """
SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'firstclaim'
"""


def small_profile() -> dict[str, str]:
    """The environment variables that the page exports."""
    words = block("docs/explanation/scaling.md", "small profile").split()
    return dict(word.split("=", 1) for word in words if "=" in word)


async def watch(sandbox: Sandbox, service: Service, until: asyncio.Event) -> int:
    """The most backends of the service that were seen at once, while `/metrics` and the probes are read too."""
    seen = 0
    while not until.is_set():
        _, _, [row] = await asyncio.gather(service.get("/metrics"), service.get("/readyz"), sandbox.fetch(BACKENDS))
        seen = max(seen, row[0])
    return seen


async def test_a_process_of_the_small_profile_has_six_connections(sandbox: Sandbox) -> None:
    """Under more deliveries than it has slots for, it has no more than 6 backends, and every event one effect."""
    profile = small_profile()
    values = {name.removeprefix("FIRSTCLAIM_").lower(): value for name, value in profile.items()}
    assert Settings.model_validate(values).postgres_connections == MOST
    service = await sandbox.service({**profile}).start()
    events = [sample() for _ in range(200)]
    sent = asyncio.Event()
    watching = asyncio.create_task(watch(sandbox, service, sent))
    slots = asyncio.Semaphore(20)

    async def deliver(number: int) -> None:
        async with slots:
            assert (await sandbox.deliver(service, events[number])).result in (PROCESSED, DEFERRED)

    try:
        await asyncio.gather(*map(deliver, range(len(events))))
        await sandbox.all_settled(events)
    finally:
        sent.set()
    seen = await watching
    assert 4 <= seen <= MOST  # the slots and the ingest pool are in use, and nothing is opened besides the pools
