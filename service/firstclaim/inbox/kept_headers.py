"""The headers of the delivery that recorded an event, as the ledger keeps them for operators.

Guarantees: no signature is kept: of `Stripe-Signature`, only the time at which it was made. The text is printable and
short, whatever the request had, so a header never keeps an event from being recorded.

Stripe documents no header with the number of its attempt or with the API version (which is in the body). If one of
these names says so, it is kept.
"""

import re
from collections.abc import Iterable
from typing import Final

Header = tuple[bytes, bytes]  # a name in lower case, and its value

_KEPT: Final = re.compile(rb"user-agent|(?:x-)?stripe-.*|.*(?:attempt|retry|retries).*", re.DOTALL)
_MOST: Final = 10
_MOST_CHARACTERS: Final = 200  # of a name, and of a value


def kept_headers(headers: Iterable[Header]) -> str | None:
    """The headers that an operator may ask for, `name: value` on a line each. None if there are none."""
    lines = [f"{_text(name)}: {_text(_value(name, value))}" for name, value in headers if _KEPT.fullmatch(name)]
    return "\n".join(lines[:_MOST]) or None


def _value(name: bytes, value: bytes) -> bytes:
    if b"signature" not in name:
        return value
    return b",".join(part for part in value.split(b",") if part.strip().startswith(b"t="))


def _text(value: bytes) -> str:
    text = value.decode("latin-1")[:_MOST_CHARACTERS]
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else "?" for each in text)
