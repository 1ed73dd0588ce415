"""Which failures belong together: by handler, class and line of the user's code, and by nothing that an event holds."""

import pytest

from firstclaim.observability.failure import Failure, failure_columns, failure_of

NAME = "shop.handlers.grant"


def raised(text: str) -> ValueError:
    """An error of one and the same line, with another message each time."""
    try:
        raise ValueError(text)
    except ValueError as error:
        return error


def raised_elsewhere(text: str) -> ValueError:
    try:
        raise ValueError(text)
    except ValueError as error:
        return error


def test_one_line_is_one_group_whatever_the_message() -> None:
    """The message is in no field, and two errors of one line are of one group; handler, class or line make another."""
    first, second = failure_of(raised("cus_1"), NAME), failure_of(raised("cus_2"), NAME)
    assert first == second
    assert first.group == second.group
    assert first.handler == NAME
    assert first.error_class == "ValueError"
    assert first.place is not None
    assert first.place.startswith("tests/unit/test_failure.py:")
    assert first.place.endswith(" in raised")
    others = [failure_of(raised_elsewhere("cus_1"), NAME), failure_of(raised("cus_1"), "shop.handlers.revoke")]
    others.append(Failure(NAME, "KeyError", first.place))
    assert len({first.group, *(each.group for each in others)}) == 4
    assert "cus_" not in str(failure_columns(first))


def test_an_error_group_counts_as_its_first_error() -> None:
    """A task group wraps what its tasks raise: the failure is the first of these, and its line."""
    wrapped = BaseExceptionGroup("tasks", [ExceptionGroup("inner", [raised("x")]), KeyError("y")])
    assert failure_of(wrapped, NAME) == failure_of(raised("x"), NAME)


def test_an_error_of_no_line_is_placed_at_the_handler() -> None:
    """A broken rule was raised by no line of the user's: its place is the handler's definition, else none."""
    assert failure_of(ValueError(), NAME, raised).place == (
        f"tests/unit/test_failure.py:{raised.__code__.co_firstlineno} in raised"
    )
    nowhere = failure_of(ValueError(), NAME)
    assert nowhere.place is None
    assert len(nowhere.group) == 12


@pytest.mark.parametrize("name", ["a@example.com", "Evil\x1b[2J\u202e", "x" * 5000])
def test_generated_names_are_redacted(name: str) -> None:
    """Generated code may have any name: what the ledger cannot store, or nobody may read, is not in it."""
    failure = failure_of(type(name, (Exception,), {})(), name)
    assert (failure.handler + failure.error_class).isprintable()
    assert "@" not in failure.handler + failure.error_class
    assert len(failure.handler) <= 500


def test_a_retry_that_was_asked_for_is_noted_as_such() -> None:
    """It is the same group with or without it: the ledger decides by the event's status whether it counts."""
    failure, requested = failure_of(raised("x"), NAME), failure_of(raised("x"), NAME, requested=True)
    assert failure.group == requested.group
    assert failure_columns(requested)["requested"] is True
    assert set(failure_columns(None).values()) == {None, False}
