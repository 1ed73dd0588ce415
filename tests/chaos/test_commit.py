"""Rows 17 and 18: the connection is cut at a COMMIT, so that the service cannot know whether it was executed.

A proxy in front of Postgres acts at exactly that message: the INSERT, which commits by itself, is the first to
name the event, and the completion's COMMIT is the only one there is.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import pytest

from firstclaim.status import Status
from tests.acceptance.harness import (
    IGNORED,
    PROCESSED,
    SHORT_LEASE,
    UNAVAILABLE,
    Row,
    Sample,
    Service,
    eventually,
    sample,
)
from tests.chaos.actions import answered, dispatched, retried
from tests.chaos.history import History
from tests.chaos.verdict import verdict
from tests.proxy import EXECUTES_COMMIT, Mode, Proxy, before_postgres


@dataclass(slots=True)
class Cut:
    """A service whose connections to Postgres can be cut at a message."""

    history: History
    service: Service
    proxy: Proxy

    def at(self, words: Callable[[bytes], bool], mode: Mode) -> asyncio.Event:
        """Have the proxy change its mode at such a message, before forwarding it; the event is set when it does."""
        met = asyncio.Event()

        def look(sent: bytes) -> None:
            if words(sent) and not met.is_set():
                met.set()
                self.proxy.switch(mode)

        self.proxy.on_sent = look
        return met

    def repair(self) -> None:
        """Cut all connections, and accept new ones again."""
        self.proxy.switch(Mode.REFUSE)
        self.proxy.switch(Mode.OPEN)

    async def seen(self, event: Sample, status: Status) -> Row:
        """Wait until the ledger, read without the proxy, shows that status."""
        row = await eventually(lambda: self.history.sandbox.row(event), lambda row: row and row.status is status)
        assert row is not None
        return row


@pytest.fixture
async def cut(history: History) -> AsyncIterator[Cut]:
    """One service, which takes over abandoned events within a second."""
    async with before_postgres(history.sandbox.database_url) as (proxy, through):
        service = await history.service(SHORT_LEASE | {"DATABASE_URL": through}).start()
        yield Cut(history, service, proxy)
        await service.kill()


async def test_row_17_insert_cut_before_the_server_saw_it(cut: Cut) -> None:
    """The INSERT never arrives: 503 and no row; the retry is processed, on the first attempt."""
    event = sample()
    met = cut.at(lambda sent: event.id.encode() in sent, Mode.REFUSE)
    assert (await answered(cut.history, cut.service, event)).result == UNAVAILABLE
    assert met.is_set()
    assert await cut.history.sandbox.row(event) is None
    cut.repair()
    assert (await retried(cut.history, cut.service, event)).result == PROCESSED
    assert (await cut.history.sandbox.settled(event)).counts == (1, 0, 0)
    await verdict(cut.history)


async def test_row_17_insert_cut_after_the_server_saw_it(cut: Cut) -> None:
    """The INSERT commits, its reply is lost: 503; a retry finds the row owned, and recovery completes it."""
    event = sample()
    met = cut.at(lambda sent: event.id.encode() in sent, Mode.MUTE)
    delivery = asyncio.create_task(answered(cut.history, cut.service, event))
    await met.wait()
    await cut.seen(event, Status.PROCESSING)
    cut.repair()
    assert (await delivery).result == UNAVAILABLE
    assert (await retried(cut.history, cut.service, event)).result in (PROCESSED, IGNORED)
    row = await cut.history.sandbox.settled(event)
    assert row.failures == 0
    assert dispatched(cut.history, event) == [row.attempt]
    await verdict(cut.history)


async def test_row_18_completion_cut_after_the_server_saw_it(cut: Cut) -> None:
    """The COMMIT succeeds, its reply is lost: the guarded update detects that, and the answer is processed."""
    event = sample()
    met = cut.at(lambda sent: EXECUTES_COMMIT in sent, Mode.MUTE)
    delivery = asyncio.create_task(answered(cut.history, cut.service, event))
    await met.wait()
    await cut.seen(event, Status.COMPLETED)
    cut.repair()
    assert (await delivery).result == PROCESSED
    await completed_once(cut, event)


async def test_row_18_completion_cut_and_the_ledger_gone(cut: Cut) -> None:
    """The COMMIT succeeds, then the database goes down: 503; once it is back, the event is completed, not failed."""
    event = sample()
    met = cut.at(lambda sent: EXECUTES_COMMIT in sent, Mode.MUTE)
    delivery = asyncio.create_task(answered(cut.history, cut.service, event))
    await met.wait()
    await cut.seen(event, Status.COMPLETED)
    cut.proxy.switch(Mode.REFUSE)
    assert (await delivery).result == UNAVAILABLE
    cut.repair()
    assert (await retried(cut.history, cut.service, event)).result == IGNORED
    await completed_once(cut, event)


async def completed_once(cut: Cut, event: Sample) -> None:
    """One attempt, one effect, and no failure: failing it was a no-op."""
    assert (await cut.history.sandbox.settled(event)).counts == (1, 0, 0)
    assert dispatched(cut.history, event) == [1]
    await verdict(cut.history)
