"""Real `serve` processes, driven over HTTP and observed from outside.

Guarantees:
- A `Service` ends no process that it did not start, and leaves none behind.
- `Sandbox.deliver` checks every answer against the ledger as soon as it arrives (invariants I1 and I6).
- Results are read from the stores directly, never through a proxy or the service itself.
- Every wait is a poll with a deadline, and its failure shows the value that was seen last.
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

from firstclaim.status import Status
from firstclaim.web.webhook import WEBHOOK_PATH
from tests.fixtures import SECRET, event_body, signed
from tests.stores import Stores, clone, drop, redis_client

REPOSITORY: Final = Path(__file__).parents[2]
# For a process that must import this checkout, which may be a copy, and not the installed package.
PYTHON_PATH: Final = os.pathsep.join((str(REPOSITORY / "service"), str(REPOSITORY)))
HANDLERS: Final = "tests.acceptance.handlers,tests.failpoints"

# Two to ten times what a busy machine with two cores needed. A wait ends as soon as its condition holds.
START_SECONDS: Final = 60.0
SETTLE_SECONDS: Final = 30.0
_POLL_SECONDS: Final = 0.02
_CLIENT_SECONDS: Final = 60.0  # the test judges an answer that hangs: the client must not end it before

Overrides = dict[str, str | float]

# Retries and recovery follow at once. The lease and the answer budget stay long: a test of something else must
# not run into them because the machine is busy.
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

# An abandoned claim is detected within a second.
SHORT_LEASE: Final[Overrides] = {"lease_seconds": 1, "lock_ttl_seconds": 1}

T = TypeVar("T")


async def eventually(
    look: Callable[[], Awaitable[T]], until: Callable[[T], object] = bool, seconds: float = SETTLE_SECONDS
) -> T:
    """Call `look` until its result satisfies `until`, and return that. Fails with the result that was seen last."""
    deadline = time.monotonic() + seconds
    while not until(seen := await look()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s; seen last: {seen!r}"
        await asyncio.sleep(_POLL_SECONDS)
    return seen


# -- events and answers -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sample:
    """One event that a test has made up."""

    id: str
    body: bytes = field(repr=False)


def sample(
    behaviour: str = "plain",
    type: str = "invoice.payment_failed",  # noqa: A002
    *,
    livemode: bool = False,
    **metadata: str | float,
) -> Sample:
    """A new event whose handler behaves as `behaviour` says (see `tests.acceptance.handlers`)."""
    instructions = {"behaviour": behaviour, **metadata}
    changes: dict[str, Any] = {"livemode": livemode}
    if not type.startswith("v1."):  # a thin event carries no data
        changes["data"] = {"object": {"metadata": instructions}}
    event_id = f"evt_{secrets.token_hex(12)}"
    return Sample(event_id, event_body(type, event_id, **changes))


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer of the webhook endpoint."""

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
    """The reason in the answer to a duplicate that found the lock, the marker or a claimed row."""
    return f"Event {event_id} handled by parallel worker (idempotency lock)"


async def post(url: str, body: bytes, headers: Sequence[tuple[str, str]] | None = None) -> Answer:
    """POST on a new connection; signed with the service's secret unless headers are given."""
    began = time.monotonic()
    chosen = signed(body).items() if headers is None else headers
    encoded = [(name.encode(), value.encode("latin-1")) for name, value in chosen]
    async with _client() as client:
        response = await client.post(url, content=body, headers=encoded)
    return Answer(response.status_code, orjson.loads(response.content), response.headers, time.monotonic() - began)


async def raw_request(url: str, request: bytes) -> Answer:
    """Send exactly these bytes; the answer must close the connection."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    writer.write(request)
    return await _receive(reader, writer, time.monotonic())


async def post_at_once(posts: Sequence[tuple[str, bytes]]) -> list[Answer]:
    """POST each body to its URL at the same moment: all connections are open and have sent all but the last byte."""
    streams = await asyncio.gather(*(_send_all_but_one_byte(url, body) for url, body in posts))
    began = time.monotonic()
    for (_, writer), (_, body) in zip(streams, posts, strict=True):
        writer.write(body[-1:])
    return list(await asyncio.gather(*(_receive(reader, writer, began) for reader, writer in streams)))


Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def _send_all_but_one_byte(url: str, body: bytes) -> Streams:
    """A connection that has sent the whole request but the last byte of its body."""
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
    """A delivery on a raw connection that has sent all but its last byte."""

    _reader: asyncio.StreamReader
    _writer: asyncio.StreamWriter
    _last_byte: bytes

    @classmethod
    async def begin(cls, url: str, body: bytes) -> "StalledDelivery":
        reader, writer = await _send_all_but_one_byte(url, body)
        return cls(reader, writer, body[-1:])

    def finish(self) -> None:
        """Send the last byte."""
        self._writer.write(self._last_byte)

    async def answer(self) -> Answer:
        """The answer, once the service has closed the connection."""
        return await _receive(self._reader, self._writer, time.monotonic())

    async def hang_up(self) -> None:
        """Close the connection without waiting for an answer."""
        await self._writer.drain()
        self._writer.transport.abort()


def _client() -> httpx.AsyncClient:
    # No proxy from the environment on the way to this machine. Plain HTTP needs no certificates to be loaded.
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
        """Stays the same through every restart."""
        return self._output.stem

    @property
    def url(self) -> str:
        """The URL of the webhook endpoint."""
        return f"{self._origin}{WEBHOOK_PATH}"

    @property
    def port(self) -> int:
        """The port that it listens on; each start takes another free one."""
        port = urlsplit(self._origin).port
        assert port is not None
        return port

    @property
    def pid(self) -> int:
        """The pid of the process that was started: with workers, the supervisor."""
        assert self._process is not None
        return self._process.pid

    @property
    def output(self) -> str:
        """Everything that it has written since it was last started."""
        with self._output.open(errors="replace") as file:
            file.seek(self._began_at)
            return file.read()

    @property
    def tail(self) -> str:
        """The last lines that it has written, of any start."""
        lines = self._output.read_text(errors="replace").splitlines() if self._output.exists() else []
        return "\n".join([f"--- {self._output.name}, the last of {len(lines)} lines:", *lines[-60:]])

    async def start(self) -> "Service":
        """Start, and wait until `/readyz` answers 200. Fails with the output if the process ends before that."""
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
        """The HTTP status of `/readyz`, and the status of each component."""
        response = await self.get("/readyz")
        lines = [orjson.loads(line) for line in response.content.splitlines()]
        return response.status_code, {line["part"]: line["status"] for line in lines}

    async def pids(self) -> list[int]:
        """The pids of the live processes in its process group."""
        return _alive_in_group(self.pid)

    def terminate(self, number: signal.Signals = signal.SIGTERM) -> None:
        """SIGTERM, or another signal, to the process that was started, as an orchestrator sends it."""
        assert self._process is not None
        self._process.send_signal(number)

    def kill_supervisor(self) -> None:
        """SIGKILL to the process that was started, but not to its workers."""
        assert self._process is not None
        self._process.kill()

    async def wait_for_exit(self, seconds: float = SETTLE_SECONDS) -> int:
        """Wait for the end of the process that was started; returns its exit code (minus the signal's number)."""
        process = self._process
        assert process is not None

        async def code() -> int | None:
            return process.poll()

        ended = await eventually(code, lambda code: code is not None, seconds)
        assert ended is not None
        return ended

    async def stop(self, seconds: float = SETTLE_SECONDS) -> int:
        """SIGTERM; returns the exit code once all of its processes have ended."""
        self.terminate()
        code = await self.wait_for_exit(seconds)
        await eventually(self.pids, lambda members: not members, seconds)
        return code

    async def kill(self) -> None:
        """kill -9 to all of its processes at once."""
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
            # The service takes a free port and prints it. A port chosen here could be taken by another process first.
            if (printed := re.search(r"POST (http://127\.0\.0\.1:\d+)/", self.output)) is None:
                return False
            self._origin = printed[1]
        if self.output.count("Application startup complete") < self._workers:
            return False  # the other workers may not be ready yet
        with suppress(httpx.TransportError):
            return (await self.get("/readyz")).status_code == 200
        return False


def _alive_in_group(group: int) -> list[int]:
    """Without zombies: in a container, nobody may ever reap an orphaned one."""
    if sys.platform != "linux":
        table = subprocess.check_output(["/bin/ps", "-axo", "pid=,pgid=,stat="], text=True)
        rows = [row.split() for row in table.splitlines()]
        return [int(pid) for pid, pgid, state in rows if int(pgid) == group and state[0] != "Z"]
    found = []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(OSError):  # it ended meanwhile
            state, _, pgid = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:3]
            if int(pgid) == group and state not in "ZX":
                found.append(int(pid))
    return found


# -- the sandbox of a test ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Row:
    """The ledger's row of an event."""

    status: Status
    attempt: int
    failures: int
    abandoned: int
    action: str | None
    last_error: str | None
    due_in_seconds: float = field(compare=False)

    @classmethod
    def of(cls, record: asyncpg.Record) -> "Row":
        """From a result of `ROW`."""
        return cls(**{**record, "status": Status(record["status"])})

    @property
    def counts(self) -> tuple[int, int, int]:
        """Attempt, failures, abandoned."""
        return self.attempt, self.failures, self.abandoned


ROW: Final = """
SELECT status, attempt, failures, abandoned, action, last_error,
       extract(epoch FROM due_at - clock_timestamp())::float8 AS due_in_seconds
  FROM firstclaim.stripe_events WHERE event_id = $1
"""

# One statement reads the status and the effects in one snapshot, whatever else is running.
_BROKEN = """
SELECT coalesce(e.event_id, f.event_id) AS event_id, e.status, coalesce(f.effects, 0) AS effects
  FROM firstclaim.stripe_events e
  FULL JOIN (SELECT event_id, count(*) AS effects FROM effects GROUP BY event_id) f USING (event_id)
 WHERE coalesce(f.effects, 0) <> CASE WHEN e.status = 'completed' THEN 1 ELSE 0 END
"""


@dataclass(slots=True)
class Sandbox:
    """A database and a Redis key prefix for one test, and every service that it has started on them."""

    database_url: str
    redis_url: str
    redis_prefix: str
    folder: Path
    waived: set[str] = field(default_factory=set)  # events for which I2 does not hold: their handler broke its rule
    _services: list[Service] = field(default_factory=list)

    @classmethod
    async def prepare(cls, stores: Stores, folder: Path) -> "Sandbox":
        """With a fresh clone of the template database."""
        return cls(await clone(stores), stores.redis_url, f"test:{secrets.token_hex(6)}:", folder)

    async def close(self) -> None:
        """Kill the services, check that effects and completions agree for every row, and remove all data."""
        await self.end_services()
        try:
            broken = await self.fetch(_BROKEN)
            assert [dict(row) for row in broken if row["event_id"] not in self.waived] == []
        finally:
            self.empty_redis()
            await drop(self.database_url)

    async def end_services(self) -> None:
        """Kill the services, and print the end of their output: pytest shows it if the test failed."""
        await asyncio.gather(*(service.kill() for service in self._services))
        for service in self._services:
            print(service.tail)

    def service(self, overrides: Overrides | None = None, *options: str, workers: int = 1) -> Service:
        """A service on this sandbox, not started yet. `overrides` are settings by the name of their field.

        A name in capitals is an environment variable (`TEST_FAILPOINT`). `options` are those of `serve` (`--migrate`).
        """
        service = Service(self.folder, self.environment(overrides), workers, *options)
        self._services.append(service)
        return service

    def environment(self, overrides: Overrides | None = None) -> dict[str, str]:
        """The environment of a service on this sandbox; see `service`."""
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": PYTHON_PATH}
        environment |= {"DATABASE_URL": self.database_url, "REDIS_URL": self.redis_url}
        environment["STRIPE_WEBHOOK_SECRETS"] = SECRET
        chosen = {"handlers": HANDLERS, "redis_prefix": self.redis_prefix, **QUICK, **(overrides or {})}
        for name, value in chosen.items():
            environment[name if name.isupper() else f"FIRSTCLAIM_{name.upper()}"] = str(value)
        return environment

    # -- deliveries -----------------------------------------------------------------------------------

    async def deliver(self, service: Service, event: Sample) -> Answer:
        """POST it, and check at once that the answer is true."""
        answer = await post(service.url, event.body)
        await self.check_answer(event, answer)
        return answer

    async def check_answer(self, event: Sample, answer: Answer) -> None:
        """I1: a 2xx has a row. I6: after `processed: true` it is completed or ignored. An error names no event."""
        if answer.status >= 400:
            assert answer.content["event_id"] is None
            assert not answer.processed
            return
        assert answer.content["event_id"] == event.id
        row = await self.row(event)
        assert row is not None, f"{answer} and there is no row"
        if answer.processed:
            assert row.status in (Status.COMPLETED, Status.IGNORED), (answer, row)

    # -- the ledger -----------------------------------------------------------------------------------

    async def row(self, event: Sample) -> Row | None:
        """The event's current row."""
        found = await self.fetch(ROW, event.id)
        return Row.of(found[0]) if found else None

    async def effects(self, event: Sample) -> int:
        """The number of committed effects of the event."""
        counted: int = (await self.fetch("SELECT count(*) FROM effects WHERE event_id = $1", event.id))[0][0]
        return counted

    async def settled(self, event: Sample, status: Status = Status.COMPLETED) -> Row:
        """Wait until the event has `status`, and check its effects: one if it is completed, else none."""
        row = await eventually(lambda: self.row(event), lambda row: row is not None and row.status is status)
        assert row is not None
        assert await self.effects(event) == (1 if status is Status.COMPLETED else 0)
        return row

    async def all_settled(self, events: Iterable[Sample]) -> list[Row]:
        """`settled` for each of several events."""
        return [await self.settled(event) for event in events]

    async def rows(self) -> int:
        """The number of events in the ledger."""
        counted: int = (await self.fetch("SELECT count(*) FROM firstclaim.stripe_events"))[0][0]
        return counted

    async def statuses(self) -> Counter[Status]:
        """The number of events of each status."""
        found = await self.fetch("SELECT status, count(*) FROM firstclaim.stripe_events GROUP BY status")
        return Counter({Status(status): count for status, count in found})

    async def fetch(self, query: str, *arguments: object) -> list[asyncpg.Record]:
        """The rows of a query in this database."""
        async with self._connection() as connection:
            return await connection.fetch(query, *arguments)

    async def execute(self, script: str) -> None:
        """Run several statements in this database."""
        async with self._connection() as connection:
            await connection.execute(script)

    @asynccontextmanager
    async def locked(self, event: Sample) -> AsyncIterator[None]:
        """Another transaction holds the row's lock while the block runs."""
        async with self._connection() as connection, connection.transaction():
            await connection.execute("SELECT FROM firstclaim.stripe_events WHERE event_id = $1 FOR UPDATE", event.id)
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
        """The value of the event's key in Redis."""
        with redis_client(self.redis_url) as client:
            value = client.get(self.redis_prefix + event.id)
        assert value is None or isinstance(value, bytes)
        return value

    async def put(self, event: Sample, value: str, ttl_seconds: float | None = None) -> None:
        """Set the event's key in Redis to `value`; an empty value makes it a key of another type."""
        with redis_client(self.redis_url) as client:
            key = self.redis_prefix + event.id
            if value:
                client.set(key, value, px=None if ttl_seconds is None else round(ttl_seconds * 1000))
            else:
                client.hset(key, "another", "type")

    def empty_redis(self) -> int:
        """Delete every key of this sandbox; returns their number."""
        with redis_client(self.redis_url) as client:
            keys = list(client.scan_iter(f"{self.redis_prefix}*", count=1000))
            return sum(client.delete(key) for key in keys)


async def recovery_has_passed(sandbox: Sandbox, service: Service) -> None:
    """Wait until recovery has completed an event that fails from now on: it has also seen everything older."""
    later = sample("fail", until=1)
    assert (await sandbox.deliver(service, later)).result == FAILED
    await sandbox.settled(later)
