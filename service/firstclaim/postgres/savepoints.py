"""The savepoints that a handler has set in its transaction, read off the statements that were executed.

Guarantees: a ROLLBACK TO is matched to the savepoint that Postgres rolls back to: the innermost of that name that is
still set. Names are compared as Postgres compares them. Only executed statements count: a RELEASE that the server
refuses in an aborted transaction releases nothing. A statement that is not recognised leaves everything as it was.
"""

import re
from typing import Generic, TypeVar

T = TypeVar("T")

_GAP = r"(?:\s|--[^\n]*+|/\*(?:[^*]|\*(?!/))*+\*/)"  # possessive: what a comment holds is never read as SQL
_STATEMENT = re.compile(
    rf"{_GAP}*+(?:(?P<set>SAVEPOINT)"
    rf"|(?P<release>RELEASE)(?:{_GAP}+SAVEPOINT)?"
    rf"|ROLLBACK(?:{_GAP}+(?:WORK|TRANSACTION))?{_GAP}+TO(?:{_GAP}+SAVEPOINT)?)"
    rf'{_GAP}*+(?:(?<=[\s/])(?P<plain>[^\W\d][\w$]*)|"(?P<quoted>(?:[^"]|"")+)")',
    re.IGNORECASE,
)


class Savepoints(Generic[T]):
    """Those that are set, and for each what was noted when it was set: what was refused, for example."""

    def __init__(self) -> None:
        self._set: list[tuple[str, T]] = []

    def clear(self) -> None:
        """A transaction begins."""
        self._set.clear()

    def executed(self, sql: str, noted: T) -> T:
        """After a statement. Returns what is noted now: what was noted since a savepoint is undone with it."""
        if (found := _STATEMENT.match(sql)) is None:
            return noted
        name = found["plain"].lower() if found["plain"] else found["quoted"].replace('""', '"')
        if found["set"]:
            self._set.append((name, noted))
            return noted
        position = next((n for n in reversed(range(len(self._set))) if self._set[n][0] == name), None)
        if position is None:
            return noted
        if found["release"]:
            del self._set[position:]
            return noted
        del self._set[position + 1 :]
        return self._set[position][1]
