"""The headers of a forwarded event: signed for the target, in Stripe's scheme and in that of Standard Webhooks.

Both are made from one secret, `whsec_` and 24 to 64 bytes in base64. Stripe's scheme takes the whole text as its key,
so that code which verifies Stripe's deliveries verifies these with another secret and no other change. Standard
Webhooks takes the bytes. (docs.stripe.com/webhooks#verify-manually and the specification of Standard Webhooks, version
1.)
"""

import base64
import binascii
import hashlib
import hmac

_PREFIX = "whsec_"
_SHORTEST_BYTES, _LONGEST_BYTES = 24, 64
_EXPECTED = f"expected whsec_ and {_SHORTEST_BYTES} to {_LONGEST_BYTES} random bytes in base64"


def key_of(secret: str) -> bytes:
    """The bytes of a secret. Raises `ValueError` with what is expected, and without any part of the secret."""
    if not secret.startswith(_PREFIX):
        raise ValueError(_EXPECTED)
    try:
        key = base64.b64decode(secret.removeprefix(_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(f"not base64 after whsec_; {_EXPECTED}") from None
    if not _SHORTEST_BYTES <= len(key) <= _LONGEST_BYTES:
        raise ValueError(f"{len(key)} bytes; {_EXPECTED}")
    return key


def signed_headers(secret: str, event_id: str, body: bytes, at: int) -> dict[str, str]:
    """The headers for this event, signed at the time `at` (unix seconds)."""
    stripe = hmac.new(secret.encode(), f"{at}.".encode() + body, hashlib.sha256).hexdigest()
    standard = hmac.new(key_of(secret), f"{event_id}.{at}.".encode() + body, hashlib.sha256).digest()
    return {
        "stripe-signature": f"t={at},v1={stripe}",
        "webhook-id": event_id,
        "webhook-timestamp": str(at),
        "webhook-signature": f"v1,{base64.b64encode(standard).decode()}",
    }
