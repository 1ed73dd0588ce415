"""What a delivery costs the stores, counted on the connections: counts do not depend on the machine."""

import re
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

import pytest

from tests.acceptance.harness import (
    HANDLERS,
    IGNORED,
    PROCESSED,
    Overrides,
    Sandbox,
    Service,
    post,
    post_at_once,
    sample,
)
from tests.chaos.keyed_handlers import KEYED
from tests.chaos.sessions import counted
from tests.fixtures import event_body, signed
from tests.proxy import Tap, before_postgres

# Enough slots that 100 deliveries at once each get a place.
_CALM: Overrides = {"recovery_interval_seconds": 60, "handler_slots": 50}
# Statements that open a connection, recovery's query for due events, the watch over running handlers (once a second),
# the counts of duplicates (every five seconds, for all events together).
_UPKEEP = re.compile(
    r"AS synchronous_commit,|ledger_epoch|pg_control_system|pg_type|'jit'|ORDER BY due_at|SELECT watched\.number|"
    r"stripe_event_duplicates"
)

# Each entry is one round trip.
FRESH = ["insert event", "BEGIN, hold", "handler", "complete, COMMIT"]
_NAMES = {
    "insert event": "INSERT INTO firstclaim.stripe_events",
    "hold": "pg_backend_pid() AS pid",
    "handler": "INSERT INTO effects",
    "complete": "SET status = 'completed'",
    "find": "SELECT event_id, status, attempt FROM firstclaim.stripe_events",
}


@dataclass
class Statements(Tap):
    """Parses a client's Postgres protocol: the statements that it executes, without the upkeep, by round trip."""

    executed: list[str]
    _buffer: bytes = b""
    _started: bool = False
    _prepared: dict[bytes, str] = field(default_factory=dict)
    _bound: str = ""
    _unsent: list[str] = field(default_factory=list)  # until the client waits for the answer

    def sent(self, chunk: bytes) -> None:
        self._buffer += chunk
        for kind, content in self._messages():
            if kind == b"P":
                name, sql, *_ = content.split(b"\0")
                self._prepared[name] = sql.decode()
            elif kind == b"B":
                self._bound = self._prepared[content.split(b"\0")[1]]
            elif kind == b"E":
                self._note(self._bound)
            elif kind == b"Q":
                self._note(content.rstrip(b"\0").decode())
            if kind in b"QS" and self._unsent:  # a simple query, or Sync
                self.executed.append(", ".join(self._unsent))
                self._unsent.clear()

    def _messages(self) -> Iterator[tuple[bytes, bytes]]:
        while len(self._buffer) >= 5:
            named = int(self._started)  # the first messages, which open the connection, have no type byte
            end = named + int.from_bytes(self._buffer[named : named + 4])
            if len(self._buffer) < end:
                return
            message, self._buffer = self._buffer[:end], self._buffer[end:]
            if named:
                yield message[:1], message[5:]
            else:
                self._started = message[4:8] == b"\0\3\0\0"  # it may request TLS first

    def _note(self, sql: str) -> None:
        if not _UPKEEP.search(sql):
            self._unsent.append(next((name for name, part in _NAMES.items() if part in sql), sql.strip(" ;\n")))


@dataclass
class Costs:
    """A service, and its statements and commands to the stores while a block runs."""

    sandbox: Sandbox
    service: Service
    statements: list[str]
    commands: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def counting(self) -> Iterator[None]:
        self.statements.clear()
        with counted(self.sandbox) as self.commands:
            yield


@asynccontextmanager
async def costs(sandbox: Sandbox, workers: int = 1, **more: str) -> AsyncIterator[Costs]:
    """A service with open connections and prepared statements."""
    executed: list[str] = []
    async with before_postgres(sandbox.database_url) as (proxy, database_url):
        proxy.tap = lambda: Statements(executed)
        service = await sandbox.service({**_CALM, "DATABASE_URL": database_url, **more}, workers=workers).start()
        for _ in range(2):
            for answer in await post_at_once([(service.url, sample().body) for _ in range(100)]):
                assert answer.result == PROCESSED
        yield Costs(sandbox, service, executed)
        await service.stop()


async def test_a_fresh_event(sandbox: Sandbox) -> None:
    """Four round trips: one insert, BEGIN with the row's lock, the handler's SQL, mark with COMMIT. Redis: two."""
    async with costs(sandbox) as cost:
        with cost.counting():
            assert (await post(cost.service.url, sample().body)).result == PROCESSED
        assert cost.statements == FRESH
        assert cost.commands == {"cmdstat_set": 2, "cmdstat_eval": 1, "cmdstat_get": 1}  # the script's own among them


async def test_an_event_with_a_key(sandbox: Sandbox) -> None:
    """The key costs no round trip and no command: its lock is tried by the statement that locks the row."""
    async with costs(sandbox, handlers=f"{HANDLERS},tests.chaos.keyed_handlers") as cost:
        body = event_body(KEYED, data={"object": {"metadata": {"customer": "cus_1"}}})
        with cost.counting():
            assert (await post(cost.service.url, body)).processed
        assert cost.statements == FRESH
        assert cost.commands == {"cmdstat_set": 2, "cmdstat_eval": 1, "cmdstat_get": 1}


async def test_fresh_events_share_their_insert(sandbox: Sandbox) -> None:
    """100 at once: each has a transaction of its own, and all of them together a few inserts."""
    async with costs(sandbox) as cost:
        with cost.counting():
            answers = await post_at_once([(cost.service.url, sample().body) for _ in range(100)])
        assert Counter(answer.result for answer in answers) == {PROCESSED: 100}
        found = Counter(cost.statements)
        inserts = found.pop("insert event")
        assert found == dict.fromkeys(FRESH[1:], 100)
        assert inserts <= 20, inserts


async def test_a_duplicate_of_a_completed_event(sandbox: Sandbox) -> None:
    """One command of Redis, no statement of Postgres."""
    async with costs(sandbox) as cost:
        event = sample()
        assert (await post(cost.service.url, event.body)).result == PROCESSED
        with cost.counting():
            for _ in range(20):
                assert (await post(cost.service.url, event.body)).result == IGNORED
        assert (cost.statements, cost.commands) == ([], {"cmdstat_set": 20})


async def test_an_invalid_signature(sandbox: Sandbox) -> None:
    """It costs neither store a command."""
    async with costs(sandbox) as cost:
        event = sample()
        with cost.counting():
            for headers in ({}, signed(event.body, "whsec_other")):
                assert (await post(cost.service.url, event.body, [*headers.items()])).status == 400
        assert (cost.statements, cost.commands) == ([], {})


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_thousand_copies_of_a_new_event(sandbox: Sandbox, workers: int) -> None:
    """All of them at the same moment: one dispatch, statements in single digits and one batch for each worker."""
    async with costs(sandbox, workers) as cost:
        event = sample()
        with cost.counting():
            answers = await post_at_once([(cost.service.url, event.body)] * 1000)
        assert Counter(answer.result for answer in answers) == {PROCESSED: 1, IGNORED: 999}
        assert (await sandbox.settled(event)).counts == (1, 0, 0)
        found = Counter(cost.statements)
        assert {name: found[name] for name in FRESH[1:]} == dict.fromkeys(FRESH[1:], 1)
        assert len(cost.statements) <= 7 + workers, found
