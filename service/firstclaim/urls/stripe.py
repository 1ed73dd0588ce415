"""Stripe's API address, its key, and the signing secrets: what is refused before anything is sent or verified.

Guarantees: no message repeats any part of a key, a secret or a URL.
"""

import ipaddress
import re
from collections.abc import Sequence

from firstclaim.urls.parts import split_hosts, split_url

_EXAMPLE = "https://api.stripe.com"
_KEY = re.compile(r"[sr]k_[\x21-\x7e]{1,500}")
_SECRET = re.compile(r"whsec_[\x21-\x7e]+")
_KINDS = {
    "sk_": "an API key (sk_...)",
    "rk_": "a restricted API key (rk_...)",
    "pk_": "a publishable key (pk_...)",
    "we_": "the endpoint's id (we_...)",
}
_EXPECTED_SECRETS = "expected whsec_... values, comma separated"


def stripe_base(url: str) -> str:
    """`url` in the form that Stripe's library takes. It must use TLS or the loopback: the API key is sent there."""
    parts = split_url(url, _EXAMPLE)
    split_hosts(parts.netloc, _EXAMPLE)
    if not parts.hostname or "," in parts.netloc or "@" in parts.netloc or parts.query:
        raise ValueError(f"expected a scheme, a host and optionally a port, e.g. {_EXAMPLE}")
    if parts.scheme != "https" and not (parts.scheme == "http" and _is_loopback(parts.hostname)):
        raise ValueError("expected https://, or http:// to the loopback, because the API key is sent there")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"


def stripe_key(key: str) -> str:
    """`key`, if it is a secret or restricted key. Raises ValueError for others, and for white space or quotes."""
    if not _KEY.fullmatch(key):
        raise ValueError(
            "expected a secret key (sk_...) or a restricted one (rk_...), without white space or quotes around it"
        )
    return key


def check_signing_secrets(secrets: Sequence[str]) -> None:
    """Raise ValueError with what is expected, if Stripe cannot have issued one of `secrets`."""
    for secret in secrets:
        if fault := _fault_of(secret):
            raise ValueError(fault)


def _fault_of(secret: str) -> str | None:
    if not secret.strip():
        return "one of the secrets is blank (an empty secret would verify anything); remove the extra comma"
    if re.search("[\"'`\u2018\u2019\u201c\u201d]", secret):
        return f"a secret holds a quotation mark: remove the quotes; {_EXPECTED_SECRETS}"
    for prefix, kind in _KINDS.items():
        if secret.startswith(prefix):
            return f"one of them is {kind}, not a signing secret; {_EXPECTED_SECRETS}"
    if ";" in secret:
        return f"the secrets are separated by a semicolon; {_EXPECTED_SECRETS}"
    if not secret.isascii() or re.search(r"[\s\x00-\x1f\x7f]", secret):
        return f"a secret holds a space or a non-ASCII character; {_EXPECTED_SECRETS}"
    if not _SECRET.fullmatch(secret):
        return f"a secret does not begin with whsec_; {_EXPECTED_SECRETS}"
    return None


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
