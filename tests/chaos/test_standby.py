"""Row 43: a failover to a synchronous standby, after the waits of COMMITs for it were cut short.

A COMMIT that waits for the standby is already on the primary's disk: when its backend is terminated, or its wait is
cancelled, the row becomes visible without being replicated. Whatever rests on such a row is lost by the failover.
"""

import asyncio

import pytest

from tests.acceptance.harness import PROCESSED, UNAVAILABLE, Sample, Service, eventually, sample
from tests.chaos.actions import answered, retried
from tests.chaos.history import History
from tests.chaos.own import Own
from tests.chaos.servers import PostgresServer, Servers
from tests.chaos.verdict import verdict
from tests.proxy import Mode, Upstream, before_postgres

pytestmark = pytest.mark.timeout(600)

FAILOVERS = 5
EVENTS = 3
WAITING = "application_name = 'firstclaim' AND wait_event = 'SyncRep'"


async def test_row_43_failed_over_while_commits_waited(own: Own, servers: Servers) -> None:
    """Backends killed and waits cancelled while the standby hangs: a retry is not acknowledged; five failovers.

    The server is set to keep warnings back: the one of a cancelled wait must be sent nevertheless.
    """
    history, primary, standby = own.history, own.postgres, await servers.postgres()
    await primary.configure(client_min_messages="error")
    async with before_postgres(primary.url) as (address, through):  # the address that a failover moves
        service = await history.service({"DATABASE_URL": through, "postgres_timeout_seconds": 1.5}).start()
        for _ in range(FAILOVERS):
            events = [sample() for _ in range(2 * EVENTS)]
            async with before_postgres(primary.url) as (link, _):
                await standby.follow(primary, port=link.port)
                await primary.configure(synchronous_standby_names="standby")
                assert (await retried(history, service, sample())).result == PROCESSED
                link.switch(Mode.FROZEN)
                await cut_short(history, service, primary, events[:EVENTS], "pg_terminate_backend")
                await cut_short(history, service, primary, events[EVENTS:], "pg_cancel_backend")
                visible = [event for event in events if await history.sandbox.row(event)]
                assert visible, "the fault had no effect: no row is visible before it is replicated"
                for answer in await at_once(history, service, visible):
                    assert answer == UNAVAILABLE, "acknowledged, and not replicated"
                with history.postgres_unreachable():
                    await primary.kill()
            await standby.promote()
            history.sandbox.database_url = standby.url
            address.upstream = Upstream("", 0, str(standby.socket))
            address.cut()
            assert not [event for event in events if await history.sandbox.row(event)], "the link lost nothing"
            for event in events:
                assert (await retried(history, service, event)).result == PROCESSED
            primary, standby = standby, primary
        await verdict(history)


async def cut_short(
    history: History, service: Service, primary: PostgresServer, events: list[Sample], end: str
) -> None:
    """Deliver the events, and end the waits of their COMMITs, so that the rows are visible and not replicated."""
    deliveries = asyncio.create_task(at_once(history, service, events))
    await eventually(lambda: primary.execute(f"SELECT {end}(pid) FROM pg_stat_activity WHERE {WAITING}"))
    assert set(await deliveries) == {UNAVAILABLE}
    await primary.execute(f"SELECT {end}(pid) FROM pg_stat_activity WHERE {WAITING}")


async def at_once(history: History, service: Service, events: list[Sample]) -> list[tuple[int, bool, str]]:
    """The results of delivering them at the same moment."""
    answers = await asyncio.gather(*(answered(history, service, event) for event in events))
    return [answer.result for answer in answers]
