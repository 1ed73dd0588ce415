"""Stripe's API address, its keys, and the signing secrets: what is refused before anything is sent or verified.

Guarantees: no message repeats any part of a key, a secret or a URL.
"""

import ipaddress
import re
from collections.abc import Iterable, Mapping, Sequence

from firstclaim.urls.parts import split_hosts, split_url

_EXAMPLE = "https://api.stripe.com"
_KEY = re.compile(r"[sr]k_[\x21-\x7e]{1,500}")
_SECRET = re.compile(r"whsec_[\x21-\x7e]+")
_ENDPOINT = re.compile(r"[a-z][a-z0-9_\-]{0,31}")
_ENDPOINT_EXPECTED = (
    "the name of an endpoint, before the =, is malformed; "
    "expected a lower-case letter, then at most 31 of a-z, 0-9, _ and -, e.g. {}"
)
_MODE = re.compile(r"[sr]k_(live|test)_")
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


def check_api_keys(keys: Sequence[str]) -> None:
    """Raise ValueError for a key or a name that is malformed, and for two keys of one endpoint and mode."""
    seen: set[tuple[str | None, bool | None]] = set()
    for each in keys:
        name, key = _endpoint_and_key(each)
        if name is not None and not _ENDPOINT.fullmatch(name):
            raise ValueError(_ENDPOINT_EXPECTED.format("connect=rk_live_..."))
        stripe_key(key)
        if (name, _mode(key)) in seen:
            raise ValueError(
                f"two keys of one mode for the endpoint {name or '-'}; expected one for each mode: "
                "sk_live_... or rk_live_..., and sk_test_... or rk_test_..."
            )
        seen.add((name, _mode(key)))


def keys_by_endpoint_and_mode(keys: Iterable[str]) -> Mapping[tuple[str | None, bool | None], str]:
    """The API keys by the name of the endpoint (None: without a name) and the mode: True is live mode, False test mode.

    A key that does not say its mode has None, and is for both.
    """
    pairs = map(_endpoint_and_key, keys)
    return {(name, _mode(key)): key for name, key in pairs}


def _endpoint_and_key(text: str) -> tuple[str | None, str]:
    name, equals, key = text.partition("=")
    return (None, text) if not equals or _KEY.fullmatch(text) else (name, key)


def _mode(key: str) -> bool | None:
    found = _MODE.match(key)
    return None if found is None else found[1] == "live"


def check_signing_secrets(secrets: Sequence[str]) -> None:
    """Raise ValueError with what is expected, if Stripe cannot have issued one of `secrets`, or a name is malformed."""
    for each in secrets:
        endpoint, secret = _endpoint_and_secret(each)
        if fault := _fault_of(secret):
            raise ValueError(fault)
        if endpoint is not None and not _ENDPOINT.fullmatch(endpoint):
            raise ValueError(_ENDPOINT_EXPECTED.format("connect=whsec_..."))


def secrets_by_endpoint(secrets: Iterable[str]) -> Mapping[str | None, Sequence[str]]:
    """The signing secrets of each endpoint, by its name; None: the endpoint without a name.

    A secret with a name is written `name=whsec_...`. The secrets themselves may have a `=` too, so what begins with
    `whsec_` is one without a name.
    """
    endpoints: dict[str | None, list[str]] = {}
    for each in secrets:
        endpoint, secret = _endpoint_and_secret(each)
        endpoints.setdefault(endpoint, []).append(secret)
    return endpoints


def _endpoint_and_secret(text: str) -> tuple[str | None, str]:
    name, equals, secret = text.partition("=")
    return (None, text) if not equals or text.startswith("whsec_") else (name, secret)


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
