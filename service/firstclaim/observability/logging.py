"""Logs: one JSON object per line, or readable lines on a terminal; never a payload, never a secret.

Guarantees: every record, also of uvicorn and of any library, goes through one renderer that escapes control characters,
and to one stream, which writes ordinary lines together every 10 ms (see `firstclaim.observability.log_lines`).
An exception is logged as its class and the place where it was raised, never with its message (see
`firstclaim.observability.redaction`).
"""

import json
import logging
import sys
from datetime import UTC, datetime
from functools import partial

import orjson
import structlog
from structlog.typing import EventDict, WrappedLogger

from firstclaim.observability.log_lines import LogLines
from firstclaim.observability.redaction import describe_error


def configure(log_format: str, level: str) -> None:
    """Send structlog and the standard library's logging through one renderer to standard error.

    `log_format` is `json`, `console` or `auto` (console on a terminal).
    """
    console = log_format == "console" or (log_format == "auto" and sys.stderr.isatty())
    processors: list[structlog.typing.Processor] = [
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
    lines = LogLines(sys.stderr)
    # Our own records, one per delivery, skip the overhead of the standard library.
    structlog.configure(
        processors=[*processors, renderer] if console else [_json_line],
        logger_factory=partial(_Logger, lines),
        wrapper_class=structlog.make_filtering_bound_logger(level),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(lines)  # flushed when the process ends, by `logging`
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.ExtraAdder(), _plain, *processors],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, _printable, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    for verbose in ("uvicorn.access", "asyncio", "httpx", "httpcore", "alembic", "stripe"):
        logging.getLogger(verbose).setLevel(logging.WARNING)
    for name in ("uvicorn", "uvicorn.error"):
        logging.getLogger(name).handlers = []
        logging.getLogger(name).propagate = True


class _Logger:
    """What structlog passes rendered lines to. Ordinary lines are gathered; a warning is written at once."""

    def __init__(self, lines: LogLines, *_: object) -> None:
        self.debug = self.info = lines.gather
        self.warning = self.error = self.exception = self.critical = lines.write_line


def configure_embedded() -> None:
    """Send our records to the standard library's logging, for an application that embeds the service.

    What that application does with them is its own decision, and so is structlog, if it has configured it already.
    """
    if structlog.is_configured():
        return
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            _place_of_exception,
            _printable,
            structlog.processors.LogfmtRenderer(key_order=["event"]),
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )


def _json_line(logger: WrappedLogger, level: str, record: EventDict) -> str:
    """A record of our own as a line. One step for all that the processors do: there is a line for each delivery."""
    record["level"] = "error" if level == "exception" else level
    record["timestamp"] = datetime.now(UTC)
    if "exc_info" not in record:
        try:
            line = orjson.dumps(record, option=orjson.OPT_UTC_Z).decode()
        except TypeError:
            pass
        else:
            # A backslash is an escaped character, so one that may be unprintable.
            if line.isascii() and line.isprintable() and "\\" not in line:
                return line
    record["timestamp"] = record["timestamp"].isoformat().replace("+00:00", "Z")
    return _json(_printable(logger, level, _place_of_exception(logger, level, record)))


def _json(record: EventDict, **_: object) -> str:
    """The record as JSON in ASCII, so that special characters in nested values are escaped too."""
    try:
        line = orjson.dumps(record, default=repr).decode()
    except TypeError:  # a lone surrogate, an odd key
        return json.dumps(record, default=repr)
    return line if line.isascii() else json.dumps(record, default=repr)


def _plain(_: WrappedLogger, __: str, record: EventDict) -> EventDict:
    """Remove what we do not want from a library's record: uvicorn's holds every message a second time, in colours."""
    record.pop("color_message", None)
    if getattr(record.get("_record"), "name", None) == "asyncio":
        # For an exception that was never retrieved, the lines after the first hold the message, and even locals.
        record["event"] = str(record["event"]).partition("\n")[0]
    return record


def _place_of_exception(_: WrappedLogger, __: str, record: EventDict) -> EventDict:
    """Replace an exception by its class and place: its message and traceback may quote the payload."""
    info = record.pop("exc_info", None)
    if info is True:
        info = sys.exc_info()
    error = info[1] if isinstance(info, tuple) else info
    if isinstance(error, BaseException):
        record["error"] = describe_error(error)
    return record


def _printable(_: WrappedLogger, __: str, record: EventDict) -> EventDict:
    """Escape unprintable characters, so that an id or a path of a request cannot forge a line or control a terminal."""
    for name, value in record.items():
        if isinstance(value, str) and not value.isprintable():
            record[name] = value.encode("unicode_escape").decode("ascii")
    return record
