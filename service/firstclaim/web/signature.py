"""Who sent it: Stripe's signature over the raw body, before anything else is looked at.

Guarantees: nothing is asked of Redis or Postgres for a body that does not verify, and no byte that a caller
sends makes this raise anything but `Rejected`. On top of stripe-python's check, which takes one secret, lets
the future pass, and raises UnicodeDecodeError or TypeError for bytes that anyone can send: exactly one
header, its form checked first, several secrets, a tolerance in both directions.
"""

from collections.abc import Sequence

import stripe

from firstclaim.errors import Rejected, RejectedKind

_Signature = stripe.WebhookSignature  # once: the package imports it anew for each look

_ITEMS_MOST = 32  # more than all the secrets that are ever being rolled; it bounds the comparisons


def verify(body: bytes, headers: Sequence[str], secrets: Sequence[str], *, tolerance_seconds: int, now: float) -> None:
    """Raise `Rejected` unless one of `secrets` signed `body` within `tolerance_seconds` of `now` (unix).

    `headers` are all values of `Stripe-Signature`. See docs.stripe.com/webhooks#verify-manually.
    """
    if len(headers) != 1:
        raise _rejected("signature_missing" if not headers else "signature_repeated")
    header = headers[0]
    if abs(now - _timestamp(header)) > tolerance_seconds:
        raise _rejected("signature_stale")
    try:
        text = body.decode()
    except UnicodeDecodeError:
        raise _rejected("body_not_utf8") from None
    if not any(_signed_by(secret, text, header) for secret in secrets):
        raise _rejected("signature_mismatch")


def _timestamp(header: str) -> int:
    """The one `t` of a header `t=<unix>,v1=<hex>[,...]`; all other schemes pass unread."""
    items = header.split(",", _ITEMS_MOST)
    times = [item[2:] for item in items if item.startswith("t=")]
    well_formed = header.isascii() and len(items) <= _ITEMS_MOST and all("=" in item for item in items)
    if not well_formed or len(times) != 1 or not times[0].isdigit() or len(times[0]) > 12:
        raise _rejected("signature_malformed")
    return int(times[0])


def _signed_by(secret: str, body: str, header: str) -> bool:
    try:
        return bool(_Signature.verify_header(body, header, secret, tolerance=None))
    except stripe.SignatureVerificationError:  # holds the body and the header: it goes no further
        return False


def _rejected(kind: RejectedKind) -> Rejected:
    return Rejected(kind, "Signature is missing, malformed, outside the tolerance, or does not match")
