"""Redaction of errors, for the log and for the operator.

Guarantees: the log gets nothing of an error's message, because the message may quote any part of a payload. The
operator gets, on the terminal and in the ledger's `last_error`, one line in which secrets, e-mail addresses and card
numbers are masked. Nothing here raises, whatever the class of an exception overrides: `__str__`, `__class__`,
`__traceback__` or the name of the class itself. (A handler's failure could otherwise not be settled.)
"""

import re
from types import TracebackType
from typing import TypeGuard, TypeVar

from firstclaim.observability.source_path import source_path

E = TypeVar("E", bound=BaseException)

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
    return class_name(error) + _place(vars(BaseException)["__traceback__"].__get__(error))


def class_name(error: BaseException) -> str:
    """The name of the class of `error`, whatever its metaclass says."""
    name: str = vars(type)["__name__"].__get__(type(error))
    return name


def is_a(error: BaseException, kind: type[E]) -> TypeGuard[E]:
    """`isinstance`, without the attribute `__class__`, which `isinstance` reads and an exception may override."""
    return issubclass(type(error), kind)


def redacted_error(error: BaseException) -> str:
    """The class of `error` and the first line of its message, redacted. For the operator and the ledger, not the log.

    Only the first line, because a database error continues with the row and the parameters.
    """
    try:
        original = getattr(error, "orig", None) or error
        message = (str.splitlines(str(original)) or [""])[0]
    except BaseException:  # noqa: BLE001  (a handler's code runs here: whatever it raises, the event must be settled)
        message = "its message cannot be read"
    return redact(f"{class_name(error)}: {message}")


def _place(trace: TracebackType | None) -> str:
    if trace is None:
        return ""
    while trace.tb_next is not None:
        trace = trace.tb_next
    return f" at {redact(source_path(trace.tb_frame.f_code.co_filename))}:{trace.tb_lineno}"
