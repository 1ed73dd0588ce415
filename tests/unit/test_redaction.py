"""Redaction of errors: what is masked, what is cut off, and that it never raises."""

import time

import pytest
from sqlalchemy.exc import DBAPIError

from firstclaim.errors import Permanent
from firstclaim.observability.redaction import describe_error, is_a, redact, redacted_error

CANARY = "c4n4rypw"


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("bad key sk_live_51Habc_DEF9", "bad key [redacted]"),
        ("rk_test_1 and pk_live_2", "[redacted] and [redacted]"),
        ("whsec_abc123: no match", "[redacted]: no match"),
        ("to <jo.o'neill@mail.example.com>", "to <jo.o'[redacted]>"),
        ("jo+tag@example.co.uk, jane@x.io", "[redacted], [redacted]"),
        ("card 4242424242424242 declined", "card [redacted] declined"),
        ("card 4242 4242 4242 4242 declined", "card [redacted] declined"),
        ("card 4242-4242-4242-4242", "card [redacted]"),
        ("amex 378282246310005", "amex [redacted]"),
        ("postgresql://me:pw@db:5432/x", "postgresql://[redacted]@db:5432/x"),
        ("redis://:pw@cache", "redis://[redacted]@cache"),
        ("https://token@git.example.com/x", "[redacted]/x"),
        ("in_1Sca5RKdVq2Wn7RtLxQt0Jx7 of evt_1, 12 EUR", "in_1Sca5RKdVq2Wn7RtLxQt0Jx7 of evt_1, 12 EUR"),
        ("at 1793610041 (10 digits)", "at 1793610041 (10 digits)"),
    ],
)
def test_secrets_and_personal_data_are_masked(text: str, masked: str) -> None:
    """Stripe's secrets, e-mail addresses, card numbers and credentials in URLs are masked; ids and times are kept."""
    assert redact(text) == masked


@pytest.mark.parametrize("character", ["\n", "\r", "\t", "\0", "\x1b", "\x7f", "\x9b", "\u2028", "\u202e", "\ud800"])
def test_one_printable_line(character: str) -> None:
    """Line breaks, terminal escapes, direction overrides and lone surrogates are replaced."""
    assert redact(f"a{character}b") == "a b"


def test_it_is_short() -> None:
    """The result has at most 500 characters, and a shorter text is kept whole."""
    assert redact("word " * 1000) == ("word " * 100)
    assert len(redact("x" * 1000)) == 500
    assert redact("x" * 500) == "x" * 500
    assert redact("") == ""


def test_a_cut_leaves_no_half_of_a_secret() -> None:
    """A secret that either cut would split is masked or removed, although the pattern does not match its first half."""
    secret = f" postgresql://me:{CANARY}@db.internal/shop"
    for place in range(450, 501):
        assert CANARY not in redact("x" * place + secret)
    for place in range(1950, 2001):  # masking shortens this text, which moves the first cut in front of the second
        masked = redact("sk_" + "x" * (place - 3) + secret)
        assert masked.startswith("[redacted]")
        assert CANARY not in masked


@pytest.mark.parametrize("text", ["x" * 10**6, "x@" * 10**6, "1 " * 10**6, "://" * 10**6, "sk_" * 10**6])
def test_a_huge_message_costs_nothing(text: str) -> None:
    """A handler that raises with a whole payload in its message does not block the event loop."""
    began = time.process_time()
    assert len(redact(text)) <= 500
    assert time.process_time() - began < 0.25  # it takes 2 ms; searching the whole text took hours


def test_an_error_is_described_without_its_message() -> None:
    """The description is the class and the place, and holds nothing of the message."""
    try:
        raise Permanent(CANARY)
    except Permanent as error:
        description = describe_error(error)
    assert description.startswith("Permanent at tests/unit/test_redaction.py:")
    assert describe_error(ValueError(CANARY)) == "ValueError"


def test_a_redacted_error_holds_no_secrets() -> None:
    """The operator gets the class and the redacted first line; of a database error, the driver's message."""
    assert redacted_error(ValueError("a@example.com\nDETAIL: all of the row")) == "ValueError: [redacted]"
    assert redacted_error(ValueError()) == "ValueError: "
    original = RuntimeError("duplicate key\nDETAIL: Key (email)=(a@example.com)")
    wrapped = DBAPIError("INSERT INTO people VALUES (%s)", ["a@example.com"], original)
    assert redacted_error(wrapped) == "DBAPIError: duplicate key"


def test_an_error_whose_str_raises_is_named() -> None:
    """An exception whose `str()` raises is described by its class, and raises nothing here."""

    class UnreadableError(Exception):
        def __str__(self) -> str:
            raise RuntimeError(CANARY)

    assert redacted_error(UnreadableError()) == "UnreadableError: its message cannot be read"
    assert describe_error(UnreadableError()) == "UnreadableError"


class HostileType(type):
    """Of classes whose name cannot be read."""

    @property
    def __name__(cls) -> str:  # type: ignore[override]
        raise RuntimeError(CANARY)


class HostileError(Exception, metaclass=HostileType):
    """An exception each of whose attributes raises."""

    def __getattribute__(self, name: str) -> object:
        raise RuntimeError(CANARY)

    def __str__(self) -> str:
        raise SystemExit(CANARY)


def test_an_error_whose_attributes_raise_is_named() -> None:
    """An exception whose attributes and class name raise is described like any other: class, place, no message."""
    error: BaseException | None = None
    try:
        raise HostileError
    except HostileError as raised:
        error = raised
    assert describe_error(error).startswith("HostileError at tests/unit/test_redaction.py:")
    assert redacted_error(error) == "HostileError: its message cannot be read"
    assert is_a(error, HostileError)
    assert not is_a(error, Permanent)
