"""Real `serve` processes, driven over HTTP and watched from outside.

Guarantees: a `Service` ends no process that it did not start, and leaves none behind; what `Sandbox.deliver`
returns was honest (it asks the ledger the moment an answer is in: invariants I1 and I6 of faults.md); what
happened is read from the stores directly, never through a proxy or the service itself; every wait is a poll
with a deadline that says what it saw last.
"""

import asyncio
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

import asyncpg
import httpx
import orjson
import redis

from firstclaim.status import Status
from firstclaim.web.webhook import WEBHOOK_PATH
from tests.fixtures import SECRET, event_body, signed
from tests.stores import Stores, clone, drop

REPOSITORY: Final = Path(__file__).parents[2]
# For a process that must import this checkout, which may be a copy, and not what is installed.
PYTHON_PATH: Final = os.pathsep.join((str(REPOSITORY / "service"), str(REPOSITORY)))
HANDLERS: Final = "tests.acceptance.handlers,tests.failpoints"

# Twice to ten times what a busy two-core machine was seen to need: waits end when the thing happens.
START_SECONDS: Final = 60.0
SETTLE_SECONDS: Final = 30.0
_POLL_SECONDS: Final = 0.02
_CLIENT_SECONDS: Final = 60.0  # a hanging answer is for the test to judge, never for the client to cut short

Overrides = dict[str, str | float]

# Everything due comes at once. The lease and the answer budget stay long: a test that is about neither must
# not meet them because the machine was busy.
QUICK: Final[Overrides] = {
    "lock_ttl_seconds": 2,
    "lease_seconds": 10,
    "handler_deadline_seconds": 20,
    "idle_in_transaction_seconds": 25,
    "answer_budget_seconds": 15,
    "backoff_first_seconds": 0.2,
    "backoff_most_seconds": 0.4,
    "recovery_interval_seconds": 0.1,
    "postgres_timeout_seconds": 5,
    "redis_timeout_seconds": 1,
    "redis_breaker_seconds": 0.2,
    "shutdown_seconds": 15,
    "log_level": "info",
}

# A vanished holder is noticed within a second.
SHORT_LEASE: Final[Overrides] = {"lease_seconds": 1, "lock_ttl_seconds": 1}

T = TypeVar("T")


async def eventually(
    look: Callable[[], Awaitable[T]], until: Callable[[T], object] = bool, seconds: float = SETTLE_SECONDS
) -> T:
    """Look again and again until what is seen is so; returns it. Fails with what was seen last."""
    deadline = time.monotonic() + seconds
    while not until(seen := await look()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s; seen last: {seen!r}"
        await asyncio.sleep(_POLL_SECONDS)
    return seen


# -- what is sent, what comes back --------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sample:
    """One event of the test's own."""

    id: str
    body: bytes = field(repr=False)


def sample(
    behaviour: str = "plain",
    type: str = "invoice.payment_failed",  # noqa: A002
    *,
    livemode: bool = False,
    **metadata: str | float,
) -> Sample:
    """A fresh event whose handler behaves as told (see `tests.acceptance.handlers`)."""
    wish = {"behaviour": behaviour, **metadata}
    changes: dict[str, Any] = {"livemode": livemode}
    if not type.startswith("v1."):  # a thin event carries no data
        changes["data"] = {"object": {"metadata": wish}}
    event_id = f"evt_{secrets.token_hex(12)}"
    return Sample(event_id, event_body(type, event_id, **changes))


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer of the webhook's path."""

    status: int
    content: dict[str, Any]
    headers: httpx.Headers = field(repr=False)
    seconds: float

    def __post_init__(self) -> None:
        assert list(self.content) == ["event_id", "processed", "action", "reason"], self.content

    @property
    def processed(self) -> bool:
        return bool(self.content["processed"])

    @property
    def result(self) -> tuple[int, bool, str]:
        """Status, processed, action."""
        return self.status, self.processed, self.content["action"]

    @property
    def reason(self) -> str | None:
        reason: str | None = self.content["reason"]
        return reason


PROCESSED: Final = (200, True, "effect_recorded")
IGNORED: Final = (200, False, "ignored")
UNHANDLED: Final = (200, True, "ignored")
DEFERRED: Final = (202, False, "deferred")
FAILED: Final = (500, False, "failed")
DEAD: Final = (200, False, "dead")
UNAVAILABLE: Final = (503, False, "unavailable")
REJECTED: Final = (400, False, "rejected")


def parallel_reason(event_id: str) -> str:
    """What a duplicate is told that met the lock, its marker or an owned row."""
    return f"Event {event_id} handled by parallel worker (idempotency lock)"


async def post(url: str, body: bytes, headers: Sequence[tuple[str, str]] | None = None) -> Answer:
    """POST on a connection of its own; signed with the service's secret unless headers are given."""
    began = time.monotonic()
    chosen = signed(body).items() if headers is None else headers
    encoded = [(name.encode(), value.encode("latin-1")) for name, value in chosen]
    async with _client() as client:
        response = await client.post(url, content=body, headers=encoded)
    return Answer(response.status_code, orjson.loads(response.content), response.headers, time.monotonic() - began)


async def raw_request(url: str, request: bytes) -> Answer:
    """Send these very bytes; the answer must close the connection."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    writer.write(request)
    return await _receive(reader, writer, time.monotonic())


async def post_at_once(posts: Sequence[tuple[str, bytes]]) -> list[Answer]:
    """POST each body to its URL at the same moment: every connection stands, and lacks only its last byte."""
    lines = await asyncio.gather(*(_aim(url, body) for url, body in posts))
    began = time.monotonic()
    for (_, writer), (_, body) in zip(lines, posts, strict=True):
        writer.write(body[-1:])
    return list(await asyncio.gather(*(_receive(reader, writer, began) for reader, writer in lines)))


Line = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def _aim(url: str, body: bytes) -> Line:
    """A connection on which all of the request but its body's last byte was sent."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    headers = {**signed(body), "Host": parts.netloc, "Content-Length": str(len(body)), "Connection": "close"}
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    writer.write(f"POST {parts.path} HTTP/1.1\r\n{head}\r\n".encode() + body[:-1])
    await writer.drain()
    return reader, writer


async def _receive(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, began: float) -> Answer:
    async with asyncio.timeout(_CLIENT_SECONDS):
        head, _, content = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()
    status, *lines = head.decode().split("\r\n")
    headers = httpx.Headers([(name, value) for name, _, value in (line.partition(": ") for line in lines)])
    return Answer(int(status.split(" ")[1]), orjson.loads(content), headers, time.monotonic() - began)


@dataclass(slots=True)
class StalledDelivery:
    """A delivery whose last byte is held back, on a raw connection."""

    _reader: asyncio.StreamReader
    _writer: asyncio.StreamWriter
    _last_byte: bytes

    @classmethod
    async def begin(cls, url: str, body: bytes) -> "StalledDelivery":
        reader, writer = await _aim(url, body)
        return cls(reader, writer, body[-1:])

    def finish(self) -> None:
        """Send the last byte."""
        self._writer.write(self._last_byte)

    async def answer(self) -> Answer:
        """What came back, once the service has closed the connection."""
        return await _receive(self._reader, self._writer, time.monotonic())

    async def hang_up(self) -> None:
        """Leave without waiting for an answer."""
        await self._writer.drain()
        self._writer.transport.abort()


def _client() -> httpx.AsyncClient:
    # No proxy of the environment's between us and this machine; no certificates to load for plain HTTP.
    return httpx.AsyncClient(trust_env=False, verify=False, timeout=_CLIENT_SECONDS)  # noqa: S501


# -- a service ----------------------------------------------------------------------------------------


class Service:
    """One `firstclaim serve`, its supervisor and workers in a process group of their own."""

    def __init__(self, folder: Path, environment: dict[str, str], workers: int, *options: str) -> None:
        self._output = folder / f"serve-{secrets.token_hex(4)}.log"
        self._environment = environment
        self._workers = workers
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        self._began_at = 0
        self._origin = ""

    @property
    def name(self) -> str:
        """The same through every restart."""
        return self._output.stem

    @property
    def url(self) -> str:
        """Where events go."""
        return f"{self._origin}{WEBHOOK_PATH}"

    @property
    def port(self) -> int:
        """The port it listens on; another after each start, because it takes a free one."""
        port = urlsplit(self._origin).port
        assert port is not None
        return port

    @property
    def pid(self) -> int:
        """Of the process that was started: the supervisor, if there are workers."""
        assert self._process is not None
        return self._process.pid

    @property
    def output(self) -> str:
        """What it said since it was last started."""
        with self._output.open(errors="replace") as file:
            file.seek(self._began_at)
            return file.read()

    @property
    def tail(self) -> str:
        """The last lines that it ever wrote."""
        lines = self._output.read_text(errors="replace").splitlines() if self._output.exists() else []
        return "\n".join([f"--- {self._output.name}, the last of {len(lines)} lines:", *lines[-60:]])

    async def start(self) -> "Service":
        """Start, and wait until `/readyz` says 200; fails with the output if the process ends instead."""
        self._spawn()
        deadline = time.monotonic() + START_SECONDS
        while not await self._is_ready():
            assert self._process is not None
            assert self._process.poll() is None, f"serve ended with {self._process.poll()}:\n{self.output}"
            assert time.monotonic() < deadline, f"not ready after {START_SECONDS:g} s:\n{self.output}"
            await asyncio.sleep(_POLL_SECONDS)
        return self

    async def get(self, path: str) -> httpx.Response:
        """GET a path of the service."""
        return await self.request("GET", path)

    async def request(self, method: str, path: str, body: bytes = b"") -> httpx.Response:
        """Any request; a redirect is not followed."""
        async with _client() as client:
            headers = signed(body) if body else {}
            return await client.request(method, self._origin + path, content=body, headers=headers)

    async def components(self) -> tuple[int, dict[str, str]]:
        """The status of `/readyz`, and each part's."""
        response = await self.get("/readyz")
        lines = [orjson.loads(line) for line in response.content.splitlines()]
        return response.status_code, {line["part"]: line["status"] for line in lines}

    async def pids(self) -> list[int]:
        """The pids of its process group that are alive."""
        return _alive_in_group(self.pid)

    def terminate(self) -> None:
        """SIGTERM to the process that was started, as an orchestrator sends it."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)

    def kill_supervisor(self) -> None:
        """SIGKILL to the process that was started, and to none of its workers."""
        assert self._process is not None
        self._process.kill()

    async def wait_for_exit(self, seconds: float = SETTLE_SECONDS) -> int:
        """Wait for the end of the process that was started; returns its exit code (negative: the signal)."""
        process = self._process
        assert process is not None

        async def code() -> int | None:
            return process.poll()

        ended = await eventually(code, lambda code: code is not None, seconds)
        assert ended is not None
        return ended

    async def stop(self, seconds: float = SETTLE_SECONDS) -> int:
        """SIGTERM, then the exit code once every process of it has left."""
        self.terminate()
        code = await self.wait_for_exit(seconds)
        await eventually(self.pids, lambda members: not members, seconds)
        return code

    async def kill(self) -> None:
        """kill -9 to all of it at once."""
        if self._process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await self.wait_for_exit()
        await eventually(self.pids, lambda members: not members)

    def _spawn(self) -> None:
        self._origin = ""
        with self._output.open("ab") as output:
            self._began_at = output.tell()
            arguments = ["-m", "firstclaim", "serve", "--port", "0", "--workers", str(self._workers), *self._options]
            self._process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=REPOSITORY,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    async def _is_ready(self) -> bool:
        if not self._origin:
            # It takes a free port and says which: nobody can take one that we had picked in between.
            if (said := re.search(r"POST (http://127\.0\.0\.1:\d+)/", self.output)) is None:
                return False
            self._origin = said[1]
        if self.output.count("Application startup complete") < self._workers:
            return False  # one worker's readiness is not the others'
        with suppress(httpx.TransportError):
            return (await self.get("/readyz")).status_code == 200
        return False


def _alive_in_group(group: int) -> list[int]:
    """Zombies are not: in a container nobody may ever reap an adopted one."""
    if sys.platform != "linux":
        table = subprocess.check_output(["/bin/ps", "-axo", "pid=,pgid=,stat="], text=True)
        rows = [row.split() for row in table.splitlines()]
        return [int(pid) for pid, pgid, state in rows if int(pgid) == group and state[0] != "Z"]
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it ended meanwhile
            state, _, pgid = path.read_text().rpartition(")")[2].split()[:3]
            if int(pgid) == group and state not in "ZX":
                found.append(int(path.parent.name))
    return found


# -- the sandbox of a test ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Row:
    """What the ledger says of an event."""

    status: Status
    attempt: int
    failures: int
    abandoned: int
    action: str | None
    last_error: str | None
    due_in_seconds: float = field(compare=False)

    @classmethod
    def of(cls, record: asyncpg.Record) -> "Row":
        """As `ROW` found it."""
        return cls(**{**record, "status": Status(record["status"])})

    @property
    def counts(self) -> tuple[int, int, int]:
        """Attempt, failures, abandoned."""
        return self.attempt, self.failures, self.abandoned


ROW: Final = """
SELECT status, attempt, failures, abandoned, action, last_error,
       extract(epoch FROM due_at - clock_timestamp())::float8 AS due_in_seconds
  FROM stripe_events WHERE event_id = $1
"""

# One statement sees the mark and the effects of one moment, whatever runs.
_BROKEN = """
SELECT coalesce(e.event_id, f.event_id) AS event_id, e.status, coalesce(f.effects, 0) AS effects
  FROM stripe_events e
  FULL JOIN (SELECT event_id, count(*) AS effects FROM effects GROUP BY event_id) f USING (event_id)
 WHERE coalesce(f.effects, 0) <> CASE WHEN e.status = 'completed' THEN 1 ELSE 0 END
"""


@dataclass(slots=True)
class Sandbox:
    """A database and a Redis key prefix of a test's own, and every service it started on them."""

    database_url: str
    redis_url: str
    redis_prefix: str
    folder: Path
    waived: set[str] = field(default_factory=set)  # events whose handler broke the rule that keeps I2
    _services: list[Service] = field(default_factory=list)

    @classmethod
    async def prepare(cls, stores: Stores, folder: Path) -> "Sandbox":
        """On a fresh clone of the template database."""
        return cls(await clone(stores), stores.redis_url, f"test:{secrets.token_hex(6)}:", folder)

    async def close(self) -> None:
        """Kill what runs, check that effects and completions agree to the last row, take everything away."""
        await self.end_services()
        try:
            broken = await self.fetch(_BROKEN)
            assert [dict(row) for row in broken if row["event_id"] not in self.waived] == []
        finally:
            self.empty_redis()
            await drop(self.database_url)

    async def end_services(self) -> None:
        """Kill what runs, and print what it wrote last: pytest shows it where a test failed."""
        await asyncio.gather(*(service.kill() for service in self._services))
        for service in self._services:
            print(service.tail)

    def service(self, overrides: Overrides | None = None, *options: str, workers: int = 1) -> Service:
        """A service on this sandbox, not started yet; `overrides` are settings by their field's name.

        A name in capitals is a variable of its own (`TEST_FAILPOINT`); `options` are the command's (`--migrate`).
        """
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": PYTHON_PATH}
        environment |= {"DATABASE_URL": self.database_url, "REDIS_URL": self.redis_url}
        environment["STRIPE_WEBHOOK_SECRETS"] = SECRET
        chosen = {"handlers": HANDLERS, "redis_prefix": self.redis_prefix, **QUICK, **(overrides or {})}
        for name, value in chosen.items():
            environment[name if name.isupper() else f"FIRSTCLAIM_{name.upper()}"] = str(value)
        service = Service(self.folder, environment, workers, *options)
        self._services.append(service)
        return service

    # -- deliveries -----------------------------------------------------------------------------------

    async def deliver(self, service: Service, event: Sample) -> Answer:
        """POST it, and check at once that the answer was honest."""
        answer = await post(service.url, event.body)
        await self.check_honest(event, answer)
        return answer

    async def check_honest(self, event: Sample, answer: Answer) -> None:
        """I1: a 2xx has a row. I6: `processed: true` is completed or ignored. An error names no event."""
        if answer.status >= 400:
            assert answer.content["event_id"] is None
            assert not answer.processed
            return
        assert answer.content["event_id"] == event.id
        row = await self.row(event)
        assert row is not None, f"{answer} and there is no row"
        if answer.processed:
            assert row.status in (Status.COMPLETED, Status.IGNORED), (answer, row)

    # -- what became of them --------------------------------------------------------------------------

    async def row(self, event: Sample) -> Row | None:
        """The event's row as it is now."""
        found = await self.fetch(ROW, event.id)
        return Row.of(found[0]) if found else None

    async def effects(self, event: Sample) -> int:
        """How many effects of the event are committed."""
        counted: int = (await self.fetch("SELECT count(*) FROM effects WHERE event_id = $1", event.id))[0][0]
        return counted

    async def settled(self, event: Sample, status: Status = Status.COMPLETED) -> Row:
        """Wait until the event has `status`, and check its effects: one if completed, else none."""
        row = await eventually(lambda: self.row(event), lambda row: row is not None and row.status is status)
        assert row is not None
        assert await self.effects(event) == (1 if status is Status.COMPLETED else 0)
        return row

    async def all_settled(self, events: Iterable[Sample]) -> list[Row]:
        """`settled` for each of several events."""
        return [await self.settled(event) for event in events]

    async def rows(self) -> int:
        """How many events the ledger holds."""
        counted: int = (await self.fetch("SELECT count(*) FROM stripe_events"))[0][0]
        return counted

    async def statuses(self) -> Counter[Status]:
        """How many events there are of each status."""
        found = await self.fetch("SELECT status, count(*) FROM stripe_events GROUP BY status")
        return Counter({Status(status): count for status, count in found})

    async def fetch(self, query: str, *arguments: object) -> list[asyncpg.Record]:
        """The rows of a query in this database."""
        async with self._connection() as connection:
            return await connection.fetch(query, *arguments)

    async def execute(self, script: str) -> None:
        """Run some statements in this database."""
        async with self._connection() as connection:
            await connection.execute(script)

    @asynccontextmanager
    async def locked(self, event: Sample) -> AsyncIterator[None]:
        """Another transaction holds the row while the block runs."""
        async with self._connection() as connection, connection.transaction():
            await connection.execute("SELECT FROM stripe_events WHERE event_id = $1 FOR UPDATE", event.id)
            yield

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[asyncpg.Connection]:
        connection = await asyncpg.connect(self.database_url, timeout=SETTLE_SECONDS)
        try:
            yield connection
        finally:
            await connection.close()

    # -- Redis ----------------------------------------------------------------------------------------

    async def key(self, event: Sample) -> bytes | None:
        """What Redis holds for the event."""
        with redis.Redis.from_url(self.redis_url) as client:
            value = client.get(self.redis_prefix + event.id)
        assert value is None or isinstance(value, bytes)
        return value

    async def put(self, event: Sample, value: str, ttl_seconds: float | None = None) -> None:
        """Have Redis hold `value` for the event; an empty one stands for a key of another type."""
        with redis.Redis.from_url(self.redis_url) as client:
            key = self.redis_prefix + event.id
            if value:
                client.set(key, value, px=None if ttl_seconds is None else round(ttl_seconds * 1000))
            else:
                client.hset(key, "another", "type")

    def empty_redis(self) -> int:
        """Delete every key of this sandbox; returns how many there were."""
        with redis.Redis.from_url(self.redis_url) as client:
            keys = list(client.scan_iter(f"{self.redis_prefix}*", count=1000))
            return sum(client.delete(key) for key in keys)


async def recovery_has_passed(sandbox: Sandbox, service: Service) -> None:
    """Prove it by an event that came later than now, failed, and was completed by recovery."""
    later = sample("fail", until=1)
    assert (await sandbox.deliver(service, later)).result == FAILED
    await sandbox.settled(later)
