"""Addresses as platforms hand them out, and the key of one: checked, and made what the drivers take.

Guarantees: no message repeats any part of a URL but its scheme, or of a key, so that no secret can get into a log;
what cannot work (Sentinel, Cluster, a transaction-mode pooler that says so) is refused by its name.
"""

import ipaddress
import re
from urllib.parse import SplitResult, parse_qsl, urlsplit

# Query parameters of a REDIS_URL that say where and how to connect. Any other would override what the
# lock's correctness rests on: no retries of its own, short socket timeouts.
_REDIS_QUERY = {"db", "ssl_cert_reqs", "ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_check_hostname"}

# libpq parameters that hosting platforms append and that the driver would send to the server as settings.
_LIBPQ_ONLY = {"channel_binding", "connect_timeout", "gssencmode", "keepalives", "keepalives_idle"}

_POSTGRES_EXAMPLE = "postgresql://user:password@host:5432/database"
_REDIS_EXAMPLE = "redis://:password@host:6379/0"
_STRIPE_EXAMPLE = "https://api.stripe.com"
_STRIPE_KEY = re.compile(r"[sr]k_[\x21-\x7e]{1,500}")


def postgres_dsn(url: str) -> str:
    """`url` as the driver takes it; raises ValueError with what was expected, never with the password."""
    parts = _split_url(url, _POSTGRES_EXAMPLE)
    _check_port(parts, _POSTGRES_EXAMPLE)
    scheme = parts.scheme.partition("+")[0]
    if scheme not in ("postgresql", "postgres"):
        raise ValueError(f"scheme {parts.scheme!r} is not PostgreSQL; expected postgresql:// or postgres://")
    query = "&".join(pair for pair in parts.query.split("&") if pair and pair.partition("=")[0] not in _LIBPQ_ONLY)
    if dict(parse_qsl(query, keep_blank_values=True)).get("pgbouncer") is not None:
        raise ValueError("pgbouncer=true names a transaction-mode pooler, which cannot work; use the direct address")
    return f"postgresql://{parts.netloc}{parts.path}" + (f"?{query}" if query else "")


def redis_url(url: str) -> str:
    """`url` as the client takes it; Valkey's schemes are Redis's. Sentinel and Cluster are refused by name."""
    parts = _split_url(url, _REDIS_EXAMPLE)
    scheme = {"valkey": "redis", "valkeys": "rediss", "redis+unix": "unix", "valkey+unix": "unix"}.get(
        parts.scheme, parts.scheme
    )
    if "sentinel" in scheme:
        raise ValueError("Redis Sentinel URLs are not supported; give the primary's own address (or a proxy's)")
    if "cluster" in scheme:
        raise ValueError("Redis Cluster URLs are not supported; give a single primary (redis:// or rediss://)")
    if scheme not in ("redis", "rediss", "unix"):
        raise ValueError(f"scheme {parts.scheme!r} is not Redis; expected redis://, rediss:// or unix://")
    if "," in parts.netloc.rpartition("@")[2]:
        raise ValueError("several hosts in one URL (Sentinel or Cluster) are not supported; give a single primary")
    _check_port(parts, _REDIS_EXAMPLE)
    if strange := {name for name, _ in parse_qsl(parts.query, keep_blank_values=True)} - _REDIS_QUERY:
        raise ValueError(f"unknown parameter {', '.join(sorted(strange))}; allowed: {', '.join(sorted(_REDIS_QUERY))}")
    if scheme == "unix" and not parts.path:
        raise ValueError("a unix:// URL needs a path, e.g. unix:///run/redis/redis.sock?db=0")
    return f"{scheme}://{parts.netloc}{parts.path}" + (f"?{parts.query}" if parts.query else "")


def stripe_base(url: str) -> str:
    """`url` as Stripe's library takes it, which sends the API key there: TLS, or this machine's loopback."""
    parts = _split_url(url, _STRIPE_EXAMPLE)
    _check_port(parts, _STRIPE_EXAMPLE)
    if not parts.hostname or "@" in parts.netloc or parts.query:
        raise ValueError(f"expected scheme, host and perhaps a port, e.g. {_STRIPE_EXAMPLE}")
    if parts.scheme != "https" and not (parts.scheme == "http" and _is_loopback(parts.hostname)):
        raise ValueError("expected https://, or http:// to this machine's loopback: the API key goes there")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"


def stripe_key(key: str) -> str:
    """`key` if Stripe's API may take it: not a publishable key or a signing secret, and no white space around it."""
    if not _STRIPE_KEY.fullmatch(key):
        raise ValueError("expected a secret key (sk_...) or a restricted one (rk_...), and nothing around it")
    return key


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _split_url(url: str, example: str) -> SplitResult:
    try:
        parts = urlsplit(url.strip())
    except ValueError:
        raise ValueError(f"not a URL; expected e.g. {example}") from None
    if not parts.scheme or "://" not in url:
        raise ValueError(f"not a URL; expected e.g. {example}")
    # An unescaped # ? or / of a password ends the host part early: the rest of it, and the real host, then stand
    # where they would be connected to, or shown, as something else.
    cut_short = parts.netloc and "@" not in parts.netloc and "@" in parts.path + parts.query.partition("=")[0]
    if "#" in url or cut_short:
        raise ValueError("a # ? / or @ in the user name or the password must be written %23, %3F, %2F or %40")
    return parts


def _check_port(parts: SplitResult, example: str) -> None:
    try:
        _ = parts.port
    except ValueError:
        raise ValueError(f"not a URL; expected e.g. {example}") from None
