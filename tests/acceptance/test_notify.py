"""An operator is told: a real service, and a receiver that gets what went wrong without looking anywhere."""

from collections.abc import AsyncIterator

import pytest

from tests.acceptance.harness import Sandbox, eventually, post, sample
from tests.canaries import STORY, assert_silent
from tests.fixtures import signed
from tests.notice_receiver import NoticeReceiver, receiving_notices, status


@pytest.fixture
async def receiver() -> AsyncIterator[NoticeReceiver]:
    """Where notices go."""
    async with receiving_notices() as receiver:
        yield receiver


async def test_a_dead_event_and_a_rolled_secret_are_told(sandbox: Sandbox, receiver: NoticeReceiver) -> None:
    """Both within a minute, once, from two workers; the address and the payload are in no line and no notice."""
    receiver.answers = [status(503)]  # it is away at first
    service = await sandbox.service({"notify_url": receiver.url}, workers=2).start()
    events = [sample("permanent", story=STORY) for _ in range(3)]
    for event in events:
        assert (await sandbox.deliver(service, event)).content["action"] == "dead"
    for _ in range(12):
        body = sample().body
        refused = await post(service.url, body, [*signed(body, "whsec_rolled").items()])
        assert refused.status == 400

    async def kinds() -> dict[str, dict[str, object]]:
        return {each["kind"]: each for each in receiver.notices}

    told = await eventually(kinds, lambda told: {"event_dead", "signatures_refused"} <= told.keys(), 60)
    assert told["event_dead"]["handler"] == "tests.acceptance.handlers.act"
    assert told["event_dead"]["example_id"] in [event.id for event in events]
    assert told["signatures_refused"]["reason"] == "signature_mismatch"
    assert "notify_failed" in service.output
    assert "c4n4rypath" not in service.output
    assert_silent(str(receiver.notices) + str(receiver.requests))
