"""Redaction of errors, for the log and for the operator.

Guarantees: the log gets nothing of an error's message, because the message may quote any part of a payload. The
operator gets, on the terminal and in the ledger's `last_error`, one line in which secrets, e-mail addresses and card
numbers are masked. An exception whose `str()` raises does not raise here.
"""

import re
from types import TracebackType

_MAX_CHARACTERS = 500
_MAX_SEARCHED_CHARACTERS = 2000  # a longer text is cut before the search: searching 60 kB took 20 s

# Credentials in URLs, Stripe's secrets, e-mail addresses, card numbers.
_SECRET = re.compile(
    r"(?P<url>(?<=://)[^/\s@]+(?=@))"
    r"|\b(?:sk|rk|pk|whsec)_[A-Za-z0-9_]+"
    r"|[^\s@<>'\"]+@[^\s@<>'\"]+\.[A-Za-z]{2,}"
    r"|\b(?:\d[ -]?){12,18}\d\b"
)


def redact(text: str) -> str:
    """`text` with secrets, e-mail addresses and card numbers masked, one printable line, at most 500 characters."""
    searched = text[:_MAX_SEARCHED_CHARACTERS]
    if len(text) > len(searched):  # the cut may split a secret, and the pattern would not match its first half
        searched = searched.rpartition(" ")[0] or searched
    line = "".join(character if character.isprintable() else " " for character in searched)
    return _SECRET.sub("[redacted]", line)[:_MAX_CHARACTERS]


def describe_error(error: BaseException) -> str:
    """The class of `error` and where it was raised, without its message: safe to log."""
    return type(error).__name__ + _place(error.__traceback__)


def redacted_error(error: BaseException) -> str:
    """The class of `error` and the first line of its message, redacted. For the operator and the ledger, not the log.

    Only the first line, because a database error continues with the row and the parameters.
    """
    original = getattr(error, "orig", None) or error
    try:
        message = (str(original).splitlines() or [""])[0]
    except Exception:  # noqa: BLE001  (the event must be settled even if str() raises)
        message = "its message cannot be read"
    return redact(f"{type(error).__name__}: {message}")


def _place(trace: TracebackType | None) -> str:
    if trace is None:
        return ""
    while trace.tb_next is not None:
        trace = trace.tb_next
    return f" at {trace.tb_frame.f_code.co_filename.rpartition('/')[2]}:{trace.tb_lineno}"
