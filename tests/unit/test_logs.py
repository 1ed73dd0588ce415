"""Logs: what is masked, what never gets in, and that no line can be forged."""

import asyncio
import gc
import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import structlog
from sqlalchemy.exc import DBAPIError

from service.errors import Permanent
from service.logs import configure, describe_error, redact, tell_error

CANARY = "c4n4rypw"


# -- redact -------------------------------------------------------------------------------------------


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
def test_secrets_and_people_are_masked(text: str, masked: str) -> None:
    """Stripe's secrets, e-mail addresses, card numbers and credentials of URLs go, ids and instants stay."""
    assert redact(text) == masked


@pytest.mark.parametrize("character", ["\n", "\r", "\t", "\0", "\x1b", "\x7f", "\x9b", "\u2028", "\u202e", "\ud800"])
def test_one_printable_line(character: str) -> None:
    """No line break, terminal escape, override of direction or lone surrogate is kept."""
    assert redact(f"a{character}b") == "a b"


def test_it_is_short() -> None:
    """500 characters at most, whatever was given; a short text is kept whole."""
    assert redact("word " * 1000) == ("word " * 100)
    assert len(redact("x" * 1000)) == 500
    assert redact("x" * 500) == "x" * 500
    assert redact("") == ""


def test_nothing_hides_behind_the_cut() -> None:
    """Neither cut leaves the half of a secret standing whose other half, by which it is known, was cut off first."""
    secret = f" postgresql://me:{CANARY}@db.internal/shop"
    for place in range(450, 501):
        assert CANARY not in redact("x" * place + secret)
    for place in range(1950, 2001):  # masked itself, it brings what stands at the first cut before the second
        masked = redact("sk_" + "x" * (place - 3) + secret)
        assert masked.startswith("[redacted]")
        assert CANARY not in masked


@pytest.mark.parametrize("text", ["x" * 10**6, "x@" * 10**6, "1 " * 10**6, "://" * 10**6, "sk_" * 10**6])
def test_a_huge_message_costs_nothing(text: str) -> None:
    """A handler that raises with a whole payload in its message does not hold up the event loop."""
    began = time.process_time()
    assert len(redact(text)) <= 500
    assert time.process_time() - began < 0.25  # it is 2 ms; searching all of it was hours


def test_an_error_is_described_without_its_message() -> None:
    """Class and place, which say where to look, and nothing that a payload may have put into the message."""
    try:
        raise Permanent(CANARY)
    except Permanent as error:
        description = describe_error(error)
    assert description.startswith("Permanent at test_logs.py:")
    assert describe_error(ValueError(CANARY)) == "ValueError"


def test_an_error_is_told_without_secrets() -> None:
    """To the operator: class and first line, redacted; of a database's error the driver's own words."""
    assert tell_error(ValueError("a@example.com\nDETAIL: all of the row")) == "ValueError: [redacted]"
    assert tell_error(ValueError()) == "ValueError: "
    original = RuntimeError("duplicate key\nDETAIL: Key (email)=(a@example.com)")
    wrapped = DBAPIError("INSERT INTO people VALUES (%s)", ["a@example.com"], original)
    assert tell_error(wrapped) == "DBAPIError: duplicate key"


def test_an_error_that_cannot_be_told_is_named() -> None:
    """An exception whose message raises is an exception like any other: what follows on it goes on."""

    class MuteError(Exception):
        def __str__(self) -> str:
            raise RuntimeError(CANARY)

    assert tell_error(MuteError()) == "MuteError: its message cannot be told"
    assert describe_error(MuteError()) == "MuteError"


# -- the lines ----------------------------------------------------------------------------------------


@contextmanager
def configured(log_format: str = "json") -> Iterator[None]:
    """Our logging while the block runs; pytest exchanges its own handlers between a fixture and its test."""
    root = logging.getLogger()
    handlers, level, ours = root.handlers, root.level, structlog.get_config()
    configure(log_format, "info")
    try:
        yield
    finally:
        root.handlers = handlers
        root.setLevel(level)
        structlog.configure(**ours)


def written(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """The lines on standard error, read as JSON."""
    text = capsys.readouterr().err
    assert text.isascii()
    return [json.loads(line) for line in text.splitlines()]


def test_one_json_object_per_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Ours and any library's lines have one shape, with level and a UTC instant."""
    with configured():
        structlog.get_logger("ours").info("delivery", event_id="evt_1", milliseconds=1.5)
        logging.getLogger("theirs").warning("it %s", "happened")
    ours, theirs = written(capsys)
    assert (ours.pop("event"), ours.pop("level"), ours.pop("event_id")) == ("delivery", "info", "evt_1")
    assert ours.pop("milliseconds") == 1.5
    assert ours.pop("timestamp").endswith("Z")
    assert not ours
    assert (theirs["event"], theirs["level"]) == ("it happened", "warning")
    assert theirs["timestamp"].endswith("Z")


def test_an_exception_leaves_neither_message_nor_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    """What an exception says may quote a payload: its class and place are logged, whoever logs it."""
    with configured():
        for logger in (structlog.get_logger("ours"), logging.getLogger("theirs")):
            try:
                raise RuntimeError(CANARY) from KeyError(CANARY)
            except RuntimeError:
                logger.exception("it_broke")
    lines = written(capsys)
    assert len(lines) == 2
    for line in lines:
        assert line["event"] == "it_broke"
        assert line["error"].startswith("RuntimeError at test_logs.py:")
        assert not {"exception", "exc_info", "stack", "traceback"} & set(line)
        assert CANARY not in json.dumps(line)


async def test_a_forgotten_tasks_exception_leaves_no_message(capsys: pytest.CaptureFixture[str]) -> None:
    """asyncio's own complaint about a task that nobody awaited shows its exception's class only."""

    async def breaks() -> None:
        raise RuntimeError(CANARY)

    with configured():
        task = asyncio.ensure_future(breaks())
        await asyncio.wait({task})
        del task
        gc.collect()
    [line] = written(capsys)
    assert "never retrieved" in line["event"]
    assert "RuntimeError at test_logs.py:" in line["error"]
    assert CANARY not in json.dumps(line)


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_no_value_can_forge_a_line(capsys: pytest.CaptureFixture[str], log_format: str) -> None:
    """Line breaks and terminal escapes of a value, wherever it stands, are written as escapes."""
    nasty = 'evt\n{"event":"forged"}\r\x1b[2J\u2028\u202e\ud800'
    with configured(log_format):
        structlog.get_logger("ours").info(nasty, event_id=nasty, nested=[nasty, {"a": nasty}])
        logging.getLogger("theirs").warning("got %s", nasty)
    text = capsys.readouterr().err
    assert text.count("\n") == len(text.splitlines()) == 2
    assert not set("\r\x1b\u2028\u202e\ud800") & set(text)


def test_levels_hold(capsys: pytest.CaptureFixture[str]) -> None:
    """What is below the level is not written; chatty libraries speak from warning on."""
    with configured():
        structlog.get_logger("ours").debug("quiet")
        for chatty in ("uvicorn.access", "asyncio", "httpx", "alembic"):
            logging.getLogger(chatty).info("quiet")
        logging.getLogger("uvicorn.error").info("started", extra={"color_message": "\x1b[1mstarted"})
    [line] = written(capsys)
    assert line["event"] == "started"
    assert "color_message" not in line
