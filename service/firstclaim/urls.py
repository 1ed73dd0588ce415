"""Validates the URLs of the stores and of Stripe's API, and its key, and converts them to the form that drivers take.

Guarantees: no message repeats any part of a key, or of a URL except its scheme, so no secret can get into a log. An
unsupported server (Sentinel, Cluster, a transaction-mode pooler that the URL names) is refused with an error that names
it.
"""

import ipaddress
import re
from urllib.parse import SplitResult, parse_qsl, urlsplit

# Parameters of a REDIS_URL that say where and how to connect. Any other one could override what the correctness of the
# lock depends on: no automatic retries, and short socket timeouts.
_REDIS_QUERY = {"db", "ssl_cert_reqs", "ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_check_hostname"}

# Parameters of libpq that hosting platforms append. The driver would send them to the server as settings.
_LIBPQ_ONLY = {"channel_binding", "connect_timeout", "gssencmode", "keepalives", "keepalives_idle"}

_POSTGRES_EXAMPLE = "postgresql://user:password@host:5432/database"
_REDIS_EXAMPLE = "redis://:password@host:6379/0"
_STRIPE_EXAMPLE = "https://api.stripe.com"
_STRIPE_KEY = re.compile(r"[sr]k_[\x21-\x7e]{1,500}")


def postgres_dsn(url: str) -> str:
    """`url` in the form that the driver takes. Raises ValueError with what is expected, and without the password."""
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
    """`url` in the form that the client takes, also with Valkey's schemes. Raises ValueError, also for Sentinel."""
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
    if unknown := {name for name, _ in parse_qsl(parts.query, keep_blank_values=True)} - _REDIS_QUERY:
        raise ValueError(f"unknown parameter {', '.join(sorted(unknown))}; allowed: {', '.join(sorted(_REDIS_QUERY))}")
    if scheme == "unix" and not parts.path:
        raise ValueError("a unix:// URL needs a path, e.g. unix:///run/redis/redis.sock?db=0")
    return f"{scheme}://{parts.netloc}{parts.path}" + (f"?{parts.query}" if parts.query else "")


def stripe_base(url: str) -> str:
    """`url` in the form that Stripe's library takes. It must use TLS or the loopback: the API key is sent there."""
    parts = _split_url(url, _STRIPE_EXAMPLE)
    _check_port(parts, _STRIPE_EXAMPLE)
    if not parts.hostname or "@" in parts.netloc or parts.query:
        raise ValueError(f"expected a scheme, a host and optionally a port, e.g. {_STRIPE_EXAMPLE}")
    if parts.scheme != "https" and not (parts.scheme == "http" and _is_loopback(parts.hostname)):
        raise ValueError("expected https://, or http:// to the loopback, because the API key is sent there")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"


def stripe_key(key: str) -> str:
    """`key`, if it is a secret or restricted key. Raises ValueError for other keys, and for surrounding white space."""
    if not _STRIPE_KEY.fullmatch(key):
        raise ValueError("expected a secret key (sk_...) or a restricted one (rk_...), without white space around it")
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
    # An unescaped # ? or / in a password ends the host part early. The rest of the password, and the real host, would
    # then be used, or shown, as a different part of the URL.
    cut_short = parts.netloc and "@" not in parts.netloc and "@" in parts.path + parts.query.partition("=")[0]
    if "#" in url or cut_short:
        raise ValueError("a # ? / or @ in the user name or the password must be written %23, %3F, %2F or %40")
    return parts


def _check_port(parts: SplitResult, example: str) -> None:
    try:
        _ = parts.port
    except ValueError:
        raise ValueError(f"not a URL; expected e.g. {example}") from None
