"""BEGIN with the first statement, and the last statement with COMMIT, in one round trip each, on a real server.

What is shown here is how the server and the driver behave, on which an attempt rests: a COMMIT is executed only if the
statement before it succeeded.
"""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from asyncpg.prepared_stmt import PreparedStatement

from firstclaim.errors import LedgerUnavailable
from firstclaim.postgres import one_round_trip
from firstclaim.postgres.connection import PinnedConnection, open_connection
from firstclaim.postgres.joined_writes import JoinedWrites
from firstclaim.postgres.one_round_trip import NotCommitted
from tests.integration.world import until
from tests.proxy import EXECUTES_COMMIT, Mode, Tap, before_postgres

TIMEOUT_SECONDS = 10.0
SYNC = b"S\0\0\0\4"
INSERT = "INSERT INTO story VALUES ($1)"
# As the completion mark does: an error in the server if it changes nothing.
MARK = """
WITH marked AS (UPDATE story SET line = $2 WHERE line = $1 RETURNING 1)
SELECT FROM (SELECT count(*) AS number FROM marked) AS counted
 WHERE CASE number WHEN 1 THEN false ELSE CAST('it fits ' || number || ' rows' AS bool) END
"""
TABLE = """
CREATE TABLE story (line text UNIQUE);
CREATE TABLE word (line text REFERENCES story (line) DEFERRABLE INITIALLY DEFERRED);
"""


@pytest.fixture
async def admin(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    """The test's own connection to the database, where there is a table of stories."""
    connection = await asyncpg.connect(database_url)
    await connection.execute(TABLE)
    yield connection
    await connection.close()


@pytest.fixture
async def connection(database_url: str, admin: asyncpg.Connection) -> AsyncIterator[PinnedConnection]:
    """A connection of the service's."""
    async with opened(database_url) as connection:
        yield connection


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[PinnedConnection]:
    connection = await open_connection(url, TIMEOUT_SECONDS)
    try:
        yield connection
    finally:
        connection.terminate()


async def told(connection: PinnedConnection, line: str) -> None:
    """A transaction that has inserted a line, which nobody else sees yet."""
    await connection.begin("SELECT 1", ())
    await connection.execute(INSERT, line)


async def lines(admin: asyncpg.Connection) -> list[str]:
    return [row["line"] for row in await admin.fetch("SELECT line FROM story ORDER BY line")]


async def shows(admin: asyncpg.Connection, committed: list[str]) -> bool:
    return await lines(admin) == committed


async def refused(connection: PinnedConnection, last: str, *values: object) -> Exception:
    """The reason why the transaction is not committed."""
    with pytest.raises(NotCommitted) as caught:
        await connection.commit(last, values)
    return caught.value.reason


# -- what it is for -----------------------------------------------------------------------------------


async def test_two_statements_are_one_round_trip(database_url: str, admin: asyncpg.Connection) -> None:
    """The client waits once for BEGIN and the first statement, and once for the last statement and COMMIT."""
    syncs = 0

    class Counting(Tap):
        def sent(self, chunk: bytes) -> None:
            nonlocal syncs
            syncs += chunk.count(SYNC)

    async with before_postgres(database_url) as (proxy, url):
        proxy.tap = Counting
        async with opened(url) as connection:
            for line in ("first", "second"):
                syncs = 0
                assert await connection.begin("SELECT $1::text AS said, pg_current_xact_id()::text", ["hello"])
                assert connection.is_in_transaction()
                await connection.commit("INSERT INTO story VALUES ($1)", [line])
                assert not connection.is_in_transaction()
    assert syncs == 2
    assert await lines(admin) == ["first", "second"]


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("text", ""),
        ("text", "'); DROP TABLE story; --"),
        ("text", 'quoted "twice" \\ and \\\\ $1 {a,b}'),
        ("text", "Zürich 東京 \U0001f9fe\n\t"),
        ("text", None),
        ("int", -7),
        ("bigint", 2**62),
        ("float8", 0.1),
        ("bool", True),
        ("text[]", ["", "NULL", 'a "b" \\ {c},d', "é", None]),
        ("text[]", []),
        ("int[]", [3, -1, None]),
        ("bool[]", (True, False)),
    ],
    ids=repr,
)
async def test_values_are_bound(connection: PinnedConnection, kind: str, value: object) -> None:
    """Each value arrives as it is, whatever it looks like: none is part of the SQL."""
    await connection.execute(f"CREATE TEMPORARY TABLE kept (value {kind})")
    await connection.begin("SELECT 1", ())
    await connection.commit("INSERT INTO kept VALUES ($1)", [value])
    kept = await connection.fetchval("SELECT value FROM kept")
    assert kept == (list(value) if isinstance(value, tuple) else value)


async def test_a_value_that_cannot_be_bound_is_refused(connection: PinnedConnection) -> None:
    """Before anything is sent: the transaction is open, and can be rolled back."""
    await connection.begin("SELECT 1", ())
    assert isinstance(await refused(connection, INSERT, object()), TypeError)
    await connection.execute("ROLLBACK")


async def test_the_rows_of_the_first_statement(connection: PinnedConnection) -> None:
    """They are decoded as those of any statement, also if there is none of them."""
    [row] = await connection.begin("SELECT $1::int AS one, now() AS two, NULL AS three", [1])
    assert (row["one"], row["two"].tzinfo is not None, row["three"]) == (1, True, None)
    await connection.execute("ROLLBACK")
    assert await connection.begin("SELECT 1 WHERE $1::bool", [False]) == []
    assert connection.is_in_transaction()


# -- COMMIT is not executed ---------------------------------------------------------------------------


async def test_a_last_statement_that_fails_is_not_committed_over(
    connection: PinnedConnection, admin: asyncpg.Connection
) -> None:
    """The server skips the COMMIT behind it: the transaction is open still, and its effects are rolled back."""
    await told(connection, "effect")
    assert isinstance(await refused(connection, MARK, "missing", "x"), asyncpg.InvalidTextRepresentationError)
    assert connection.is_in_transaction()
    await connection.execute("ROLLBACK")
    await told(connection, "another")
    await connection.commit(MARK, ["another", "marked"])
    assert await lines(admin) == ["marked"]


async def test_an_aborted_transaction_is_not_committed(connection: PinnedConnection, admin: asyncpg.Connection) -> None:
    """An SQL error that was swallowed: COMMIT alone would answer ROLLBACK, and no driver raises for that."""
    await told(connection, "effect")
    with pytest.raises(asyncpg.DivisionByZeroError):
        await connection.execute("SELECT 1/0")
    assert isinstance(await refused(connection, INSERT, "mark"), asyncpg.InFailedSQLTransactionError)
    assert await lines(admin) == []


async def test_the_answer_rollback_is_no_success(
    connection: PinnedConnection, admin: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command tag is read: were the last statement to get lost, COMMIT would answer ROLLBACK, without an error."""
    await told(connection, "before")
    await connection.commit(INSERT, ["mark"])  # prepared from now on
    await told(connection, "effect")
    with pytest.raises(asyncpg.DivisionByZeroError):
        await connection.execute("SELECT 1/0")
    with monkeypatch.context() as patch:
        patch.setattr(one_round_trip, "_call", lambda *_: b"")
        reason = await refused(connection, INSERT, "another mark")
    assert isinstance(reason, asyncpg.InFailedSQLTransactionError)
    assert "ROLLBACK" in str(reason)
    assert connection.is_closed(), "nobody takes it for a transaction that the handler has ended"
    assert await lines(admin) == ["before", "mark"]


async def test_a_round_trip_is_one_write(connection: PinnedConnection, admin: asyncpg.Connection) -> None:
    """The server is not woken by BEGIN before the first statement is there, nor by the mark before COMMIT."""
    await told(connection, "before")
    await connection.commit(INSERT, ["first"])  # prepared from now on
    transport, written = connection._transport, list[bytes]()
    write = transport._write

    def noted(data: bytes) -> None:
        written.append(bytes(data))
        write(data)

    transport._write = noted
    await connection.begin("SELECT 1", ())
    await connection.commit(INSERT, ["mark"])
    assert [data.count(SYNC) for data in written] == [1, 1]
    assert b"firstclaim_begin" in written[0]
    assert b"firstclaim_commit" in written[1]
    assert await lines(admin) == ["before", "first", "mark"]


async def test_a_transaction_that_was_not_begun_is_an_error(
    connection: PinnedConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were BEGIN to get lost, the handler's statements would be committed one by one: it does not start."""
    monkeypatch.setattr(one_round_trip, "_call", lambda *_: b"")
    with pytest.raises(asyncpg.InternalClientError, match="no transaction"):
        await connection.begin("SELECT 1", ())


@pytest.mark.parametrize("own", ["COMMIT", "ROLLBACK"])
async def test_outside_of_a_transaction_nothing_is_sent(
    connection: PinnedConnection, admin: asyncpg.Connection, own: str
) -> None:
    """A handler has ended its transaction: the last statement would be committed by itself."""
    await told(connection, "effect")
    await connection.execute(own)
    assert isinstance(await refused(connection, INSERT, "mark"), asyncpg.NoActiveSQLTransactionError)
    assert await lines(admin) == (["effect"] if own == "COMMIT" else [])


@pytest.mark.parametrize("own", ["SELECT pg_sleep(0.1)", "COMMIT"])
async def test_beside_another_statement_nothing_is_sent(
    connection: PinnedConnection, admin: asyncpg.Connection, own: str
) -> None:
    """One that a handler left running: the mark is not sent, neither then nor with the next statement."""
    await told(connection, "before")
    await connection.commit(INSERT, ["mark"])  # prepared from now on
    await told(connection, "effect")
    running = asyncio.create_task(connection.execute(own))
    await asyncio.sleep(0)
    assert isinstance(await refused(connection, INSERT, "another mark"), asyncpg.InterfaceError)
    await running
    await connection.execute("COMMIT")
    assert await lines(admin) == ["before", "effect", "mark"]


class Recording:
    """A transport, and what was written to it by its name."""

    def __init__(self, transport: JoinedWrites) -> None:
        self._transport = transport
        self.written: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def hold(self, data: bytes) -> None:
        self.written.append(data)
        self._transport.hold(data)


async def test_a_statement_that_was_cancelled_is_waited_for(
    connection: PinnedConnection, admin: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver is still cancelling it: nothing is written in between, and the aborted transaction is noticed."""
    driver: Any = PinnedConnection
    cancel, may_cancel = driver._cancel, asyncio.Event()

    async def later(*arguments: Any) -> None:
        await may_cancel.wait()
        await cancel(*arguments)

    monkeypatch.setattr(driver, "_cancel", later)
    await told(connection, "before")
    await connection.commit(INSERT, ["first"])  # prepared from now on
    await told(connection, "effect")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await connection.execute("SELECT pg_sleep(600)")
    recording = Recording(connection._transport)
    monkeypatch.setattr(connection, "_transport", recording)
    committing = asyncio.create_task(refused(connection, INSERT, "mark"))
    for _ in range(10):  # far enough for it to write
        await asyncio.sleep(0)
    assert recording.written == []
    may_cancel.set()
    assert isinstance(await committing, asyncpg.InFailedSQLTransactionError)
    assert len(recording.written) == 1
    await connection.execute("ROLLBACK")
    await told(connection, "again")
    await connection.commit(INSERT, ["mark"])
    assert await lines(admin) == ["again", "before", "first", "mark"]


async def test_on_a_closed_connection_nothing_is_sent(connection: PinnedConnection, admin: asyncpg.Connection) -> None:
    """It is certain that nothing is committed."""
    await told(connection, "effect")
    connection.terminate()
    assert isinstance(await refused(connection, INSERT, "mark"), asyncpg.InterfaceError)
    assert await lines(admin) == []


# -- COMMIT may have been executed --------------------------------------------------------------------


async def test_a_commit_that_fails_is_another_error(connection: PinnedConnection, admin: asyncpg.Connection) -> None:
    """A constraint that is deferred to COMMIT: the last statement has succeeded, and COMMIT was executed."""
    await told(connection, "effect")
    with pytest.raises(asyncpg.ForeignKeyViolationError):
        await connection.commit("INSERT INTO word VALUES ($1)", ["of no story"])
    assert not connection.is_in_transaction()
    assert await lines(admin) == []


@pytest.mark.parametrize(("mode", "committed"), [(Mode.REFUSE, []), (Mode.MUTE, ["effect", "mark"])])
async def test_a_connection_lost_at_the_commit(
    database_url: str, admin: asyncpg.Connection, mode: Mode, committed: list[str]
) -> None:
    """Before the server received it, or after: the client cannot know which, and does not say that it knows."""
    async with before_postgres(database_url) as (proxy, url), opened(url) as connection:
        await told(connection, "effect")
        met = asyncio.Event()

        def cut(sent: bytes) -> None:
            if EXECUTES_COMMIT in sent:
                proxy.switch(mode)
                met.set()

        proxy.on_sent = cut
        committing = asyncio.create_task(connection.commit(INSERT, ["mark"]))
        await met.wait()
        await until(lambda: shows(admin, committed))
        proxy.cut()
        with pytest.raises(asyncpg.ConnectionDoesNotExistError):
            await committing


async def test_a_commit_with_a_warning_may_not_be_replicated(
    connection: PinnedConnection, admin: asyncpg.Connection
) -> None:
    """It is committed, and the driver calls it a success: the warning is reported."""
    await admin.execute("""
        CREATE FUNCTION warn() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE WARNING 'x'; RETURN NULL; END $$;
        CREATE CONSTRAINT TRIGGER warn AFTER INSERT ON story DEFERRABLE INITIALLY DEFERRED
           FOR EACH ROW EXECUTE FUNCTION warn();
    """)
    await told(connection, "effect")
    with pytest.raises(LedgerUnavailable, match="standby"):
        await connection.commit(INSERT, ["mark"])
    assert await lines(admin) == ["effect", "mark"]


# -- the driver ---------------------------------------------------------------------------------------


def test_only_versions_of_the_driver_that_were_tried_are_installed() -> None:
    """How asyncpg takes the answers to two statements is not documented: a new version has to pass this file first."""
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert '"asyncpg>=0.31,<0.33"' in project
    assert re.match(r"0\.3[12]\.", asyncpg.__version__)


async def test_to_execute_nothing_sends_nothing(database_url: str, admin: asyncpg.Connection) -> None:
    """An `executemany` of no values, by which a cancellation is waited for, is no message, and waits for no answer."""
    sent: list[bytes] = []

    class Noting(Tap):
        def sent(self, chunk: bytes) -> None:
            sent.append(chunk)

    async with before_postgres(database_url) as (proxy, url):
        proxy.tap = Noting
        async with opened(url) as connection:
            statement: PreparedStatement[Any] = await connection.prepare("SELECT 1")
            sent.clear()
            coroutine = statement.executemany(())
            with pytest.raises(StopIteration):
                coroutine.send(None)
            assert await statement.fetchval() == 1
    assert [chunk.count(SYNC) for chunk in sent] == [1]
