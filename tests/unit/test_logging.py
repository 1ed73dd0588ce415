"""Logs: what they never contain, and that no value can forge a line."""

import asyncio
import gc
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import structlog

from firstclaim.observability.logging import configure

CANARY = "c4n4rypw"


@contextmanager
def configured(log_format: str = "json") -> Iterator[None]:
    """Use our logging while the block runs. Not a fixture: pytest replaces its handlers between fixture and test."""
    root = logging.getLogger()
    handlers, level, ours = root.handlers, root.level, structlog.get_config()
    configure(log_format, "info")
    try:
        yield
    finally:
        for handler in root.handlers:
            handler.flush()  # as at the end of a process
        root.handlers = handlers
        root.setLevel(level)
        structlog.configure(**ours)


def written(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """The lines on standard error, parsed as JSON."""
    text = capsys.readouterr().err
    assert text.isascii()
    return [json.loads(line) for line in text.splitlines()]


def test_one_json_object_per_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Our own records and those of libraries have the same form, with a level and a UTC time."""
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


def test_an_exception_is_logged_without_message_and_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    """Of an exception only the class and the place are logged, through any logger: its message may quote a payload."""
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
        assert line["error"].startswith("RuntimeError at tests/unit/test_logging.py:")
        assert not {"exception", "exc_info", "stack", "traceback"} & set(line)
        assert CANARY not in json.dumps(line)


async def test_an_unretrieved_exception_is_logged_without_message(capsys: pytest.CaptureFixture[str]) -> None:
    """asyncio's own record of a task's exception that was never retrieved holds only its class and place."""

    async def breaks() -> None:
        raise RuntimeError(CANARY)

    with configured():
        task = asyncio.ensure_future(breaks())
        await asyncio.wait({task})
        del task
        gc.collect()
    [line] = written(capsys)
    assert "never retrieved" in line["event"]
    assert "RuntimeError at tests/unit/test_logging.py:" in line["error"]
    assert CANARY not in json.dumps(line)


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_no_value_can_forge_a_line(capsys: pytest.CaptureFixture[str], log_format: str) -> None:
    """Line breaks and terminal escapes in any value, also a nested one, are written as escape sequences."""
    nasty = 'evt\n{"event":"forged"}\r\x1b[2J\u2028\u202e\ud800'
    with configured(log_format):
        structlog.get_logger("ours").info(nasty, event_id=nasty, nested=[nasty, {"a": nasty}])
        logging.getLogger("theirs").warning("got %s", nasty)
    text = capsys.readouterr().err
    assert text.count("\n") == len(text.splitlines()) == 2
    assert not set("\r\x1b\u2028\u202e\ud800") & set(text)


def test_records_below_the_level_are_dropped(capsys: pytest.CaptureFixture[str]) -> None:
    """Records below the level are not written; verbose libraries are limited to warnings."""
    with configured():
        structlog.get_logger("ours").debug("quiet")
        for verbose in ("uvicorn.access", "asyncio", "httpx", "alembic"):
            logging.getLogger(verbose).info("quiet")
        logging.getLogger("uvicorn.error").info("started", extra={"color_message": "\x1b[1mstarted"})
    [line] = written(capsys)
    assert line["event"] == "started"
    assert "color_message" not in line
