"""The savepoints of a handler, as its SQL spells them."""

import pytest

from firstclaim.postgres.savepoints import Savepoints

REFUSED = "an error that the handler swallowed"


def after(*statements: str) -> str | None:
    """What is refused after these statements; `refused` stands for one that the driver refused."""
    savepoints: Savepoints[str | None] = Savepoints()
    refused: str | None = None
    for sql in statements:
        refused = REFUSED if sql == "refused" else savepoints.executed(sql, refused)
    return refused


@pytest.mark.parametrize(
    ("sets", "undoes"),
    [
        ("SAVEPOINT a", "ROLLBACK TO a"),
        ("savepoint a;", "rollback to savepoint A;"),
        ("SAVEPOINT a", "ROLLBACK WORK TO SAVEPOINT a"),
        ("SAVEPOINT a", "ROLLBACK TRANSACTION TO a"),
        ("SAVEPOINT a", 'ROLLBACK TO "a"'),
        ('SAVEPOINT "a ""b"""', 'ROLLBACK TO SAVEPOINT"a ""b"""'),
        ("/* part */ SAVEPOINT a", "-- undo it\n\tROLLBACK /* all */ TO a -- of it"),
        ("SAVEPOINT/**/a", "ROLLBACK\nTO/***/SAVEPOINT--\na"),
        ("SAVEPOINT savepoint", "ROLLBACK TO SAVEPOINT"),
    ],
)
def test_a_savepoint_is_recognised(sets: str, undoes: str) -> None:
    """However SQL spells the two statements, the refusal between them is undone, and one before them is not."""
    assert after(sets, "refused", undoes) is None
    assert after("refused", sets, undoes) == REFUSED


@pytest.mark.parametrize(
    "undoes",
    [
        "RELEASE a",
        "ROLLBACK TO b",
        'ROLLBACK TO "A"',
        "ROLLBACKTO a",
        "SELECT 'ROLLBACK TO a'",
        "-- ROLLBACK TO a",
        "SAVEPOINT a",
    ],
)
def test_nothing_else_undoes(undoes: str) -> None:
    """A release keeps what was refused, and so does what only looks like a rollback to the savepoint."""
    assert after("SAVEPOINT a", "refused", undoes) == REFUSED


def test_the_innermost_savepoint_of_a_name_counts() -> None:
    """As in Postgres: one of the same name hides the outer one until it is released, or undone with another."""
    assert after("SAVEPOINT a", "refused", "SAVEPOINT a", "ROLLBACK TO a") == REFUSED
    assert after("SAVEPOINT a", "refused", "SAVEPOINT a", "RELEASE a", "ROLLBACK TO a") is None
    assert (
        after("SAVEPOINT a", "SAVEPOINT b", "refused", "SAVEPOINT a", "ROLLBACK TO b", "refused", "ROLLBACK TO a")
        is None
    )
    assert after("SAVEPOINT a", "SAVEPOINT b", "RELEASE SAVEPOINT a", "refused", "ROLLBACK TO b") == REFUSED
    assert after("SAVEPOINT a", "refused", "ROLLBACK TO a", "refused", "ROLLBACK TO a") is None


def test_a_long_comment_costs_no_time() -> None:
    """A statement that begins with thousands of comments is read once."""
    assert after("/* * */" * 10_000 + "SELECT 1", "SAVEPOINT a") is None
