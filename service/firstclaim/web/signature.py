"""Verification of Stripe's signature over the raw body, before anything else is done with it.

Guarantees: a body without a valid signature reaches no store, and the only exception is `Rejected`, whatever the input.
stripe-python's own check takes one secret, accepts timestamps in the future, and raises UnicodeDecodeError or TypeError
for some inputs. This module therefore requires exactly one header, checks its form first, accepts blanks and tabs
around its commas, which HTTP allows and a proxy may insert, accepts several secrets, and applies the tolerance in both
directions.
"""

from collections.abc import Sequence

import stripe

from firstclaim.errors import Rejected, RejectedKind

_Signature = stripe.WebhookSignature  # kept here, because stripe-python imports it again at every access

_MAX_ITEMS = 32  # of the header: more signatures than a roll of secrets needs; it bounds the comparisons


def verify(body: bytes, headers: Sequence[str], secrets: Sequence[str], *, tolerance_seconds: int, now: float) -> None:
    """Raise `Rejected` unless one of `secrets` signed `body` within `tolerance_seconds` of `now` (unix seconds).

    `headers` holds all values of `Stripe-Signature`. See docs.stripe.com/webhooks#verify-manually.
    """
    if len(headers) != 1:
        raise _rejected("signature_missing" if not headers else "signature_repeated")
    header = _without_blanks(headers[0])
    if abs(now - _timestamp(header)) > tolerance_seconds:
        raise _rejected("signature_stale")
    try:
        text = body.decode()
    except UnicodeDecodeError:
        raise _rejected("body_not_utf8") from None
    if not any(_signed_by(secret, text, header) for secret in secrets):
        raise _rejected("signature_mismatch")


def _without_blanks(header: str) -> str:
    """`header` without the blanks and tabs around its commas. What follows the most items is left as it is."""
    if " " not in header and "\t" not in header:  # as Stripe sends it
        return header
    return ",".join(item.strip(" \t") for item in header.split(",", _MAX_ITEMS))


def _timestamp(header: str) -> int:
    """The timestamp of a header `t=<unix>,v1=<hex>[,...]`, which has exactly one. Other schemes than v1 are ignored."""
    items = header.split(",", _MAX_ITEMS)
    times = [item[2:] for item in items if item.startswith("t=")]
    well_formed = header.isascii() and len(items) <= _MAX_ITEMS and all("=" in item for item in items)
    if not well_formed or len(times) != 1 or not times[0].isdigit() or len(times[0]) > 12:
        raise _rejected("signature_malformed")
    return int(times[0])


def _signed_by(secret: str, body: str, header: str) -> bool:
    try:
        return bool(_Signature.verify_header(body, header, secret, tolerance=None))
    except stripe.SignatureVerificationError:  # not raised further: it holds the body and the header
        return False


def _rejected(kind: RejectedKind) -> Rejected:
    return Rejected(kind, "Signature is missing, malformed, outside the tolerance, or does not match")
