"""Every way a handler can end, on a real Postgres: what is committed, what the row says, what is answered."""

import asyncio
import contextlib
import re
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from structlog.testing import capture_logs

from firstclaim import Context, Event, Permanent, Retry
from firstclaim.errors import HandlerRuleBroken, LedgerUnavailable
from firstclaim.inbox import releases
from firstclaim.inbox.claim import Claim
from firstclaim.inbox.ledger import Ledger
from firstclaim.operations.queries import Queries
from firstclaim.outcome import Kind, Outcome
from firstclaim.postgres import probe as probe_module
from firstclaim.postgres.epoch import Epoch
from firstclaim.postgres.handler_connections import HandlerConnection, HandlerConnections
from firstclaim.postgres.places import Places
from firstclaim.postgres.probe import Probe
from firstclaim.postgres.statement import Statement
from firstclaim.status import Status
from tests.integration.conftest import MakeWorld
from tests.integration.world import Function, World, effect, effect_from_thread, until


async def ends(
    world: World, function: Function, kind: Kind, status: Status, *, effects: int, error: str | None = None
) -> tuple[Claim, Outcome, dict[str, Any]]:
    """Dispatch a marked claim to `function` and hold its answer, row, effects and marker to what they must be."""
    claim = await world.marked()
    result = await world.dispatch(function, claim)
    row = await world.row(claim.event_id)
    assert (result.kind, row["status"], row["attempt"]) == (kind, status, 1), row["last_error"]
    assert result.attempt == 1
    if kind is Kind.FAILED:
        state = "is dead: replay it" if status is Status.DEAD else "will be retried"
        failed = "ledger" if error is not None and error.startswith("COMMIT failed: ") else "handler"
        assert result.reason == f"The {failed} failed; the event {state}"
    assert await world.effects(claim.event_id) == effects
    if error is None:
        assert row["last_error"] is None
    else:
        assert error in row["last_error"]
    # What is to be tried again must not be answered by a marker.
    assert (await world.value(claim.event_id) is None) == (status in (Status.FAILED, Status.PENDING))
    assert world.slots.free == world.settings.handler_slots
    return claim, result, row


async def fails(world: World, function: Function, error: str) -> dict[str, Any]:
    """Nothing of it is kept, one failure is charged, and it is tried again after the first backoff."""
    _, _, row = await ends(world, function, Kind.FAILED, Status.FAILED, effects=0, error=error)
    assert (row["failures"], row["abandoned"], row["settled_at"]) == (1, 0, None)
    await still_works(world)
    return row


async def still_works(world: World) -> None:
    """Every connection of the handlers' pool carries the next events as if nothing had been."""
    claims = [await world.claim() for _ in range(world.settings.handler_slots)]
    results = await asyncio.gather(*(world.dispatch(handles, claim) for claim in claims))
    assert {result.kind for result in results} == {Kind.PROCESSED}
    assert [await world.effects(claim.event_id) for claim in claims] == [1] * len(claims)


async def handles(event: Event, context: Context) -> str:
    await effect(event, context)
    return "handled_well"


def handles_in_thread(event: Event, context: Context) -> str:
    effect_from_thread(event, context)
    return "handled_well"


# -- it works -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [handles, handles_in_thread])
async def test_effects_and_mark_commit_together(world: World, function: Function) -> None:
    """Async or in a thread: its SQL, and the completion mark with its action, in one transaction."""
    claim, result, row = await ends(world, function, Kind.PROCESSED, Status.COMPLETED, effects=1)
    assert (result.action, result.reason) == ("handled_well", None)
    assert (row["action"], row["failures"]) == ("handled_well", 0)
    assert row["settled_at"] is not None
    assert await world.database.fetchval(
        "SELECT e.xmin = f.xmin AND f.attempt = 1 FROM firstclaim.stripe_events e JOIN effects f USING (event_id)"
        " WHERE event_id = $1",
        claim.event_id,
    )


@pytest.mark.parametrize(
    ("value", "action"), [(None, "handled"), ("done", "done"), ("x" * 200, "x" * 200), ("\N{EURO SIGN} 5", None)]
)
async def test_the_action_is_what_it_returns(world: World, value: str | None, action: str | None) -> None:
    """A short printable string, or `handled` for None."""

    async def function(event: Event, context: Context) -> str | None:
        await effect(event, context)
        return value

    _, result, row = await ends(world, function, Kind.PROCESSED, Status.COMPLETED, effects=1)
    assert result.action == row["action"] == (action or value)


async def test_a_savepoint_is_fine(world: World) -> None:
    """A part that may fail is rolled back alone, and the rest commits; begin_nested commits and rolls back freely."""

    async def function(event: Event, context: Context) -> None:
        await effect(event, context)
        with contextlib.suppress(DBAPIError):
            async with context.connection.begin_nested():
                await effect(event, context)
                await context.connection.execute(text("SELECT 1 / 0"))
        async with context.connection.begin_nested():
            await effect(event, context)
        part = await context.connection.begin_nested()
        await effect(event, context)
        await part.rollback()

    await ends(world, function, Kind.PROCESSED, Status.COMPLETED, effects=2)
    await still_works(world)


async def test_an_earlier_error_is_forgotten(world: World) -> None:
    """The row of an event that failed before and then completed says nothing of a failure but their number."""
    claim = await world.claim()
    await world.dispatch(raising(ValueError("first")), claim)
    [again] = await world.ledger.take_over([claim.event_id])
    assert (await world.dispatch(handles, again)).attempt == 2
    row = await world.row(claim.event_id)
    assert (row["status"], row["failures"], row["last_error"]) == ("completed", 1, None)
    assert await world.database.fetchval("SELECT attempt FROM effects WHERE event_id = $1", claim.event_id) == 2


# -- it raises ----------------------------------------------------------------------------------------


def raising(error: BaseException) -> Function:
    async def function(event: Event, context: Context) -> None:
        await effect(event, context)
        raise error

    return function


def raising_in_thread(error: BaseException) -> Function:
    def function(event: Event, context: Context) -> None:
        effect_from_thread(event, context)
        raise error

    return function


both = pytest.mark.parametrize("make", [raising, raising_in_thread])


@both
async def test_an_exception_is_a_failure(world: World, make: Callable[[BaseException], Function]) -> None:
    """Nothing it did is kept; it is tried again after 2.5 to 5 s, and the row says what it raised."""
    row = await fails(world, make(RuntimeError("boom")), "RuntimeError: boom")
    assert row["last_error"] == "RuntimeError: boom"
    assert -15 < row["due_in"] <= 5


async def test_the_error_is_kept_without_secrets(world: World) -> None:
    """The first line of what it says, redacted: no key, no address, no second line with the row's values."""

    async def violates(event: Event, context: Context) -> None:
        await context.connection.execute(text("CREATE TEMP TABLE people (email text PRIMARY KEY) ON COMMIT DROP"))
        for _ in range(2):
            await context.connection.execute(text("INSERT INTO people VALUES (:email)"), {"email": "jo@example.com"})

    row = await fails(world, raising(RuntimeError("key sk_live_123 of jo@example.com\nsecond")), "RuntimeError: key")
    assert row["last_error"] == "RuntimeError: key [redacted] of [redacted]"
    row = await fails(world, violates, "IntegrityError: ")
    assert "people_pkey" in row["last_error"]
    assert "jo@" not in row["last_error"]


@pytest.mark.parametrize(("failures", "whole"), [(1, 10), (3, 40), (20, 3600)])
async def test_the_backoff_doubles(world: World, failures: int, whole: float) -> None:
    """By the failures charged so far."""
    claim = await world.claim()
    await world.ledger.fail_if_held(claim, "", due_in_seconds=0)
    await world.change(claim.event_id, failures=failures)
    [claim] = await world.ledger.take_over([claim.event_id])
    before: Any = await world.database.fetchval("SELECT clock_timestamp()")
    await world.dispatch(raising(RuntimeError()), claim)
    after: Any = await world.database.fetchval("SELECT clock_timestamp()")
    row = await world.row(claim.event_id)
    assert whole / 2 <= (row["due_at"] - before).total_seconds()
    assert (row["due_at"] - after).total_seconds() <= whole
    assert row["failures"] == failures + 1


@both
@pytest.mark.parametrize("after", [0.0, 500.0, 3 * 86_400.0])
async def test_a_retry_comes_when_it_asked(
    world: World, make: Callable[[BaseException], Function], after: float
) -> None:
    """`Retry(after=...)` instead of the backoff; it is a failure like any other."""
    row = await fails(world, make(Retry("not yet", after=after)), "Retry: not yet")
    assert after - 20 < row["due_in"] <= after


async def test_a_retry_without_a_time_takes_the_backoff(world: World) -> None:
    """The usual wait."""
    row = await fails(world, raising(Retry()), "Retry: handler asked for a retry")
    assert -15 < row["due_in"] <= 5


@both
async def test_permanent_is_dead(world: World, make: Callable[[BaseException], Function]) -> None:
    """No retry will help: dead at once, nothing kept, and answered so that Stripe does not come again."""
    claim, result, row = await ends(
        world, make(Permanent("no such shop")), Kind.DEAD, Status.DEAD, effects=0, error="Permanent: no such shop"
    )
    assert result.reason == f"Event {claim.event_id} is dead: replay it"
    assert row["failures"] == 1
    await still_works(world)


@both
async def test_the_log_names_the_attempt(world: World, make: Callable[[Exception], Function]) -> None:
    """An operator finds the event, its attempt and the function that failed, and nothing of the error's message."""
    claim = await world.marked()
    with capture_logs() as logged:
        await world.dispatch(make(RuntimeError("c4n4rypw")), claim)
    [line] = [each for each in logged if each["event"] == "handler_failed"]
    assert line.pop("handler").startswith(f"{__name__}.")
    assert line.pop("error").startswith("RuntimeError at tests/integration/test_dispatch.py:")
    assert re.fullmatch(r"tests/integration/test_dispatch\.py:\d+ in .*function", line.pop("frames")[0])
    assert line == {
        "event": "handler_failed",
        "log_level": "warning",
        "event_id": claim.event_id,
        "type": claim.type,
        "attempt": 1,
    }


async def test_the_log_leads_to_the_handler_that_broke_a_rule(world: World) -> None:
    """Where no line of the handler raised the error, the first frame is the handler's definition."""

    async def ends_its_transaction(event: Event, context: Context) -> None:
        await context.fetch("COMMIT")

    async def rolls_back(event: Event, context: Context) -> None:
        await context.connection.rollback()

    async def returns_a_number(event: Event, context: Context) -> Any:
        return 7

    for function in (ends_its_transaction, rolls_back, returns_a_number):
        claim = await world.marked()
        with capture_logs() as logged:
            await world.dispatch(function, claim)
        [line] = [each for each in logged if each["event"] == "handler_failed"]
        definition = f"tests/integration/test_dispatch.py:{function.__code__.co_firstlineno} in "
        assert line["frames"][0].startswith(definition), line


@both
async def test_the_attempt_keeps_its_frames(world: World, make: Callable[[Exception], Function]) -> None:
    """Where it was raised, the user's frames first, with its causes, and no message but the error's own."""
    error = RuntimeError("boom")
    error.__cause__ = ValueError("c4n4rypw")
    row = await fails(world, make(error), "RuntimeError: boom")
    assert row["last_error"] == "RuntimeError: boom"
    async with world.components.ingest.acquire(10) as connection:
        [attempt] = await Queries(connection).attempts(row["event_id"])
    assert attempt.error == "RuntimeError: boom"
    assert re.fullmatch(r"tests/integration/test_dispatch\.py:\d+ in .*function", attempt.frames[0])
    assert attempt.frames[-1] == "caused by: ValueError"


async def test_failing_for_three_days_is_dead(world: World) -> None:
    """When Stripe itself has given up, the last failure is the end; the answer says so, and its marker stays."""
    claim = await world.marked()
    await world.change(claim.event_id, give_up_at=-1.0)
    result = await world.dispatch(raising(RuntimeError()), claim)
    assert (result.kind, result.reason) == (Kind.FAILED, "The handler failed; the event is dead: replay it")
    assert await world.status(claim.event_id) is Status.DEAD
    assert await world.value(claim.event_id) is not None


@both
@pytest.mark.parametrize(
    "error", [SystemExit(0), KeyboardInterrupt(), GeneratorExit(), StopIteration(), BaseException()]
)
async def test_nothing_a_handler_raises_ends_the_process(
    world: World, make: Callable[[BaseException], Function], error: BaseException
) -> None:
    """Also what is no `Exception` is the failure of this attempt, and of nothing else."""
    await fails(world, make(error), type(error).__name__)


class HostileError(Exception):
    """An exception that cannot be inspected: each of its attributes raises, `__class__` among them."""

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(name)

    def __str__(self) -> str:
        raise RuntimeError("str")


class UnfinishedRetryError(Retry):
    """A subclass that leaves out its base's attributes."""

    def __init__(self) -> None:
        pass


@both
@pytest.mark.parametrize(
    ("error", "text"),
    [
        (HostileError(), "HostileError: its message cannot be read"),
        (ExceptionGroup("", [HostileError()]), "ExceptionGroup:  (1 sub-exception)"),
        (UnfinishedRetryError(), "UnfinishedRetryError: "),
    ],
    ids=["attributes", "group", "retry"],
)
async def test_a_hostile_exception_is_a_failure(
    world: World, make: Callable[[BaseException], Function], error: BaseException, text: str
) -> None:
    """An exception whose attributes raise, or are missing, is an ordinary failure: answered, charged and retried."""
    broken: str | None = None
    try:
        row = await fails(world, make(error), text)
    except RuntimeError as raised:  # pytest cannot show an exception whose context is the hostile one
        broken = repr(raised)
    assert broken is None
    assert -15 < row["due_in"] <= 5


async def test_sys_exit_does_not_end_the_process(world: World) -> None:
    """The call itself, as a script's code would have it, in a task and in a thread."""

    async def exits(_event: Event, _context: Context) -> None:
        sys.exit("bye")

    def exits_in_thread(_event: Event, _context: Context) -> None:
        sys.exit("bye")

    await fails(world, exits, "a handler must not raise SystemExit")
    await fails(world, exits_in_thread, "a handler must not raise SystemExit")


async def test_cancelling_itself_is_a_failure(world: World) -> None:
    """A CancelledError out of a handler is not our stopping: it is charged."""
    await fails(world, raising(asyncio.CancelledError()), "a handler must not end by cancelling itself")


# -- it breaks a rule ---------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["", "x" * 201, "a\nb", "\x1b[2J", "\ud800", 7, True, b"done", ["done"], {}])
async def test_a_bad_action_is_a_failure(world: World, value: Any) -> None:
    """What could not be answered or stored is the author's to mend: nothing is kept, and the type is named."""

    async def function(event: Event, context: Context) -> Any:
        await effect(event, context)
        return value

    await fails(world, function, f"this one returned {type(value).__name__}")


async def test_a_swallowed_sql_error_is_named(world: World) -> None:
    """Its transaction is aborted, a COMMIT would silently roll back: failed, never `processed`."""

    async def function(event: Event, context: Context) -> None:
        await effect(event, context)
        with contextlib.suppress(DBAPIError):
            await context.connection.execute(text("SELECT 1 / 0"))

    await fails(world, function, "aborted its transaction: DivisionByZeroError (22012)")


async def test_a_swallowed_sql_error_of_a_thread_is_named(world: World) -> None:
    """The same from a sync handler."""

    def function(event: Event, context: Context) -> None:
        effect_from_thread(event, context)
        with contextlib.suppress(DBAPIError):
            context.execute(text("SELECT 1 / 0"))

    await fails(world, function, "aborted its transaction: DivisionByZeroError (22012)")


NUMBER = text("SELECT CAST(:number AS int)")
NO_NUMBER = {"number": "seven"}


async def refused_by_fetch(context: Context) -> None:
    await context.fetch("SELECT $1::int", "seven")


async def refused_by_connection(context: Context) -> None:
    await context.connection.execute(NUMBER, NO_NUMBER)


async def refused_in_a_session(context: Context) -> None:
    async with context.session() as session:
        with contextlib.suppress(DBAPIError):
            await session.execute(NUMBER, NO_NUMBER)


def refused_by_execute(context: Context) -> None:
    context.execute(NUMBER, NO_NUMBER)


def refused_in_a_sync_session(context: Context) -> None:
    with context.sync_session() as session, contextlib.suppress(DBAPIError):
        session.execute(NUMBER, NO_NUMBER)


@pytest.mark.parametrize("refused", [refused_by_fetch, refused_by_connection, refused_in_a_session])
async def test_a_swallowed_error_of_the_driver_is_named(world: World, refused: Callable[..., Awaitable[None]]) -> None:
    """The driver refuses a value, the server sees nothing, the transaction is intact: failed, never `processed`."""

    async def function(event: Event, context: Context) -> None:
        await effect(event, context)
        with contextlib.suppress(asyncpg.PostgresError, asyncpg.InterfaceError, DBAPIError):
            await refused(context)

    await fails(world, function, "a handler must not swallow the error of a statement that was not executed: DataError")


@pytest.mark.parametrize("refused", [refused_by_execute, refused_in_a_sync_session])
async def test_a_swallowed_error_of_the_driver_in_a_thread_is_named(world: World, refused: Callable[..., None]) -> None:
    """The same from a sync handler."""

    def function(event: Event, context: Context) -> None:
        effect_from_thread(event, context)
        with contextlib.suppress(DBAPIError):
            refused(context)

    await fails(world, function, "a handler must not swallow the error of a statement that was not executed: DataError")


@pytest.mark.parametrize("refused", [refused_by_fetch, refused_by_connection, refused_in_a_session])
@pytest.mark.parametrize("rolls_back", [True, False])
async def test_a_savepoint_takes_its_errors_with_it(
    world: World, refused: Callable[..., Awaitable[None]], rolls_back: bool
) -> None:
    """What was refused in a savepoint counts, unless that savepoint, or one around it, is rolled back."""

    async def function(event: Event, context: Context) -> None:
        await effect(event, context)
        with contextlib.suppress(RuntimeError):
            async with context.connection.begin_nested():
                with contextlib.suppress(asyncpg.PostgresError, asyncpg.InterfaceError, DBAPIError):
                    async with context.connection.begin_nested():
                        await effect(event, context)
                        if refused is refused_in_a_session:
                            await refused(context)
                    await refused(context)
                if rolls_back:
                    raise RuntimeError

    if rolls_back:
        await ends(world, function, Kind.PROCESSED, Status.COMPLETED, effects=1)
    else:
        await fails(world, function, "a handler must not swallow the error")


@pytest.mark.parametrize("rolls_back", [True, False])
async def test_a_savepoint_in_sql_takes_its_errors_with_it(world: World, rolls_back: bool) -> None:
    """The same for a savepoint that the handler's own SQL sets."""

    async def function(event: Event, context: Context) -> None:
        await effect(event, context)
        await context.fetch("savepoint part")
        with contextlib.suppress(asyncpg.PostgresError, asyncpg.InterfaceError):
            await refused_by_fetch(context)
        await context.fetch("rollback work to part" if rolls_back else "RELEASE SAVEPOINT part")

    if rolls_back:
        await ends(world, function, Kind.PROCESSED, Status.COMPLETED, effects=1)
    else:
        await fails(world, function, "a handler must not swallow the error")


async def test_a_release_that_is_refused_releases_nothing(world: World) -> None:
    """In an aborted transaction the server refuses a RELEASE: the savepoint is still there to be rolled back to."""

    async def function(event: Event, context: Context) -> None:
        await effect(event, context)
        await context.fetch("SAVEPOINT part")
        with contextlib.suppress(asyncpg.PostgresError, asyncpg.InterfaceError):
            await refused_by_fetch(context)
        for sql in ("SELECT 1 / 0", "RELEASE part", "ROLLBACK TO part"):
            with contextlib.suppress(asyncpg.PostgresError):
                await context.fetch(sql)

    await ends(world, function, Kind.PROCESSED, Status.COMPLETED, effects=1)


@pytest.mark.parametrize("rolls_back", [True, False])
async def test_a_wrong_number_of_arguments_is_no_concurrent_use(world: World, rolls_back: bool) -> None:
    """The driver's error has the same class: it is named as a refused statement, and undone with its savepoint."""

    async def function(event: Event, context: Context) -> None:
        await effect(event, context)
        await context.fetch("SAVEPOINT part")
        with contextlib.suppress(asyncpg.InterfaceError):
            await context.fetch("SELECT $1::int + $2::int", 1)
        if rolls_back:
            await context.fetch("ROLLBACK TO part")

    if rolls_back:
        await ends(world, function, Kind.PROCESSED, Status.COMPLETED, effects=1)
    else:
        await fails(world, function, "the error of a statement that was not executed: InterfaceError")


async def test_a_timeout_around_a_statement_of_sqlalchemys_is_named(world: World) -> None:
    """SQLAlchemy closes the connection of a cancelled statement: the error names the cancellation, not a close()."""

    async def function(event: Event, context: Context) -> None:
        await effect(event, context)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(context.connection.execute(text("SELECT pg_sleep(60)")), 0.01)

    await fails(world, function, "the error of a statement that was not executed: CancelledError")


async def test_statements_at_once_are_named(world: World) -> None:
    """The one connection executes one statement at a time: of three at once it executes one, and refuses the others."""

    async def function(event: Event, context: Context) -> None:
        await effect(event, context)
        async with context.connection.begin_nested() as savepoint:
            await asyncio.gather(*(context.fetch("SELECT 1") for _ in range(3)), return_exceptions=True)
            await savepoint.rollback()

    await fails(world, function, "a handler must await each statement before the next")


@pytest.mark.parametrize("method", ["commit", "rollback"])
async def test_ending_the_transaction_is_refused(world: World, method: str) -> None:
    """commit() raises, and so does the first statement after rollback(), with what to do instead; then it has failed.

    rollback() itself does not raise: in an `except` or a session it would hide the error that is its reason.
    """
    caught: list[BaseException] = []

    async def function(event: Event, context: Context) -> None:
        await effect(event, context)
        try:
            await getattr(context.connection, method)()
            assert method == "rollback"
            await effect(event, context)
        except HandlerRuleBroken as error:
            caught.append(error)
            raise

    await fails(world, function, "HandlerRuleBroken: a handler must not commit or roll back")
    assert "begin_nested()" in str(caught[0])


@pytest.mark.parametrize("method", ["commit", "rollback"])
async def test_a_swallowed_refusal_is_a_failure(world: World, method: str) -> None:
    """It takes for committed, or for undone, what is neither: so nothing of it is kept, and the rule is named."""

    async def function(event: Event, context: Context) -> None:
        await effect(event, context)
        with contextlib.suppress(HandlerRuleBroken):
            await getattr(context.connection, method)()

    await fails(world, function, "HandlerRuleBroken: a handler must not commit or roll back")


@pytest.mark.parametrize("method", ["commit", "rollback", "close", "invalidate"])
async def test_a_swallowed_refusal_keeps_no_half(world: World, method: str) -> None:
    """A handler that goes on after the refusal, or closes its connection: all of it is committed, or nothing is."""

    async def function(event: Event, context: Context) -> None:
        await effect(event, context)
        with contextlib.suppress(HandlerRuleBroken):
            await getattr(context.connection, method)()
        with contextlib.suppress(SQLAlchemyError):
            await effect(event, context)

    claim = await world.marked()
    result = await world.dispatch(function, claim)
    status, effects = await world.status(claim.event_id), await world.effects(claim.event_id)
    assert (result.kind, status, effects) in {
        (Kind.PROCESSED, Status.COMPLETED, 2),
        (Kind.FAILED, Status.FAILED, 0),
    }
    await still_works(world)


def fail() -> None:
    raise RuntimeError("boom")


def permanently() -> None:
    raise Permanent


@pytest.mark.parametrize("then", [lambda: None, fail, permanently, asyncio.current_task])
@pytest.mark.parametrize("statement", ["COMMIT", "END", "COMMIT AND CHAIN"])
async def test_a_handlers_own_commit_is_found_out(world: World, statement: str, then: Callable[[], Any]) -> None:
    """What it committed is kept, so a retry would double it: dead, the rule named, however the handler ended."""

    async def function(event: Event, context: Context) -> None:
        await effect(event, context)
        await context.connection.execute(text(statement))
        then()

    _, result, row = await ends(
        world,
        function,
        Kind.FAILED,
        Status.DEAD,
        effects=1,
        error="a handler must not commit",
    )
    assert row["failures"] == 1
    assert result.action == "failed"
    await still_works(world)


async def commits(event: Event, context: Context) -> None:
    await effect(event, context)
    await context.connection.execute(text("COMMIT AND CHAIN"))


async def writes_in_no_transaction(event: Event, context: Context) -> None:
    await context.connection.execute(text("ROLLBACK"))
    await effect(event, context)


OWN_ENDS = pytest.mark.parametrize("own_end", [commits, writes_in_no_transaction])


@OWN_ENDS
async def test_an_own_end_before_the_deadline_is_found_out(make_world: MakeWorld, own_end: Function) -> None:
    """The same for a handler that then ran too long."""
    world = await make_world(handler_deadline_seconds=0.1)

    async def function(event: Event, context: Context) -> None:
        await own_end(event, context)
        await asyncio.Event().wait()

    await ends(world, function, Kind.FAILED, Status.DEAD, effects=1, error="a handler must not commit")


@pytest.mark.parametrize("statement", ["ROLLBACK", "ABORT", "ROLLBACK AND CHAIN"])
async def test_a_handlers_own_rollback_is_found_out(world: World, statement: str) -> None:
    """What it did after that would be outside of the mark's transaction, and may be committed: dead, the rule named."""

    async def function(event: Event, context: Context) -> None:
        await effect(event, context)
        await context.connection.execute(text(statement))

    await ends(
        world, function, Kind.FAILED, Status.DEAD, effects=0, error="a handler must not commit, nor end its transaction"
    )


def time_out() -> None:
    raise TimeoutError


@pytest.mark.parametrize("then", [lambda: None, fail, permanently, time_out])
async def test_what_was_written_after_an_own_rollback_is_not_doubled(world: World, then: Callable[[], Any]) -> None:
    """Outside of any transaction each statement has committed: dead, however the handler ended."""

    async def function(event: Event, context: Context) -> None:
        await context.connection.execute(text("ROLLBACK"))
        await effect(event, context)
        then()

    await ends(world, function, Kind.FAILED, Status.DEAD, effects=1, error="a handler must not commit")


async def test_a_connection_lost_in_the_handler_is_no_rule_broken(world: World) -> None:
    """Postgres ended the backend, not the handler its transaction: failed, and tried again."""

    async def function(event: Event, context: Context) -> None:
        await effect(event, context)
        pid = await context.connection.scalar(text("SELECT pg_backend_pid()"))
        await world.database.execute("SELECT pg_terminate_backend($1)", pid)
        await until(lambda: gone(pid))
        raise RuntimeError("noticed by other means")

    async def gone(pid: int) -> bool:
        return bool(
            await world.database.fetchval("SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE pid = $1)", pid)
        )

    await fails(world, function, "RuntimeError: noticed by other means")


async def test_effects_after_an_own_rollback_are_not_kept(world: World) -> None:
    """In a transaction of its own making, which is not marked: rolled back."""

    async def function(event: Event, context: Context) -> None:
        for statement in ("ROLLBACK", "BEGIN"):
            await context.connection.execute(text(statement))
        await effect(event, context)

    await ends(
        world, function, Kind.FAILED, Status.DEAD, effects=0, error="a handler must not commit, nor end its transaction"
    )


# -- it takes too long --------------------------------------------------------------------------------


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Holds a thread until it is set; set at the end in any case."""
    gate = threading.Event()
    yield gate
    gate.set()


@pytest.fixture
async def hasty(make_world: MakeWorld) -> World:
    """One handler slot, and a deadline that a test can wait for."""
    return await make_world(handler_slots=1, handler_deadline_seconds=0.4)


async def too_late(world: World, function: Function, *, hung: bool = False) -> Claim:
    """At its deadline the attempt has failed: answered, charged, nothing kept, and its backend has gone.

    `hung`: its thread runs on, so it counts as abandoned.
    """
    claim = await world.marked()
    async with asyncio.timeout(20):
        result = await world.dispatch(function, claim)
    assert result.kind is Kind.FAILED
    row = await world.row(claim.event_id)
    charged = ("pending", 0, 1) if hung else ("failed", 1, 0)
    assert (row["status"], row["failures"], row["abandoned"]) == charged
    assert row["last_error"] in (
        "DeadlineExceeded: the handler ran longer than its deadline of 0.4 s",
        "TimeoutError: the handler's deadline has passed; its transaction was rolled back",  # a thread may see it first
    )
    assert await world.value(claim.event_id) is None
    assert await world.effects(claim.event_id) == 0
    busy = "SELECT count(*) = 0 FROM pg_stat_activity WHERE datname = current_database() AND backend_xid IS NOT NULL"
    await until(lambda: world.database.fetchval(busy))
    return claim


async def test_a_slow_handler_fails_at_its_deadline(hasty: World) -> None:
    """It is cancelled, its slot and its row are free again."""
    cancelled: list[bool] = []

    async def function(event: Event, context: Context) -> None:
        await effect(event, context)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    await too_late(hasty, function)
    assert cancelled == [True]
    await until(lambda: has_free_slot(hasty))
    await still_works(hasty)


async def test_what_ends_after_the_deadline_has_failed(hasty: World) -> None:
    """A handler that would end by itself, a little late, is not waited for either."""

    async def function(event: Event, context: Context) -> None:
        await effect(event, context)
        await asyncio.sleep(3)

    await too_late(hasty, function)


async def test_a_slow_statement_is_ended_at_the_deadline(hasty: World) -> None:
    """The server does not go on with it for minutes, with the row locked."""

    async def function(event: Event, context: Context) -> None:
        await effect(event, context)
        await context.connection.execute(text("SELECT pg_sleep(600)"))

    await too_late(hasty, function)
    await until(lambda: has_free_slot(hasty))
    await still_works(hasty)


async def test_a_slow_statement_of_a_thread_is_ended_at_the_deadline(hasty: World) -> None:
    """The same from a sync handler: the call on the connection raises in its thread."""
    raised: list[BaseException] = []

    def function(event: Event, context: Context) -> None:
        effect_from_thread(event, context)
        try:
            context.execute(text("SELECT pg_sleep(600)"))
        except BaseException as error:
            raised.append(error)
            raise

    await too_late(hasty, function)
    await until(lambda: has_free_slot(hasty))
    assert len(raised) == 1
    await still_works(hasty)


async def test_a_refusal_at_the_deadline_that_is_swallowed_is_a_failure(hasty: World) -> None:
    """The thread has returned before a late event loop notices its deadline: not completed without its effect."""

    def function(event: Event, context: Context) -> None:
        context.execute(text("SELECT 1"))
        context._loop.call_soon_threadsafe(threading.current_thread().join)
        threading.Event().wait(1.1 * (context._deadline - context._loop.time()))
        with contextlib.suppress(TimeoutError):
            effect_from_thread(event, context)

    await fails(hasty, function, "a handler must not swallow the TimeoutError of its deadline")


async def test_a_thread_that_blocks_keeps_its_slot(hasty: World, gate: threading.Event) -> None:
    """A thread cannot be ended: it is abandoned, its slot stays taken, and its later calls on the connection raise."""
    raised: list[type[BaseException]] = []

    def function(event: Event, context: Context) -> None:
        effect_from_thread(event, context)
        gate.wait()
        try:
            effect_from_thread(event, context)
        except Exception as error:
            raised.append(type(error))
            raise

    claim = await too_late(hasty, function, hung=True)
    assert hasty.slots.free == 0
    assert list(hasty.slots.hung) == [claim.event_id]
    noted = "SELECT outcome FROM firstclaim.stripe_event_attempts WHERE event_id = $1"
    assert await hasty.database.fetchval(noted, claim.event_id) == "abandoned"
    gate.set()
    await until(lambda: has_free_slot(hasty))
    assert raised == [TimeoutError]
    assert not hasty.slots.hung
    await still_works(hasty)
    assert await hasty.effects(claim.event_id) == 0


async def test_a_handler_that_ignores_its_cancellation_keeps_its_slot(hasty: World) -> None:
    """The answer does not wait for it; its slot stays taken until it ends; what it does later raises, not commits."""
    raised: list[type[BaseException]] = []
    let_go = asyncio.Event()

    async def function(event: Event, context: Context) -> str:
        await effect(event, context)
        while not let_go.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await let_go.wait()
        try:
            await effect(event, context)
        except Exception as error:  # noqa: BLE001
            raised.append(type(error))
        return "too_late"

    claim = await too_late(hasty, function)
    assert hasty.slots.free == 0
    let_go.set()
    await until(lambda: has_free_slot(hasty))
    assert len(raised) == 1
    assert raised[0] is HandlerRuleBroken
    await still_works(hasty)
    assert await hasty.status(claim.event_id) is Status.FAILED
    assert await hasty.effects(claim.event_id) == 0


async def test_a_sync_handler_stops_nobody(make_world: MakeWorld, gate: threading.Event) -> None:
    """While a thread blocks, the event loop turns and other events are handled."""
    world = await make_world(handler_slots=2)

    def blocks(event: Event, context: Context) -> None:
        effect_from_thread(event, context)
        gate.wait()

    blocked = await world.claim()
    blocking = asyncio.create_task(world.dispatch(blocks, blocked))
    assert (await world.dispatch(handles, await world.claim())).kind is Kind.PROCESSED
    assert not blocking.done()
    gate.set()
    assert (await blocking).kind is Kind.PROCESSED
    assert await world.effects(blocked.event_id) == 1


async def has_free_slot(world: World) -> bool:
    return world.slots.free == world.settings.handler_slots


# -- who holds the row --------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [None, Status.PENDING, Status.COMPLETED, Status.DEAD])
async def test_a_claim_that_was_lost_is_not_begun(world: World, status: Status | None) -> None:
    """Taken over, released or settled before the handler could start: it does not, and nothing is changed."""
    claim = await world.claim()
    if status is None:
        await world.change(claim.event_id, attempt=2)
    else:
        await world.settle(claim.event_id, status)
    before = await world.row(claim.event_id)
    result = await world.dispatch(must_not_run, claim)
    assert (result.kind, result.action) == (Kind.DUPLICATE, "ignored")
    after = await world.row(claim.event_id)
    assert {**before, "due_in": 0, "give_up_in": 0} == {**after, "due_in": 0, "give_up_in": 0}
    await still_works(world)


async def must_not_run(_event: Event, _context: Context) -> None:
    raise AssertionError("the handler ran")


async def test_a_running_handler_is_never_taken_over(make_world: MakeWorld) -> None:
    """Long after its lease its row lock is the lease: nobody returns, takes over, replays or doubles it."""
    world, other = await make_world(lease_seconds=0.05), await make_world()
    running, finish = asyncio.Event(), asyncio.Event()

    async def function(event: Event, context: Context) -> None:
        await effect(event, context)
        running.set()
        await finish.wait()

    claim = await world.marked()
    dispatching = asyncio.create_task(world.dispatch(function, claim))
    await running.wait()
    await until(lambda: past_its_lease(world, claim))
    async with asyncio.timeout(10):
        assert await other.ledger.return_abandoned(10) == []
        assert await other.ledger.take_over([claim.event_id]) == []
        assert (await other.dispatch(must_not_run, claim)).kind is Kind.DUPLICATE
    finish.set()
    assert (await dispatching).kind is Kind.PROCESSED
    assert await world.effects(claim.event_id) == 1


async def past_its_lease(world: World, claim: Claim) -> bool:
    due_in: float = (await world.row(claim.event_id))["due_in"]
    return due_in < 0


async def test_a_claim_dispatched_twice_is_handled_once(world: World) -> None:
    """The same claim in two hands at once: one finds the row locked and stops."""
    claim = await world.claim()
    results = await asyncio.gather(*(world.dispatch(handles, claim) for _ in range(4)))
    assert sorted(result.kind for result in results) == [Kind.DUPLICATE] * 3 + [Kind.PROCESSED]
    assert await world.effects(claim.event_id) == 1


# -- slots --------------------------------------------------------------------------------------------


class HandlerTransaction:
    """A handler that says when it runs, and goes on when told; counts how many run at once."""

    def __init__(self) -> None:
        self.running = 0
        self.most = 0
        self.ran: list[str] = []
        self.finish = asyncio.Event()

    async def __call__(self, event: Event, context: Context) -> None:
        self.running += 1
        self.most = max(self.most, self.running)
        self.ran.append(event.id)
        try:
            await effect(event, context)
            await self.finish.wait()
        finally:
            self.running -= 1

    def as_handler(self) -> Function:
        """A function, as the registry has them."""

        async def function(event: Event, context: Context) -> None:
            await self(event, context)

        return function

    async def reaches(self, number: int) -> None:
        async def look() -> bool:
            return self.running == number

        await until(look)


async def test_no_more_run_than_there_are_slots(make_world: MakeWorld) -> None:
    """Of ten claims two run at once, and in the end all have run."""
    world, held = await make_world(handler_slots=2), HandlerTransaction()
    claims = [await world.claim() for _ in range(10)]
    work = [asyncio.create_task(world.dispatch(held.as_handler(), claim)) for claim in claims]
    await held.reaches(2)
    assert world.slots.free == 0
    held.finish.set()
    assert {result.kind for result in await asyncio.gather(*work)} == {Kind.PROCESSED}
    assert held.most == 2
    assert world.slots.free == 2


async def test_a_full_house_charges_nothing(make_world: MakeWorld) -> None:
    """No slot in half the lease: released, due now, no count raised, no marker; whoever has room takes it."""
    world, held = await make_world(handler_slots=1, lease_seconds=0.1), HandlerTransaction()
    first = asyncio.create_task(world.dispatch(held.as_handler(), await world.claim()))
    await held.reaches(1)
    claim = await world.marked()
    result = await world.dispatch(must_not_run, claim)
    assert (result.kind, result.reason) == (Kind.DEFERRED, "Recorded; dispatched when a handler slot is free")
    row = await world.row(claim.event_id)
    assert (row["status"], row["attempt"], row["failures"], row["abandoned"]) == ("pending", 1, 0, 0)
    assert row["due_in"] <= 0
    assert await world.value(claim.event_id) is None
    held.finish.set()
    assert (await first).kind is Kind.PROCESSED
    assert world.slots.free == 1


async def test_those_abandoned_before_run_one_at_a_time(world: World) -> None:
    """An event that may end the process drags as few neighbours along as can be; others do not wait for it."""
    held = HandlerTransaction()
    abandoned_before = []
    for _ in range(2):
        claim = await world.claim()
        await world.change(claim.event_id, abandoned=1, due_at=-1.0)
        await world.ledger.release_if_held(claim)
        abandoned_before += await world.ledger.take_over([claim.event_id])
    assert [claim.abandoned for claim in abandoned_before] == [1, 1]
    work = [asyncio.create_task(world.dispatch(held.as_handler(), claim)) for claim in abandoned_before]
    await held.reaches(1)
    assert not world.slots.previously_abandoned_free
    assert (await world.dispatch(handles, await world.claim())).kind is Kind.PROCESSED
    assert held.running == 1
    held.finish.set()
    assert {result.kind for result in await asyncio.gather(*work)} == {Kind.PROCESSED}
    assert held.most == 1
    assert world.slots.previously_abandoned_free


async def test_capacity_is_a_quarter_of_the_slots(world: World) -> None:
    """Recovery waits until it can fetch a fair number of events at once."""
    held = HandlerTransaction()
    await asyncio.wait_for(world.slots.wait_for_capacity(), 5)
    work = [asyncio.create_task(world.dispatch(held.as_handler(), await world.claim())) for _ in range(4)]
    await held.reaches(4)
    waiting = asyncio.create_task(world.slots.wait_for_capacity())
    await asyncio.sleep(0)
    assert not waiting.done()
    held.finish.set()
    await asyncio.wait_for(waiting, 5)
    await asyncio.gather(*work)


async def test_a_hung_thread_does_not_hold_up_the_next_abandoned_event(
    make_world: MakeWorld, gate: threading.Event
) -> None:
    """The turn of previously abandoned events is over at the deadline, though the thread keeps its slot."""
    world = await make_world(handler_slots=2, handler_deadline_seconds=0.4)

    def blocks(_event: Event, _context: Context) -> None:
        gate.wait()

    claim = await world.claim()
    await world.change(claim.event_id, abandoned=1)
    await world.ledger.release_if_held(claim)
    [claim] = await world.ledger.take_over([claim.event_id])
    assert (await world.dispatch(blocks, claim)).kind is Kind.FAILED
    assert (await world.row(claim.event_id))["abandoned"] == 2
    assert world.slots.previously_abandoned_free
    assert world.slots.work.is_set(), "recovery is not woken for the next one"
    assert world.slots.free == 1
    gate.set()
    await until(lambda: has_free_slot(world))


async def test_a_release_is_repeated_until_postgres_is_back(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """No connection for the handler, and no ledger either: released once it can be reached, and nothing is charged."""
    monkeypatch.setattr(releases, "_RETRY_SECONDS", 0.01)
    whole, tries = Ledger.release_if_held, 0

    async def unreachable_at_first(*arguments: Any, **more: Any) -> Status | None:
        nonlocal tries
        tries += 1
        if tries < 4:
            raise LedgerUnavailable("away")
        return await whole(*arguments, **more)

    async def hold(*_: Any, **__: Any) -> None:
        raise ConnectionResetError

    claim = await world.marked()
    monkeypatch.setattr(Ledger, "release_if_held", unreachable_at_first)
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "hold", hold)
        with pytest.raises(LedgerUnavailable):
            await world.dispatch(must_not_run, claim)
    await until(lambda: has_status(world, claim, Status.PENDING))
    row = await world.row(claim.event_id)
    assert (row["failures"], row["abandoned"]) == (0, 0)
    assert await world.value(claim.event_id) is None


# -- we stop ------------------------------------------------------------------------------------------


async def released(world: World, claim: Claim, dispatching: "asyncio.Task[Outcome]") -> None:
    """Cancelled, the event is pending, due now, nothing charged, nothing kept, no marker."""
    dispatching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await dispatching
    row = await world.row(claim.event_id)
    assert (row["status"], row["attempt"], row["failures"], row["abandoned"]) == ("pending", 1, 0, 0)
    assert row["due_in"] <= 0
    assert row["last_error"] is None
    assert await world.effects(claim.event_id) == 0
    assert await world.value(claim.event_id) is None


async def test_stopping_releases_a_running_handler(world: World) -> None:
    """The attempt is interrupted by us, so it is not charged; the handler sees a cancellation."""
    held = HandlerTransaction()
    claim = await world.marked()
    dispatching = asyncio.create_task(world.dispatch(held.as_handler(), claim))
    await held.reaches(1)
    await released(world, claim, dispatching)
    await held.reaches(0)
    await still_works(world)


async def test_an_interrupted_attempt_is_released_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of a shutdown is short: no statement is sent twice."""
    release, released_claims = Ledger.release_if_held, []

    async def noted(ledger: Ledger, claim: Claim, **more: Any) -> Status | None:
        released_claims.append(claim)
        return await release(ledger, claim, **more)

    monkeypatch.setattr(Ledger, "release_if_held", noted)
    held = HandlerTransaction()
    claim = await world.marked()
    dispatching = asyncio.create_task(world.dispatch(held.as_handler(), claim))
    await held.reaches(1)
    await released(world, claim, dispatching)
    assert released_claims == [claim]


async def test_stopping_releases_a_running_thread(world: World, gate: threading.Event) -> None:
    """It cannot be ended, but its transaction is: the row does not wait for it."""
    running = threading.Event()

    def function(event: Event, context: Context) -> None:
        effect_from_thread(event, context)
        running.set()
        gate.wait()

    claim = await world.marked()
    dispatching = asyncio.create_task(world.dispatch(function, claim))
    await asyncio.to_thread(running.wait)
    await released(world, claim, dispatching)
    assert world.slots.free == world.settings.handler_slots - 1
    gate.set()
    await until(lambda: has_free_slot(world))


async def test_stopping_releases_what_waits_for_a_slot(make_world: MakeWorld) -> None:
    """Claimed and not begun: released as well, not left for the lease to run out and be called abandoned."""
    world, held = await make_world(handler_slots=1), HandlerTransaction()
    first = asyncio.create_task(world.dispatch(held.as_handler(), await world.claim()))
    await held.reaches(1)
    claim = await world.marked()
    waiting = asyncio.create_task(world.dispatch(must_not_run, claim))
    await until(lambda: has_status(world, claim, Status.PROCESSING))
    await released(world, claim, waiting)
    held.finish.set()
    assert (await first).kind is Kind.PROCESSED
    assert world.slots.free == 1


@OWN_ENDS
async def test_stopping_does_not_forgive_an_own_end(world: World, own_end: Function) -> None:
    """Released, its committed effects would be doubled by the next attempt: dead instead."""
    running = asyncio.Event()

    async def function(event: Event, context: Context) -> None:
        await own_end(event, context)
        running.set()
        await asyncio.Event().wait()

    claim = await world.marked()
    dispatching = asyncio.create_task(world.dispatch(function, claim))
    await running.wait()
    dispatching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await dispatching
    assert await world.status(claim.event_id) is Status.DEAD
    assert await world.effects(claim.event_id) == 1


async def has_status(world: World, claim: Claim, status: Status) -> bool:
    return await world.status(claim.event_id) is status


# -- the server or the network fails ------------------------------------------------------------------


def commits_and(monkeypatch: pytest.MonkeyPatch, *, really: bool, error: BaseException) -> None:
    """COMMIT is sent, or not, and what comes back is not its success."""

    commit = HandlerConnection.commit

    async def ambiguous(seat: HandlerConnection, last: Statement, **values: object) -> None:
        if really:
            await commit(seat, last, **values)
        raise error

    monkeypatch.setattr(HandlerConnection, "commit", ambiguous)


LOST = [ConnectionResetError("reset"), TimeoutError(), asyncpg.ConnectionDoesNotExistError("gone")]


@pytest.fixture
def _no_probe_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """A timeout makes the probe ask. On a busy machine its commit may take so long that commits count as hanging."""
    monkeypatch.setattr(probe_module, "_LATE_SECONDS", 30)


@pytest.mark.usefixtures("_no_probe_is_late")
@pytest.mark.parametrize("error", LOST, ids=lambda error: type(error).__name__)
async def test_a_commit_whose_answer_is_lost_is_processed(
    world: World, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """The database is asked, and says that it was committed: processed, nothing charged."""
    with monkeypatch.context() as patch:
        commits_and(patch, really=True, error=error)
        _, result, row = await ends(world, handles, Kind.PROCESSED, Status.COMPLETED, effects=1)
    assert (result.action, row["failures"]) == ("handled_well", 0)
    await still_works(world)


@pytest.mark.usefixtures("_no_probe_is_late")
@pytest.mark.parametrize("error", LOST, ids=lambda error: type(error).__name__)
async def test_a_commit_that_never_arrived_is_a_failure(
    world: World, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """The database is asked, and says that it was not: tried again, one effect in the end."""
    with monkeypatch.context() as patch:
        commits_and(patch, really=False, error=error)
        claim, *_ = await ends(world, handles, Kind.FAILED, Status.FAILED, effects=0, error="COMMIT failed: ")
    [again] = await world.ledger.take_over([claim.event_id])
    assert (await world.dispatch(handles, again)).kind is Kind.PROCESSED
    assert await world.effects(claim.event_id) == 1
    await still_works(world)


async def test_a_connection_lost_before_the_commit_is_a_failure(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """COMMIT was never sent: failed, tried again soon, and not left for its lease to run out."""
    complete = Ledger.complete_if_held

    async def once_lost(ledger: Ledger, connection: HandlerConnection, *rest: Any) -> bool:
        connection.driver.terminate()
        return await complete(ledger, connection, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "complete_if_held", once_lost)
        await ends(world, handles, Kind.FAILED, Status.FAILED, effects=0, error="the connection is gone")
    await still_works(world)


async def test_an_own_commit_before_a_lost_one_is_not_doubled(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The handler has committed by itself and begun anew, and its mark is lost with the connection: dead."""

    async def function(event: Event, context: Context) -> None:
        await effect(event, context)
        await context.fetch("COMMIT")
        await context.fetch("BEGIN")

    with monkeypatch.context() as patch:
        commits_and(patch, really=False, error=ConnectionResetError("reset"))
        await ends(world, function, Kind.FAILED, Status.DEAD, effects=1, error="a handler must not commit")
    await still_works(world)


async def test_an_attempt_sets_one_timer(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """For its first statement, the handler and its last statement; and one task, that of the handler."""
    await world.dispatch(handles, await world.claim())  # the connections are open
    claim, loop = await world.claim(), asyncio.get_running_loop()
    made: list[str] = []

    def count(method: str) -> None:
        whole = getattr(loop, method)

        def counted(*given: Any, **named: Any) -> Any:
            made.append(method)
            return whole(*given, **named)

        patch.setattr(loop, method, counted)

    with monkeypatch.context() as patch:
        count("call_at")
        count("create_task")
        assert (await world.dispatch(handles, claim)).kind is Kind.PROCESSED
    assert sorted(made) == ["call_at", "create_task"]


async def test_what_became_of_a_commit_is_asked_on_a_new_connection(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where one is lost, those that are free are lost with it, which is noticed when they are used."""
    commit = HandlerConnection.commit

    async def lost(*_: object, **__: object) -> None:
        raise asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation")

    async def all_lost(seat: HandlerConnection, last: Statement, **values: object) -> None:
        await commit(seat, last, **values)
        assert world.ledger._pool._free
        for free in world.ledger._pool._free:
            patch.setattr(free, "fetch", lost)
        raise ConnectionResetError("reset")

    with monkeypatch.context() as patch:
        patch.setattr(HandlerConnection, "commit", all_lost)
        await ends(world, handles, Kind.PROCESSED, Status.COMPLETED, effects=1)
    await still_works(world)


async def test_a_commit_is_sent_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever comes back: a second COMMIT could only be of another transaction."""
    sent = 0

    async def lost(*_: object, **__: object) -> None:
        nonlocal sent
        sent += 1
        raise ConnectionResetError

    claim = await world.claim()
    with monkeypatch.context() as patch:
        patch.setattr(HandlerConnection, "commit", lost)
        assert (await world.dispatch(handles, claim)).kind is Kind.FAILED
    assert sent == 1


async def test_a_commit_still_under_way_is_waited_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lost to us while the server is still at it: what a read would show now is not how it ends."""
    claim = await world.marked()
    backend = await asyncpg.connect(world.url)

    async def lost(seat: HandlerConnection, *_: object, **__: object) -> None:
        await seat.roll_back()  # our end of it; the server's end is `backend`, which has the mark and will commit
        await backend.execute("BEGIN")
        await backend.execute(
            "UPDATE firstclaim.stripe_events SET status = 'completed', settled_at = now() WHERE event_id = $1",
            claim.event_id,
        )
        raise ConnectionResetError

    async def waits() -> bool:
        waiting = "SELECT count(*) > 0 FROM pg_stat_activity WHERE datname = current_database() AND wait_event = $1"
        return dispatching.done() or await world.database.fetchval(waiting, "transactionid")

    with monkeypatch.context() as patch:
        patch.setattr(HandlerConnection, "commit", lost)
        dispatching = asyncio.create_task(world.dispatch(handles, claim))
        try:
            await until(waits)
            assert not dispatching.done()
            await backend.execute("COMMIT")
            assert (await dispatching).kind is Kind.PROCESSED
        finally:
            await backend.close()
    row = await world.row(claim.event_id)
    assert (row["status"], row["failures"], row["last_error"]) == ("completed", 0, None)


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (Status.PROCESSING, "handled by parallel worker (idempotency lock)"),
        (Status.COMPLETED, "already completed"),
        (Status.DEAD, "is dead: replay it"),
    ],
)
async def test_a_commit_that_was_taken_over_is_a_duplicate(
    world: World, monkeypatch: pytest.MonkeyPatch, status: Status, words: str
) -> None:
    """COMMIT was lost, and another process has the row by then: it is left alone, and the answer names its state."""
    claim = await world.claim()

    async def lost(connection: HandlerConnection, *_: object, **__: object) -> None:
        await connection.roll_back()
        await world.change(claim.event_id, attempt=2)
        await world.settle(claim.event_id, status)
        raise ConnectionResetError

    with monkeypatch.context() as patch:
        patch.setattr(HandlerConnection, "commit", lost)
        result = await world.dispatch(handles, claim)
    assert result == Outcome(Kind.DUPLICATE, "ignored", f"Event {claim.event_id} {words}")
    row = await world.row(claim.event_id)
    assert (row["status"], row["attempt"], row["failures"]) == (status, 2, 0)


async def test_a_database_that_cannot_say_promises_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lost COMMIT and a ledger that is away: raised, for a 503; the row is left to recovery, the slot is free."""

    async def away(*_: Any, **__: Any) -> None:
        raise LedgerUnavailable("away")

    claim = await world.marked()
    with monkeypatch.context() as patch:
        commits_and(patch, really=True, error=ConnectionResetError())
        patch.setattr(Ledger, "committed", away)
        with pytest.raises(LedgerUnavailable):
            await world.dispatch(handles, claim)
    assert await world.status(claim.event_id) is Status.COMPLETED
    assert world.slots.free == world.settings.handler_slots


async def test_a_backend_that_dies_in_the_handler_is_a_failure(world: World) -> None:
    """Its effects die with it; the pool brings a new connection."""

    async def function(event: Event, context: Context) -> None:
        await effect(event, context)
        pid = await context.connection.scalar(text("SELECT pg_backend_pid()"))
        await world.database.execute("SELECT pg_terminate_backend($1)", pid)
        await effect(event, context)

    await fails(world, function, "Error")


@pytest.mark.parametrize("way", ["the driver", "SQLAlchemy"])
async def test_a_backend_that_ends_under_a_statement_is_a_failure(world: World, way: str) -> None:
    """The server says goodbye, the socket may be open for a moment more: that is no doing of the handler's."""

    async def function(event: Event, context: Context) -> None:
        await effect(event, context)
        ending = "SELECT pg_terminate_backend(pg_backend_pid())"
        if way == "the driver":
            await context.fetch(ending)
        else:
            await context.connection.execute(text(ending))

    await fails(world, function, "Error")


@pytest.mark.parametrize("commits_hang", [False, True], ids=["refused", "hopeless"])
async def test_without_a_connection_nothing_is_charged(world: World, unused_tcp_port: int, commits_hang: bool) -> None:
    """No connection for the handler (the server is full, or commits hang), and the ledger answers: released, uncharged.

    Left claimed, its lease would run out and it would count as abandoned: eight times, and it would be dead.
    """
    epoch = Epoch(fresh_seconds=60)
    url = f"postgresql://127.0.0.1:{unused_tcp_port}/x"
    probe = Probe(url, timeout_seconds=5)
    if commits_hang:
        probe.doubt()
        probe.commits_hang = True
    nowhere = HandlerConnections(Places(url, probe, size=1, timeout_seconds=5, epoch=epoch))
    claim = await world.marked()
    seats, world.dispatcher.connections = world.dispatcher.connections, nowhere
    try:
        with pytest.raises(LedgerUnavailable):
            await world.dispatch(must_not_run, claim)
    finally:
        world.dispatcher.connections = seats
        await nowhere.close()
        await probe.close()
    row = await world.row(claim.event_id)
    assert (row["status"], row["failures"], row["abandoned"]) == ("pending", 0, 0)
    assert -15 < row["due_in"] <= 5  # not at once, or recovery would do nothing else
    assert await world.value(claim.event_id) is None
    await still_works(world)


@pytest.mark.usefixtures("_no_probe_is_late")
@pytest.mark.parametrize("error", [TimeoutError(), ConnectionResetError(), asyncpg.AdminShutdownError()])
async def test_a_row_that_cannot_be_locked_charges_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """A pooled connection that turns out to be frozen or dead: the handler has not begun, and so has not failed."""

    async def hold(*_: Any, **__: Any) -> None:
        raise error

    claim = await world.marked()
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "hold", hold)
        with pytest.raises(LedgerUnavailable):
            await world.dispatch(must_not_run, claim)
    row = await world.row(claim.event_id)
    assert (row["status"], row["failures"], row["abandoned"]) == ("pending", 0, 0)
    assert await world.value(claim.event_id) is None
    await still_works(world)


async def fetched(event: Event, context: Context) -> None:
    """One effect, past SQLAlchemy."""
    values = "$1, $2, pg_backend_pid(), pg_current_xact_id()::text"
    sql = f"INSERT INTO effects (event_id, attempt, pid, xid) VALUES ({values})"
    await context.fetch(sql, event.id, context.attempt)


async def test_a_sync_handler_cannot_fetch(world: World) -> None:
    """Nothing would await the call: it raises, or the event would be completed without its effect."""

    def function(event: Event, context: Context) -> None:
        _ = context.fetch("INSERT INTO effects (event_id) VALUES ($1)", event.id)

    await fails(world, function, "context.fetch() is for async handlers; a sync handler calls context.execute()")


async def test_what_is_fetched_is_in_the_transaction(world: World) -> None:
    """The driver's own call writes beside SQLAlchemy's, sees what that wrote, and goes with it if the handler fails."""

    async def writes(event: Event, context: Context) -> None:
        await effect(event, context)
        await fetched(event, context)
        [row] = await context.fetch("SELECT count(*) AS effects FROM effects WHERE event_id = $1", event.id)
        assert row["effects"] == 2

    async def writes_and_fails(event: Event, context: Context) -> None:
        await writes(event, context)
        raise OSError

    await ends(world, writes, Kind.PROCESSED, Status.COMPLETED, effects=2)
    await fails(world, writes_and_fails, "OSError")


@pytest.mark.parametrize("write", [effect, fetched])
async def test_what_outlives_its_handler_cannot_write(
    world: World, write: Callable[[Event, Context], Awaitable[None]]
) -> None:
    """A task that a handler left behind finds its connection closed: the next event's transaction is not its own."""
    let_go, left_behind = asyncio.Event(), []

    async def function(event: Event, context: Context) -> None:
        async def later() -> None:
            await let_go.wait()
            await write(event, context)

        left_behind.append(asyncio.create_task(later()))
        await effect(event, context)

    claim, *_ = await ends(world, function, Kind.PROCESSED, Status.COMPLETED, effects=1)
    let_go.set()
    [error] = await asyncio.gather(*left_behind, return_exceptions=True)
    assert isinstance(error, SQLAlchemyError | HandlerRuleBroken)
    await still_works(world)
    assert await world.effects(claim.event_id) == 1


async def test_a_handler_sees_nothing_of_the_one_before(world: World) -> None:
    """Its server process may be the same, the object around it never is: no option of another handler is on it."""
    connections, pids = [], []

    async def function(event: Event, context: Context) -> None:
        assert "odd" not in await context.connection.run_sync(lambda sync: sync.get_execution_options())
        await context.connection.execution_options(odd=1)
        await effect(event, context)
        pids.append((await context.fetch("SELECT pg_backend_pid() AS pid"))[0]["pid"])
        connections.append(context.connection)

    for _ in range(3):
        await ends(world, function, Kind.PROCESSED, Status.COMPLETED, effects=1)
    assert len(set(pids)) == 1
    assert len(set(map(id, connections))) == 3
    assert all(each.closed for each in connections)


async def test_a_connection_of_another_isolation_is_not_kept(world: World) -> None:
    """A handler that set an isolation level leaves nothing of it to the next one."""

    async def level(context: Context) -> str:
        return str((await context.fetch("SHOW transaction_isolation"))[0][0])

    async def strict(_event: Event, context: Context) -> None:
        await context.connection.execution_options(isolation_level="SERIALIZABLE")

    async def plain(event: Event, context: Context) -> None:
        await effect(event, context)
        assert await level(context) == "read committed"

    await world.dispatch(strict, await world.marked())
    await ends(world, plain, Kind.PROCESSED, Status.COMPLETED, effects=1)


async def test_a_handler_that_closes_its_connection_has_failed(world: World) -> None:
    """Nothing that it wrote is kept, and the connection is given up."""

    async def function(event: Event, context: Context) -> None:
        await effect(event, context)
        await context.connection.close()

    await fails(world, function, "must not close its connection")


async def test_a_handler_that_closes_the_raw_connection_has_failed(world: World) -> None:
    """As well, and it is known at once: the row does not wait for its lease."""

    async def function(event: Event, context: Context) -> None:
        await effect(event, context)
        raw = await context.connection.get_raw_connection()
        raw.close()

    await fails(world, function, "must not close its connection")
