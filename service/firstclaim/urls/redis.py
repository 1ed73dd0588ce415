"""A `REDIS_URL` as platforms and other clients write it, converted to the form that our client takes.

Guarantees: what says where and how to connect is kept or translated. What tunes another client (timeouts, pools,
retries) is left out, because it could override what the correctness of the lock depends on: no automatic retries, and
short socket timeouts. Anything else is refused by its name. No message repeats a value.

A Cluster and a Sentinel have schemes of their own, because redis-py has none: `redis+cluster://host,host/0` and
`redis+sentinel://user:password@host,host/service_name/0`. These are the forms of Redis-Sentinel-Url, limits, RedisVL
and Prefect. The user and the password are those of the Redis servers.
"""

import re
import ssl
from dataclasses import dataclass
from enum import Enum, auto
from typing import Self
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlencode, urlunsplit

from firstclaim.urls.parts import escaped_login, require_one_of, split, split_hosts, split_url

EXAMPLE = "redis://:password@host:6379/0"
SENTINEL_EXAMPLE = "redis+sentinel://:password@host:26379,host:26379/service_name/0"
CLUSTER_EXAMPLE = "redis+cluster://:password@host:6379,host:6379"
TLS_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")

_SCHEMES = {"valkey": "redis", "valkeys": "rediss", "redis+unix": "unix", "valkey+unix": "unix"} | {
    f"{name}{joint}{kind}": f"{scheme}+{kind}"
    for name, scheme in {"redis": "redis", "rediss": "rediss", "valkey": "redis", "valkeys": "rediss"}.items()
    for kind in ("cluster", "sentinel")
    for joint in "+-"
}
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
_SENTINEL_LOGIN = ("sentinel_username", "sentinel_password")
_SERVICE = ("service_name", "master_name", "masterName", "sentinelMasterId")
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
    "client_name", "clientName", "cluster_error_retry_attempts", "conn_max_idle_time", "conn_max_lifetime",
    "connectTimeout", "connect_timeout",
    "connectionName", "connection_timeout", "decode_responses", "dial_timeout", "dynamic_startup_nodes",
    "enableOfflineQueue", "enableReadyCheck", "encoding", "encoding_errors", "family", "health_check_interval",
    "idle_timeout", "keepAlive", "lazyConnect", "legacy_responses", "max_active_conns", "max_connections",
    "max_idle_conns", "max_redirects", "max_retries", "max_retry_backoff", "maxRetriesPerRequest", "min_idle_conns",
    "min_retry_backoff", "noDelay", "pool_fifo", "pool_size", "pool_timeout", "protocol", "read_from_replicas",
    "read_only", "read_timeout", "reinitialize_steps", "require_full_coverage", "retry_on_error", "retry_on_timeout",
    "route_by_latency", "route_randomly", "socket_connect_timeout", "socket_keepalive", "socket_read_size",
    "socket_timeout", "timeout", "visibility_timeout", "write_timeout",
}  # fmt: skip


class RedisKind(Enum):
    """What an address leads to."""

    SINGLE = auto()  # one server
    SENTINEL = auto()  # the master of a service, whose address the Sentinels know
    CLUSTER = auto()  # the masters of a Cluster, found through some of its nodes


@dataclass(frozen=True, slots=True)
class RedisAddress:
    """An address that `redis_url` has converted, taken apart.

    `hosts` are the hosts and ports of the nodes, or of the Sentinels. `server` is the address of the first of them in
    the client's own form, with the login, the database and TLS of all servers.
    """

    kind: RedisKind
    hosts: tuple[tuple[str, int], ...]
    server: str
    service: str = ""
    sentinel_username: str | None = None
    sentinel_password: str | None = None

    @classmethod
    def parse(cls, url: str) -> Self:
        """`url` must have been converted by `redis_url`."""
        parts = split(url)
        scheme, _, kind = parts.scheme.partition("+")
        default_port = 26379 if kind == "sentinel" else 6379
        hosts = tuple((host, port or default_port) for host, port in split_hosts(parts.netloc, EXAMPLE))
        if not kind:
            return cls(RedisKind.SINGLE, hosts, url)
        query = dict(parse_qsl(parts.query))
        login = [query.pop(name, None) for name in _SENTINEL_LOGIN]
        user, at, _ = parts.netloc.rpartition("@")
        host = f"[{hosts[0][0]}]" if ":" in hosts[0][0] else hosts[0][0]
        netloc = f"{user}{at}{host}:{hosts[0][1]}"
        service, _, path = parts.path[1:].partition("/") if kind == "sentinel" else ("", "", parts.path)
        server = urlunsplit((scheme, netloc, path, urlencode(query, safe="/:,"), ""))
        return cls(RedisKind[kind.upper()], hosts, server, unquote(service), *login)


def has_hash_tag(key: str) -> bool:
    """Whether only a part of the key, `{tag}`, decides its slot in a Cluster."""
    return re.match(r"[^{]*\{[^}]+\}", key) is not None


def redis_url(url: str) -> str:
    """`url` in the form that `RedisAddress` takes, also with Valkey's schemes. Raises ValueError."""
    parts = split_url(url, EXAMPLE)
    scheme, given = _scheme(parts), dict(parse_qsl(parts.query, keep_blank_values=True))
    with_sentinel = scheme.endswith("+sentinel")
    accepted = _ACCEPTED | {*_SENTINEL_LOGIN, *_SERVICE} if with_sentinel else _ACCEPTED
    if not with_sentinel and {"sentinel", "sentinels", *_SENTINEL_LOGIN, *_SERVICE} & given.keys():
        raise ValueError(f"a parameter is Sentinel's; expected e.g. {SENTINEL_EXAMPLE}")
    if unknown := given.keys() - accepted - _IGNORED:
        allowed = ", ".join(sorted(accepted))
        raise ValueError(f"unknown parameter {', '.join(sorted(unknown))}; allowed: {allowed}")
    given = {name: value for name, value in given.items() if value and name not in _IGNORED}
    if any(_is_true(name, given.pop(name)) for name in _SWITCHES & given.keys()) and scheme.startswith("redis"):
        scheme = scheme.replace("rediss", "redis").replace("redis", "rediss")
    sentinel = {name: given[name] for name in _SENTINEL_LOGIN if name in given}
    if with_sentinel:
        parts = _named_service(parts, given)
    query = _tls(given, scheme) | _database(given, parts, scheme) | sentinel
    if scheme == "unix" and not parts.path:
        raise ValueError("a unix:// URL needs a path, e.g. unix:///run/redis/redis.sock?db=0")
    shown = urlencode(query, safe="/:,")
    return f"{scheme}://{_netloc(parts, given)}{parts.path}" + (f"?{shown}" if shown else "")


def _scheme(parts: SplitResult) -> str:
    scheme = _SCHEMES.get(parts.scheme, parts.scheme)
    _, _, kind = scheme.partition("+")
    if scheme not in ("redis", "rediss", "unix", *_SCHEMES.values()):
        raise ValueError(
            f"scheme {parts.scheme!r} is not Redis; expected redis://, rediss://, redis+cluster://, redis+sentinel:// "
            "or unix://"
        )
    example = {"cluster": CLUSTER_EXAMPLE, "sentinel": SENTINEL_EXAMPLE}.get(kind, EXAMPLE)
    hosts = split_hosts(parts.netloc, example)
    if kind and not hosts:
        raise ValueError(f"it names no host; expected e.g. {example}")
    if not kind and len(hosts) > 1:
        raise ValueError(f"several hosts: expected e.g. {CLUSTER_EXAMPLE}, or {SENTINEL_EXAMPLE}")
    return scheme


def _named_service(parts: SplitResult, given: dict[str, str]) -> SplitResult:
    """`parts` with the service and the number of the database, if there is one, as the path.

    The service is the first part of the path, a parameter, or (`redis+sentinel://service@host`) a user who has no
    password.
    """
    user, _, hosts = parts.netloc.rpartition("@")
    path = [part for part in parts.path.split("/") if part]
    if names := [given[name] for name in _SERVICE if name in given]:
        service = quote(names[0], safe="")
        path = path or ["0"] if service.isdecimal() else path
    elif path and not (len(path) == 1 and path[0].isdecimal()):
        service = path.pop(0)
    elif user and ":" not in user:
        service, parts = user, parts._replace(netloc=hosts)
    else:
        raise ValueError(f"it names no service of the Sentinels; expected e.g. {SENTINEL_EXAMPLE}")
    if len(path) > 1 or not all(map(str.isdecimal, path)):
        raise ValueError(f"the path is the service and the number of the database; expected e.g. {SENTINEL_EXAMPLE}")
    return parts._replace(path="/".join(["", service, *path]))


def _netloc(parts: SplitResult, given: dict[str, str]) -> str:
    """The host, with the user's name and password, which some clients take as parameters."""
    user, found, host = parts.netloc.rpartition("@")
    if not found and ("username" in given or "password" in given):
        user = f"{quote(given.get('username', ''), safe='')}:{quote(given.get('password', ''), safe='')}"
        return f"{user}@{host}"
    return escaped_login(parts.netloc)


def _tls(given: dict[str, str], scheme: str) -> dict[str, str]:
    """The parameters for TLS. Raises ValueError for those whose values make no sense, and without TLS."""
    query = {name: value for name, value in given.items() if name in _TLS}
    if "ssl_cert_reqs" in given:
        query["ssl_cert_reqs"] = _CERT_REQS[require_one_of("ssl_cert_reqs", given["ssl_cert_reqs"], _CERT_REQS)]
    if "skip_verify" in given and _is_true("skip_verify", given["skip_verify"]):
        query["ssl_cert_reqs"] = "none"
    if query and not scheme.startswith("rediss"):
        expected = scheme.replace("redis", "rediss") if scheme.startswith("redis") else "rediss"
        raise ValueError(f"{', '.join(sorted(query))}: only TLS has a use for it; expected {expected}://")
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
    if not (scheme == "unix" or "sentinel" in scheme) and not re.fullmatch(r"/?|/[0-9]+/?", parts.path):
        raise ValueError("the path is the number of the database; expected e.g. /0")
    number = given.get("db") or given.get("database")
    if number is None:
        return {}
    if not re.fullmatch("[0-9]+", number):
        raise ValueError("db: expected the number of a database, e.g. db=0")
    return {"db": number}


def _is_true(name: str, value: str) -> bool:
    return require_one_of(name, value, _TRUE | _FALSE) in _TRUE
