"""A connection that begins a transaction with its first statement, and commits it with its last, in one round trip.

Guarantees: the values are bound, as everywhere. If the last statement fails, the server does not execute the COMMIT
after it: both are sent before one Sync, and after an error the server skips all messages up to the Sync. So a last
statement that raises an error in the server where it changes nothing (`COMPLETE` does) is never committed over. What
COMMIT has done is read from its command tag: a transaction that was aborted answers ROLLBACK, and raises no error.

asyncpg sends one statement for each Sync, and has no interface for more. Here the messages of one statement are held
by its transport (`firstclaim.postgres.joined_writes`), and then the driver sends the next statement, and the Sync, in
the same write. (As two writes, they woke the server twice: 11 us more of it and 21 us more of the worker an event.) The
driver takes the answers to both for those of one statement: of an error the first, of the command tags the last, and
rows it decodes as those of the last statement. So the first of the two must return no rows. That is how asyncpg 0.31
and 0.32 work, and no other version is installed; whether it was so is checked at each use: after BEGIN by the state of
the transaction, after COMMIT by its tag.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from typing import Any

import asyncpg
from asyncpg.prepared_stmt import PreparedStatement

from firstclaim.errors import LedgerUnavailable
from firstclaim.postgres.joined_writes import JoinedWrites, JoiningLoop

NOT_REPLICATED = "the wait for the synchronous standby was cancelled"

_WARNING = "01000"
_BEGIN, _COMMIT = "firstclaim_begin", "firstclaim_commit"  # names that a tap on the connection finds
_INT16, _INT32 = Struct("!h").pack, Struct("!i").pack
_NULL = _INT32(-1)
_EXECUTE = b"E" + _INT32(9) + b"\0" + _INT32(0)  # the unnamed portal, all rows
_AS_TEXT = _INT16(0)
_ESCAPED = str.maketrans({"\\": r"\\", '"': r"\""})


class NotCommitted(Exception):
    """Nothing of the transaction is committed, for this reason."""

    def __init__(self, reason: Exception) -> None:
        super().__init__(reason)
        self.reason = reason


class OneRoundTripConnection(asyncpg.Connection):
    """An asyncpg connection with `begin` and `commit`, if it is connected with a `JoiningLoop`.

    `warnings` counts the warnings of SQLSTATE 01000 that the server has sent: a COMMIT whose wait for the synchronous
    standby was cancelled succeeds with one.
    """

    warnings: int = 0
    _transport: JoinedWrites  # this and the next are the driver's own; it has no public names for them
    _protocol: Any

    def __init__(self, protocol: Any, transport: Any, loop: Any, *arguments: Any) -> None:
        super().__init__(protocol, transport, loop.real if isinstance(loop, JoiningLoop) else loop, *arguments)
        self._ready: dict[str, PreparedStatement[Any]] = {}

    def note_log_message(self, _: object, message: asyncpg.PostgresLogMessage) -> None:
        """Count a warning. The driver calls this before whoever awaits the statement resumes."""
        self.warnings += message.sqlstate == _WARNING

    async def begin(self, first: str, values: Sequence[object]) -> list[Any]:
        """Begin a transaction. Returns the rows of its first statement.

        Raises what asyncpg raises. Close the connection then, before any await after a timeout of the caller's.
        """
        begin, statement = await self._prepared("BEGIN", _BEGIN), await self._prepared(first)
        await self._prepared("COMMIT", _COMMIT)  # at first use, here rather than between the last statement and COMMIT
        rows = await self._fetch_after(_call(begin, ()), statement, *values)
        if self.is_closed() or not self.is_in_transaction():
            raise asyncpg.InternalClientError("the server has begun no transaction")
        return rows

    async def commit(self, last: str, values: Sequence[object]) -> None:
        """Commit the transaction after its last statement, which returns no rows.

        Raises `NotCommitted` if there is none; if the driver sent nothing, or the server refused `last` and did not
        execute COMMIT (the transaction is still open then, or the connection closed); or if COMMIT has rolled back.
        After any other error it is not known whether it is committed: close the connection, before any await.
        `LedgerUnavailable`: it is committed, and may not be replicated.
        """
        if not self.is_closed() and not self.is_in_transaction():
            raise NotCommitted(asyncpg.NoActiveSQLTransactionError("the transaction has ended"))
        try:
            statement, commit = await self._prepared(last), await self._prepared("COMMIT", _COMMIT)
            call = _call(statement, values)
        except Exception as error:
            raise NotCommitted(error) from error
        warnings = self.warnings
        try:
            await self._fetch_after(call, commit)
        except asyncpg.InterfaceError as error:
            raise NotCommitted(error) from error
        except asyncpg.PostgresError as error:
            # After a COMMIT that fails, the server is in no transaction. What the driver raises for a lost connection
            # has no severity.
            if error.severity is not None and not self.is_closed() and self.is_in_transaction():
                raise NotCommitted(error) from error
            raise
        if (tag := commit.get_statusmsg()) != "COMMIT":
            self.terminate()
            raise NotCommitted(asyncpg.InFailedSQLTransactionError(f"the server has answered COMMIT with {tag}"))
        if self.warnings != warnings:
            raise LedgerUnavailable(NOT_REPLICATED)

    async def _prepared(self, sql: str, name: str | None = None) -> PreparedStatement[Any]:
        if (statement := self._ready.get(sql)) is None:
            statement = self._ready[sql] = await self.prepare(sql, name=name)
        return statement

    async def _fetch_after(self, messages: bytes, statement: PreparedStatement[Any], *values: object) -> list[Any]:
        """The rows of `statement`, which the server executes after `messages`. InterfaceError: neither was sent.

        The driver refuses it if another statement is running, and does not say so before.
        """
        if self.is_closed():
            raise asyncpg.InterfaceError("the connection is closed")
        if self._protocol._is_cancelling():  # noqa: SLF001  (an earlier statement, whose answer is still to come)
            await statement.executemany(())  # executes nothing, and waits for that
        self._transport.hold(messages)
        try:
            return await statement.fetch(*values)
        finally:
            self._transport.drop()


def _call(statement: PreparedStatement[Any], values: Sequence[object]) -> bytes:
    """The messages Bind and Execute: call a prepared statement with these values, all of them in text format."""
    bind = b"\0%b\0%b%b" % (statement.get_name().encode(), _AS_TEXT, _INT16(len(values)))
    for value in values:
        if value is None:
            bind += _NULL
        else:
            encoded = (value if type(value) is str else _as_text(value)).encode()
            bind += _INT32(len(encoded)) + encoded
    return b"B%b%b%b%b" % (_INT32(len(bind) + 6), bind, _AS_TEXT, _EXECUTE)


def _as_text(value: object) -> str:
    """A value as Postgres reads it: a string, a number, or an array of these."""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, list | tuple):
        return "{" + ",".join(_element(each) for each in value) + "}"
    raise TypeError(f"a value of type {type(value).__name__} cannot be bound")


def _element(value: object) -> str:
    return "NULL" if value is None else '"' + _as_text(value).translate(_ESCAPED) + '"'
