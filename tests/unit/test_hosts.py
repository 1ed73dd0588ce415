"""Several hosts of Postgres: which is tried when, what a silent one costs, and what is left of the losers."""

import asyncio
from collections.abc import Awaitable, Callable

import asyncpg
import pytest

from firstclaim.errors import LedgerRefused
from firstclaim.postgres import connect as connect_module
from firstclaim.postgres import hosts
from firstclaim.postgres.hosts import first_to_accept

SILENT = None
SECONDS = 5.0


class Connection:
    """One that knows whether it was closed."""

    def __init__(self) -> None:
        self.closed = False

    def terminate(self) -> None:
        self.closed = True


class Host:
    """A host: each attempt gets the next of its `answers`, and the last one again and again."""

    def __init__(self, *answers: Connection | Exception | None) -> None:
        self._answers = list(answers)
        self.attempts = 0
        self.cancelled = False

    async def __call__(self) -> Connection:
        self.attempts += 1
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if answer is SILENT:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                self.cancelled = True
                raise
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, Connection)
        return answer


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pauses are milliseconds, in the same proportion."""
    monkeypatch.setattr(hosts, "_STAGGER_SECONDS", 0.004)
    monkeypatch.setattr(hosts, "_AGAIN_SECONDS", 0.004)


async def first(*tried: Callable[[], Awaitable[Connection]]) -> tuple[int, Connection] | None:
    async with asyncio.timeout(SECONDS):
        return await first_to_accept(tried, {})


async def test_the_first_host_alone_is_tried() -> None:
    """While the first host answers quickly, the others are not bothered."""
    good, other = Host(found := Connection()), Host(Connection())
    assert await first(good, other) == (0, found)
    assert other.attempts == 0


async def test_a_silent_host_hides_no_other() -> None:
    """Behind two silent hosts the third is used, and the attempts at the others are cancelled."""
    silent = Host(SILENT), Host(SILENT)
    assert await first(*silent, Host(found := Connection())) == (2, found)
    await asyncio.sleep(0)
    assert [each.cancelled for each in silent] == [True, True]


async def test_a_host_that_fails_starts_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next host does not wait for its turn when the one before it has failed."""
    monkeypatch.setattr(hosts, "_STAGGER_SECONDS", 60)
    assert await first(Host(OSError()), Host(OSError()), Host(found := Connection())) == (2, found)


async def test_all_have_failed() -> None:
    """Nobody waits when there is nothing to wait for; the failures are reported."""
    failures: dict[int, Exception] = {}
    errors = OSError("one"), OSError("two")
    assert await first_to_accept([Host(error) for error in errors], failures) is None
    assert failures == dict(enumerate(errors))


async def test_a_standby_that_is_promoted_beside_a_silent_primary() -> None:
    """A host that has refused is tried again while another is silent: it may have become the primary."""
    standby = Host(OSError(), OSError(), found := Connection())
    assert await first(Host(SILENT), standby) == (1, found)
    assert standby.attempts == 3


async def test_the_time_of_the_caller_ends() -> None:
    """When the caller's time is over, its failures are known, and nothing goes on."""
    failures: dict[int, Exception] = {}
    silent, standby = Host(SILENT), Host(error := OSError())
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await first_to_accept([silent, standby], failures)
    assert failures == {1: error}
    seen = standby.attempts
    await asyncio.sleep(0.02)
    assert (silent.cancelled, standby.attempts) == (True, seen)


async def test_a_connection_that_comes_too_late_is_closed() -> None:
    """Two hosts accept at the same moment: one connection is used, the other one is closed."""
    gate = asyncio.Event()
    connections = Connection(), Connection()

    def host(connection: Connection) -> Callable[[], Awaitable[Connection]]:
        async def attempt() -> Connection:
            await gate.wait()
            return connection

        return attempt

    racing = asyncio.create_task(first(*map(host, connections)))
    await asyncio.sleep(0.02)  # both have begun
    gate.set()
    won = await racing
    await asyncio.sleep(0)
    assert won == (0, connections[0])
    assert [each.closed for each in connections] == [False, True]


async def test_the_last_good_host_is_tried_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a failover each new connection begins with the new primary, also if it is the last in the address."""
    tried: list[str] = []
    primary = ""

    async def to(_address: object, _ways: object, options: dict[str, object]) -> Connection:
        tried.append(str(options["host"]))
        if options["host"] != primary:
            raise asyncpg.TargetServerAttributeNotMatched("said")
        return Connection()

    monkeypatch.setattr(connect_module, "_connect_to", to)
    monkeypatch.setattr(connect_module, "_last_good", {})
    for now, expected in (("h2", ["h1", "h2"]), ("h2", ["h2"]), ("h1", ["h2", "h1"]), ("h1", ["h1"])):
        primary = now
        tried.clear()
        await connect_module.connect("postgresql://u:p@h1,h2/db", SECONDS, asyncpg.Connection)
        assert tried == expected


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        (
            {"h1": OSError(), "h2": asyncpg.TargetServerAttributeNotMatched("said")},
            asyncpg.TargetServerAttributeNotMatched,
        ),
        ({"h1": OSError(), "h2": asyncpg.CannotConnectNowError("said")}, OSError),
        ({"h1": OSError(), "h2": asyncpg.InvalidPasswordError("said")}, LedgerRefused),
        ({"h1": SILENT, "h2": asyncpg.InvalidPasswordError("said")}, LedgerRefused),
        ({"h1": SILENT, "h2": asyncpg.TargetServerAttributeNotMatched("said")}, TimeoutError),
    ],
)
async def test_what_is_said_of_hosts_that_have_all_failed(
    monkeypatch: pytest.MonkeyPatch, answers: dict[str, Exception | None], said: type[Exception]
) -> None:
    """A refusal counts most, then a host that is silent, then that none is the primary."""

    async def to(_address: object, _ways: object, options: dict[str, object]) -> Connection:
        return await Host(answers[str(options["host"])])()

    monkeypatch.setattr(connect_module, "_connect_to", to)
    monkeypatch.setattr(connect_module, "_last_good", {})
    seconds = 0.25 if SILENT in answers.values() else SECONDS
    with pytest.raises(said):
        await connect_module.connect("postgresql://u:p@h1,h2/db?sslmode=disable", seconds, asyncpg.Connection)
