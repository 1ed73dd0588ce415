"""Secrets and payload data in every input, through every error path: no output shows them."""

import asyncio
import secrets
from collections.abc import Iterator
from typing import Any

import orjson

from firstclaim.status import Status
from firstclaim.web.webhook import WEBHOOK_PATH
from tests.acceptance import leaking_handlers
from tests.acceptance.harness import Overrides, Sample, Sandbox, Service, eventually
from tests.canaries import (
    CARD,
    EMAIL,
    REDACTED,
    SIGNING_SECRET,
    STORY,
    TEXT,
    assert_silent,
    metadata,
)
from tests.chaos.invalid_requests import CLOSE, HOST, length, request
from tests.chaos.test_protocol import one_answer
from tests.fixtures import event_body, signed
from tests.raw_connection import Reply

LOUD: Overrides = {
    "STRIPE_WEBHOOK_SECRETS": SIGNING_SECRET,
    "handlers": "tests.acceptance.leaking_handlers",
    "log_level": "debug",  # with the messages of all libraries
    "body_timeout_seconds": 1,
    "handler_slots": len(leaking_handlers.ASYNC) + len(leaking_handlers.SYNC),
    "backoff_first_seconds": 600,  # each handler fails once
    "backoff_most_seconds": 600,
}
ASYNC, SYNC = "charge.refunded", "customer.created"


def told(how: str, event_type: str = ASYNC, **changes: Any) -> Sample:
    """An event whose handler puts everything into its error in this way."""
    event_id = f"evt_{secrets.token_hex(12)}"
    changes = {"account": TEXT, "data": {"object": {"metadata": metadata(how=how), "id": TEXT}}, **changes}
    return Sample(event_id, event_body(event_type, event_id, **changes))


async def deliver(service: Service, event: Sample) -> Reply:
    return await one_answer(service, [signed_request(event.body)])


def signed_request(body: bytes) -> bytes:
    return request([HOST, CLOSE, *signed(body, SIGNING_SECRET).items(), length(body)], body)


# -- errors of handlers ------------------------------------------------------------------------------


async def test_what_a_handler_says_stays_in_the_ledger(sandbox: Sandbox) -> None:
    """However it fails: its words are in no log and no answer, and in the ledger without secrets and people."""
    service = await sandbox.service(LOUD).start()
    events = {f"async {how}": told(how) for how in leaking_handlers.ASYNC}
    events |= {f"sync {how}": told(how, SYNC) for how in leaking_handlers.SYNC}
    sandbox.waived |= {event.id for event in events.values()}  # those that work leave no effect here
    replies = dict(
        zip(events, await asyncio.gather(*(deliver(service, each) for each in events.values())), strict=True)
    )
    works = {"async forgotten", "async unhandled", "async logged"}
    for name, reply in replies.items():
        assert_silent(reply.head + reply.body)
        said = orjson.loads(reply.body)
        expected = "handled" if name in works else "dead" if name == "async permanent" else "failed"
        assert said["action"] == expected, name
    for name, event in events.items():
        row = await sandbox.row(event)
        assert row is not None
        assert (row.last_error is None) == (name in works), name
        for canary in REDACTED:
            assert canary not in (row.last_error or ""), (name, canary)
    kept = await sandbox.row(events["async raise"])
    assert kept is not None
    assert (kept.last_error or "").startswith(f"RuntimeError: {TEXT} [redacted] paid with [redacted], [redacted]")
    await eventually(lambda: _said(service, "never retrieved"))
    assert_silent(service.output)


async def _said(service: Service, word: str) -> bool:
    return word in service.output


# -- requests ----------------------------------------------------------------------------------------


def refused_bodies() -> Iterator[bytes]:
    """Events under a good signature with the story in the one thing that makes them none."""
    for field in ("id", "type", "object", "livemode", "created", "data"):
        yield orjson.dumps(orjson.loads(event_body()) | {field: STORY})
        yield orjson.dumps(orjson.loads(event_body()) | {field: [STORY]})
    yield event_body(data={"object": STORY})
    yield STORY.encode()
    yield orjson.dumps([STORY])
    yield event_body(account=STORY).replace(b'"livemode":false', b'"livemode":NaN')
    yield event_body(account=STORY) + b"\xff"
    yield b'{"' + STORY.encode() + b'":' * 5_000


def refused_requests() -> dict[str, bytes]:
    """The story wherever a request has room for it."""
    story, body = STORY.replace(" ", "-"), orjson.dumps(metadata())
    path = f"POST {WEBHOOK_PATH}"
    headers = [("Authorization", f"Bearer {STORY}"), ("Cookie", STORY), ("X-" + TEXT, STORY), ("User-Agent", STORY)]
    several: dict[str, bytes] = {
        "unsigned": request([HOST, CLOSE, *headers, length(body)], body),
        "signature": request([HOST, CLOSE, ("Stripe-Signature", STORY), length(body)], body),
        "digest": request([HOST, CLOSE, ("Stripe-Signature", f"t=1,v1={story}"), length(body)], body),
        "time": request([HOST, CLOSE, ("Stripe-Signature", f"t={CARD},v1=00"), length(body)], body),
        "not ASCII": request([HOST, CLOSE, ("Stripe-Signature", f"t=1,v1={story}\xe9"), length(body)], body),
        "twice": request([HOST, CLOSE, *[("Stripe-Signature", story)] * 2, length(body)], body),
        "path": request([HOST, CLOSE, length(b"")], line=f"POST /{story} HTTP/1.1"),
        "query": request([HOST, CLOSE, length(body)], body, f"{path}?key={story} HTTP/1.1"),
        "host": request([("Host", EMAIL), CLOSE, length(body)], body),
        "absolute form": request([HOST, CLOSE, length(b"")], line=f"POST http://{EMAIL}/{CARD} HTTP/1.1"),
        "method": request([HOST], line=f"{TEXT.upper()} / HTTP/1.1"),
        "path of nonsense": request([("X", "a\0b")], line=f"POST /{story} HTTP/1.1"),
        "version": request([HOST], line=f"{path} HTTP/{CARD}"),
        "length": request([HOST, ("Content-Length", STORY)]),
        "coding": request([HOST, ("Transfer-Encoding", STORY)]),
        "upgrade": request([HOST, ("Connection", "upgrade"), ("Upgrade", story), length(body)], body),
        "expectation": request([HOST, CLOSE, ("Expect", STORY), length(body)], body),
        "chunk": request([HOST, ("Transfer-Encoding", "chunked")], STORY.encode()),
        "extension": request([HOST, CLOSE, ("Transfer-Encoding", "chunked")], f"0;{story}\r\n\r\n".encode()),
        "trailer": request([HOST, CLOSE, ("Transfer-Encoding", "chunked")], f"0\r\nX: {STORY}\r\n\r\n".encode()),
        "no HTTP": STORY.encode() + b"\r\n\r\n",
        "too large a head": request([HOST, ("X", STORY * 500)]),
        "too large a body": request([HOST, CLOSE, length(b"x" * 2_000_000)], (STORY * 10_000).encode()[:2_000_000]),
        "half a body": request([HOST, ("Content-Length", "100000")], STORY.encode()),
    }
    return several | {f"content {number}": signed_request(each) for number, each in enumerate(refused_bodies())}


async def test_what_a_caller_says_is_not_repeated(sandbox: Sandbox) -> None:
    """In its path, query, headers or body, refused or accepted: no answer has it, and no log at any level."""
    service = await sandbox.service(LOUD).start()
    for name, sent in refused_requests().items():
        reply = await one_answer(service, [sent])
        assert 400 <= reply.status < 500, name
        assert_silent(reply.head + reply.body)
    assert await sandbox.rows() == 0
    accepted = told(
        "raise", "payment_intent.succeeded", account=f"{TEXT} {EMAIL}", api_version=STORY[:200], request={"id": STORY}
    )
    for expected in (200, 200):  # the second is a duplicate
        reply = await deliver(service, accepted)
        assert reply.status == expected
        assert_silent(reply.head + reply.body)
    await sandbox.settled(accepted, Status.IGNORED)
    assert_silent((await service.get(f"/readyz?{TEXT}={EMAIL}")).content)
    await service.stop()
    assert service.output.count('"event":"rejected"') > 30
    assert_silent(service.output)
