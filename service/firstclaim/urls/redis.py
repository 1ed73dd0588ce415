"""A `REDIS_URL` as platforms and other clients write it, converted to the form that our client takes.

Guarantees: what says where and how to connect is kept or translated. What tunes another client (timeouts, pools,
retries) is left out, because it could override what the correctness of the lock depends on: no automatic retries, and
short socket timeouts. Anything else is refused by its name. A Sentinel or a Cluster is refused with an error that names
it. No message repeats a value.
"""

import re
import ssl
from urllib.parse import SplitResult, parse_qsl, quote, urlencode

from firstclaim.urls.parts import require_one_of, split_hosts, split_url

EXAMPLE = "redis://:password@host:6379/0"
TLS_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")

_SCHEMES = {"valkey": "redis", "valkeys": "rediss", "redis+unix": "unix", "valkey+unix": "unix"}
_TLS = {
    *TLS_FILES,
    "ssl_ca_data",
    "ssl_ca_path",
    "ssl_check_hostname",
    "ssl_ciphers",
    "ssl_min_version",
    "ssl_password",
}
_SWITCHES = {"ssl", "tls"}  # they make redis:// a rediss://
_CERT_REQS = {"none": "none", "optional": "optional", "required": "required"} | {
    "CERT_NONE": "none",  # as Celery and Django write it
    "CERT_OPTIONAL": "optional",
    "CERT_REQUIRED": "required",
    "None": "none",
}
_TRUE, _FALSE = {"1", "true", "True", "yes", "on"}, {"0", "false", "False", "no", "off"}
_ACCEPTED = _TLS | _SWITCHES | {"db", "database", "username", "password", "ssl_cert_reqs", "skip_verify"}
# Of redis-py, Celery, Django, ioredis, node-redis, go-redis, redis-rs, Lettuce and Jedis.
_IGNORED = {
    "client_name", "clientName", "conn_max_idle_time", "conn_max_lifetime", "connectTimeout", "connect_timeout",
    "connectionName", "connection_timeout", "decode_responses", "dial_timeout", "enableOfflineQueue",
    "enableReadyCheck", "encoding", "encoding_errors", "family", "health_check_interval", "idle_timeout", "keepAlive",
    "lazyConnect", "legacy_responses", "max_active_conns", "max_connections", "max_idle_conns", "max_retries",
    "max_retry_backoff", "maxRetriesPerRequest", "min_idle_conns", "min_retry_backoff", "noDelay", "pool_fifo",
    "pool_size", "pool_timeout", "protocol", "read_timeout", "retry_on_error", "retry_on_timeout",
    "socket_connect_timeout", "socket_keepalive", "socket_read_size", "socket_timeout", "timeout", "visibility_timeout",
    "write_timeout",
}  # fmt: skip
_SENTINEL = {"sentinel", "sentinels", "sentinelMasterId", "master_name", "masterName", "service_name"}


def redis_url(url: str) -> str:
    """`url` in the form that the client takes, also with Valkey's schemes. Raises ValueError, also for Sentinel."""
    parts = split_url(url, EXAMPLE)
    scheme = _scheme(parts)
    given = dict(parse_qsl(parts.query, keep_blank_values=True))
    if _SENTINEL & given.keys():
        raise ValueError("Redis Sentinel URLs are not supported; give the primary's own address (or a proxy's)")
    if unknown := given.keys() - _ACCEPTED - _IGNORED:
        allowed = ", ".join(sorted(_ACCEPTED))
        raise ValueError(f"unknown parameter {', '.join(sorted(unknown))}; allowed: {allowed}")
    given = {name: value for name, value in given.items() if value and name not in _IGNORED}
    if any(_is_true(name, given.pop(name)) for name in _SWITCHES & given.keys()) and scheme == "redis":
        scheme = "rediss"
    query = _tls(given, scheme) | _database(given, parts, scheme)
    if scheme == "unix" and not parts.path:
        raise ValueError("a unix:// URL needs a path, e.g. unix:///run/redis/redis.sock?db=0")
    shown = urlencode(query, safe="/:,")
    return f"{scheme}://{_netloc(parts, given)}{parts.path}" + (f"?{shown}" if shown else "")


def _scheme(parts: SplitResult) -> str:
    scheme = _SCHEMES.get(parts.scheme, parts.scheme)
    if "sentinel" in scheme:
        raise ValueError("Redis Sentinel URLs are not supported; give the primary's own address (or a proxy's)")
    if "cluster" in scheme:
        raise ValueError("Redis Cluster URLs are not supported; give a single primary (redis:// or rediss://)")
    if scheme not in ("redis", "rediss", "unix"):
        raise ValueError(f"scheme {parts.scheme!r} is not Redis; expected redis://, rediss:// or unix://")
    if "," in parts.netloc.rpartition("@")[2]:
        raise ValueError("several hosts in one URL (Sentinel or Cluster) are not supported; give a single primary")
    split_hosts(parts.netloc, EXAMPLE)
    return scheme


def _netloc(parts: SplitResult, given: dict[str, str]) -> str:
    """The host, with the user's name and password, which some clients take as parameters."""
    user, found, host = parts.netloc.rpartition("@")
    if not found and ("username" in given or "password" in given):
        user = f"{quote(given.get('username', ''), safe='')}:{quote(given.get('password', ''), safe='')}"
        return f"{user}@{host}"
    return parts.netloc


def _tls(given: dict[str, str], scheme: str) -> dict[str, str]:
    """The parameters for TLS. Raises ValueError for those whose values make no sense, and without TLS."""
    query = {name: value for name, value in given.items() if name in _TLS}
    if "ssl_cert_reqs" in given:
        query["ssl_cert_reqs"] = _CERT_REQS[require_one_of("ssl_cert_reqs", given["ssl_cert_reqs"], _CERT_REQS)]
    if "skip_verify" in given and _is_true("skip_verify", given["skip_verify"]):
        query["ssl_cert_reqs"] = "none"
    if query and scheme != "rediss":
        raise ValueError(f"{', '.join(sorted(query))}: only TLS has a use for it; expected rediss://")
    if "ssl_check_hostname" in query:
        query["ssl_check_hostname"] = str(_is_true("ssl_check_hostname", query["ssl_check_hostname"])).lower()
    if "ssl_min_version" in query:
        query["ssl_min_version"] = _tls_version(query["ssl_min_version"])
    return query


def _tls_version(value: str) -> str:
    """The number that the client expects, also from a name: TLSv1.2, or 771."""
    known = {version.name.replace("_", "."): version.value for version in ssl.TLSVersion if version.value > 0}
    known |= {str(number): number for number in known.values()}
    return str(known[require_one_of("ssl_min_version", value, known)])


def _database(given: dict[str, str], parts: SplitResult, scheme: str) -> dict[str, str]:
    """The number of the database as a parameter, unless the path has it. The client would take `/abc` as 0."""
    if scheme != "unix" and not re.fullmatch(r"/?|/[0-9]+/?", parts.path):
        raise ValueError("the path is the number of the database; expected e.g. /0")
    number = given.get("db") or given.get("database")
    if number is None:
        return {}
    if not re.fullmatch("[0-9]+", number):
        raise ValueError("db: expected the number of a database, e.g. db=0")
    return {"db": number}


def _is_true(name: str, value: str) -> bool:
    return require_one_of(name, value, _TRUE | _FALSE) in _TRUE
