"""Verification of Stripe's signature over the raw body, before anything else is done with it.

Guarantees: a body without a valid signature reaches no store, and the only exception is `Rejected`, whatever the input.
The scheme is Stripe's (docs.stripe.com/webhooks#verify-manually), and a test compares the result with stripe-python's
for any header. Its own check takes one secret, accepts timestamps in the future, and raises UnicodeDecodeError or
TypeError for some inputs. This module requires exactly one header, checks its form first, accepts blanks and tabs
around its commas, which HTTP allows and a proxy may insert, accepts several secrets, and applies the tolerance in both
directions.
"""

import hmac
from collections.abc import Sequence

from firstclaim.errors import Rejected, RejectedKind

_MAX_ITEMS = 32  # of the header: more signatures than a roll of secrets needs; it bounds the comparisons


def verify(body: bytes, headers: Sequence[str], secrets: Sequence[str], *, tolerance_seconds: int, now: float) -> None:
    """Raise `Rejected` unless one of `secrets` signed `body` within `tolerance_seconds` of `now` (unix seconds).

    `headers` holds all values of `Stripe-Signature`.
    """
    if len(headers) != 1:
        raise _rejected("signature_missing" if not headers else "signature_repeated")
    timestamp, signatures = _parse(_without_blanks(headers[0]))
    if abs(now - timestamp) > tolerance_seconds:
        raise _rejected("signature_stale")
    try:
        body.decode()
    except UnicodeDecodeError:
        raise _rejected("body_not_utf8") from None
    signed = b"%d.%b" % (timestamp, body)
    for secret in secrets:
        if _signed_by(secret, signed, signatures):
            return
    raise _rejected("signature_mismatch")


def _without_blanks(header: str) -> str:
    """`header` without the blanks and tabs around its commas. What follows the maximum of items is unchanged."""
    if " " not in header and "\t" not in header:  # as Stripe sends it
        return header
    return ",".join(item.strip(" \t") for item in header.split(",", _MAX_ITEMS))


def _parse(header: str) -> tuple[int, list[str]]:
    """The timestamp and the signatures of a header `t=<unix>,v1=<hex>[,...]`. Other schemes than v1 are ignored."""
    items = header.split(",", _MAX_ITEMS)
    times, signatures = [], []
    well_formed = header.isascii() and len(items) <= _MAX_ITEMS
    for item in items:
        scheme, equals, value = item.partition("=")
        if not equals:
            well_formed = False
        elif scheme == "t":
            times.append(value)
        elif scheme == "v1":
            signatures.append(value.partition("=")[0])  # the rest is ignored, as stripe-python does
    if not well_formed or len(times) != 1 or not times[0].isdigit() or len(times[0]) > 12:
        raise _rejected("signature_malformed")
    return int(times[0]), signatures


def _signed_by(secret: str, signed: bytes, signatures: Sequence[str]) -> bool:
    """Whether one of the signatures is that of `secret`. An empty secret matches none: anybody could sign with it."""
    if not secret:
        return False
    expected = hmac.digest(secret.encode(), signed, "sha256").hex()
    for signature in signatures:  # noqa: SIM110  (without a generator: this runs for each delivery)
        if hmac.compare_digest(expected, signature):
            return True
    return False


def _rejected(kind: RejectedKind) -> Rejected:
    return Rejected(kind, "Signature is missing, malformed, outside the tolerance, or does not match")
