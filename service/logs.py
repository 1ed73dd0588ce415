"""Logs: one JSON object per line, or readable lines on a terminal; never a payload, never a secret.

Guarantees: every record, uvicorn's and any library's too, goes through one renderer that escapes control
characters; an exception is logged as its class and the place it was raised, never with its message, which
may hold anything that a payload held. `redact` is what the ledger's `last_error` goes through.
"""

import json
import logging
import re
import sys
import traceback
from types import TracebackType

import orjson
import structlog
from structlog.typing import EventDict, WrappedLogger

_ERROR_MOST_CHARACTERS = 500
_READ_MOST_CHARACTERS = 2000  # of a longer text nothing beyond is looked at: a search of 60 kB took 20 s

# What must not be kept of an error's message: credentials in URLs, Stripe's secrets, addresses, card numbers.
_SECRET = re.compile(
    r"(?P<url>(?<=://)[^/\s@]+(?=@))"
    r"|\b(?:sk|rk|pk|whsec)_[A-Za-z0-9_]+"
    r"|[^\s@<>'\"]+@[^\s@<>'\"]+\.[A-Za-z]{2,}"
    r"|\b(?:\d[ -]?){12,18}\d\b"
)


def redact(text: str) -> str:
    """`text` with secrets, e-mail addresses and card numbers masked, one printable line, at most 500 characters."""
    read = text[:_READ_MOST_CHARACTERS]
    if len(text) > len(read):  # the cut may go through a secret, whose first half the pattern would not know
        read = read.rpartition(" ")[0] or read
    line = "".join(character if character.isprintable() else " " for character in read)
    return _SECRET.sub("[redacted]", line)[:_ERROR_MOST_CHARACTERS]


def describe_error(error: BaseException) -> str:
    """The class of `error` and where it was raised, without its message: safe to log."""
    return type(error).__name__ + _place(error.__traceback__)


def tell_error(error: BaseException) -> str:
    """The class of `error` and the first line of its message, redacted: for the operator and the ledger, not to log.

    Only the first line, for a database's error goes on with the row and the parameters.
    """
    original = getattr(error, "orig", None) or error
    try:
        message = (str(original).splitlines() or [""])[0]
    except Exception:  # noqa: BLE001  (what was being told about has to be settled all the same)
        message = "its message cannot be told"
    return redact(f"{type(error).__name__}: {message}")


def _place(trace: TracebackType | None) -> str:
    frames = traceback.extract_tb(trace)
    return f" at {frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno}" if frames else ""


def configure(log_format: str, level: str) -> None:
    """Send structlog and the standard library's logging through one renderer to standard error.

    `log_format` is `json`, `console` or `auto` (console on a terminal).
    """
    console = log_format == "console" or (log_format == "auto" and sys.stderr.isatty())
    processors: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _place_of_exception,
        _printable,
    ]
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
        if console
        else structlog.processors.JSONRenderer(serializer=_json)
    )
    # Our own records are a line per delivery: straight to the stream, past the standard library's machinery.
    structlog.configure(
        processors=[*processors, renderer],
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        wrapper_class=structlog.make_filtering_bound_logger(level),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.ExtraAdder(), _plain, *processors],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, _printable, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    for chatty in ("uvicorn.access", "asyncio", "httpx", "httpcore", "alembic"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    for name in ("uvicorn", "uvicorn.error"):
        logging.getLogger(name).handlers = []
        logging.getLogger(name).propagate = True


def _json(record: EventDict, **_: object) -> str:
    """In ASCII: what is no plain text in a nested value is escaped too."""
    try:
        line = orjson.dumps(record, default=repr).decode()
    except TypeError:  # a lone surrogate, an odd key
        return json.dumps(record, default=repr)
    return line if line.isascii() else json.dumps(record, default=repr)


def _plain(_: WrappedLogger, __: str, record: EventDict) -> EventDict:
    """Of a library's record what we want of it: uvicorn's has every line a second time, in colours."""
    record.pop("color_message", None)
    if getattr(record.get("_record"), "name", None) == "asyncio":
        # Of an exception that nobody retrieved, the lines after the first show the message, and even locals.
        record["event"] = str(record["event"]).partition("\n")[0]
    return record


def _place_of_exception(_: WrappedLogger, __: str, record: EventDict) -> EventDict:
    """No traceback and no message: what an exception says may quote what a payload said."""
    info = record.pop("exc_info", None)
    if info is True:
        info = sys.exc_info()
    error = info[1] if isinstance(info, tuple) else info
    if isinstance(error, BaseException):
        record["error"] = describe_error(error)
    return record


def _printable(_: WrappedLogger, __: str, record: EventDict) -> EventDict:
    """An id or a path from outside cannot forge a line or move a terminal's cursor."""
    for name, value in record.items():
        if isinstance(value, str) and not value.isprintable():
            record[name] = value.encode("unicode_escape").decode("ascii")
    return record
