"""What may be said of an error, and to whom.

Guarantees: what is logged of one holds no word of its message, which may quote anything that a payload held; what
the operator gets to read of it, on the terminal and in the ledger's `last_error`, is one line in which secrets,
addresses and card numbers are masked. An exception that cannot even be told does not raise here.
"""

import re
from types import TracebackType

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


def redacted_error(error: BaseException) -> str:
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
    if trace is None:
        return ""
    while trace.tb_next is not None:
        trace = trace.tb_next
    return f" at {trace.tb_frame.f_code.co_filename.rpartition('/')[2]}:{trace.tb_lineno}"
