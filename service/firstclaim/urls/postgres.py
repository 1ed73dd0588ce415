"""A `DATABASE_URL` as platforms and other clients write it, converted to what the driver takes.

Guarantees: what says where and how to connect, and how the session is set, is kept or translated. What tunes another
client (pools, timeouts, caches) is left out. What cannot be kept, and would be missed, is refused by its name. No
message repeats a value.

A parameter that is none of these is a setting of the session, as in `?search_path=shop`. The server knows those, so it
is the server that refuses an unknown one: see `firstclaim.postgres.connect`.
"""

import getpass
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self
from urllib.parse import parse_qsl, quote, unquote, urlencode

from firstclaim.urls.parts import escaped_login, require_one_of, split, split_hosts, split_url

EXAMPLE = "postgresql://user:password@host:5432/database"

_TLS = {
    "sslmode", "sslnegotiation", "sslrootcert", "sslcert", "sslkey", "sslpassword", "sslcrl",
    "ssl_min_protocol_version", "ssl_max_protocol_version",
}  # fmt: skip
# What the driver itself reads from its URL.
_DRIVER = _TLS | {
    "dbname", "database", "gsslib", "host", "krbsrvname", "passfile", "password", "port", "service",
    "target_session_attrs", "user",
}  # fmt: skip
# Of libpq, SQLAlchemy, asyncpg, Prisma, Django, node-postgres, postgres.js, pgx, lib/pq, Rails, SQLx, Ecto and Vercel.
_IGNORED = {
    "advisory_locks", "application_name", "async_fallback", "atomic_requests", "binary_parameters", "channel_binding",
    "checkout_timeout", "client_encoding", "command_timeout", "conn_health_checks", "conn_max_age", "connect_timeout",
    "connection_limit", "connectionTimeoutMillis", "default_query_exec_mode", "description_cache_capacity",
    "disable_server_side_cursors", "encoding", "fallback_application_name", "gssdelegation", "idle_timeout",
    "idleTimeoutMillis", "keepalives", "keepalives_count", "keepalives_idle", "keepalives_interval",
    "load_balance_hosts", "max", "max_cacheable_statement_size", "max_cached_statement_lifetime",
    "max_connection_lifetime", "max_idle_connection_lifetime", "max_lifetime", "max_protocol_version",
    "min_protocol_version", "pool", "pool_health_check_period", "pool_max_conn_idle_time", "pool_max_conn_lifetime",
    "pool_max_conn_lifetime_jitter", "pool_max_conns", "pool_min_conns", "pool_size", "pool_timeout", "prepare",
    "prepared_statement_cache_size", "prepared_statement_name_func", "prepared_statements", "query_timeout",
    "reaping_frequency", "require_auth", "single_use_connections", "socket_timeout", "sslcompression", "sslsni",
    "statement-cache-capacity", "statement_cache_capacity", "statement_cache_mode", "statement_cache_size", "supa",
    "tcp_user_timeout", "timeout", "uselibpqcompat",
}  # fmt: skip
_REFUSED = {
    "replication": "a replication connection cannot hold the ledger; remove it",
    "requirepeer": "is not supported; remove it",
    "scram_client_key": "is not supported; give the password",
    "scram_server_key": "is not supported; give the password",
    "servicefile": "is not supported; set PGSERVICEFILE",
    "sslcrldir": "is not supported; give one file as sslcrl",
    "sslidentity": "PKCS#12 is not supported; give sslcert and sslkey as PEM files",
    "sslinline": "is not supported; give the paths of the files",
}
_SCHEMAS = ("schema", "currentSchema", "schema_search_path")  # Prisma, JDBC, Rails
MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
_MODES_OF_SSLMODE = {mode: mode for mode in MODES} | {"no-verify": "require"}  # node-postgres
_FALSE = ("false", "0", "off")
# asyncpg takes the names of the modes; for asyncpg, node-postgres and JDBC, `true` means to verify.
_MODES_OF_SSL = _MODES_OF_SSLMODE | dict.fromkeys(("true", "1", "on"), "verify-full") | dict.fromkeys(_FALSE, "disable")
_ATTRIBUTES = ("any", "primary", "read-write", "prefer-standby", "read-only", "standby")
_SETTING = re.compile(r"[A-Za-z_][A-Za-z0-9_$]*(\.[A-Za-z_][A-Za-z0-9_$]*)*")
_NEIGHBOURS = ("ssl", "gss", "krb", "channel")  # an unknown parameter of these is one that protects the connection


@dataclass(frozen=True, slots=True)
class PostgresAddress:
    """A converted address, taken apart. The settings of the session are not among the parameters."""

    hosts: tuple[tuple[str, int | None], ...]
    parameters: Mapping[str, str]
    settings: Mapping[str, str]
    _netloc: str
    _path: str

    @classmethod
    def of(cls, dsn: str) -> Self:
        """`dsn` as `postgres_dsn` returns it."""
        parts = split(dsn)
        given = dict(parse_qsl(parts.query))
        parameters = {name: value for name, value in given.items() if name in _DRIVER}
        settings = {name: value for name, value in given.items() if name not in _DRIVER}
        hosts = tuple((unquote(host), port) for host, port in split_hosts(parts.netloc, EXAMPLE))
        return cls(hosts or _hosts(given), parameters, settings, parts.netloc, parts.path)

    @property
    def driver_url(self) -> str:
        """For the driver, which is given one of the hosts beside it and could not read a list of them with IPv6."""
        user, at, _ = self._netloc.rpartition("@")
        return f"postgresql://{user}{at}{self._path}?{urlencode(self.parameters)}"

    @property
    def libpq_url(self) -> str:
        """For PostgreSQL's own clients, which take settings of the session in `options` alone."""
        escaped = {name: re.sub(r"([\\ ])", r"\\\1", value) for name, value in self.settings.items()}
        words = [value if name == "options" else f"-c {name}={escaped[name]}" for name, value in self.settings.items()]
        query = dict(self.parameters) | ({"options": " ".join(words)} if words else {})
        shown = urlencode(query, safe="/:,", quote_via=quote)  # libpq reads no + as a space
        return f"postgresql://{self._netloc}{self._path}" + (f"?{shown}" if shown else "")


def postgres_dsn(url: str) -> str:
    """`url` in the form that the driver takes. Raises ValueError with what is expected, and without the password."""
    parts = split_url(url, EXAMPLE)
    scheme = parts.scheme.partition("+")[0]
    if scheme not in ("postgresql", "postgres"):
        raise ValueError(f"scheme {parts.scheme!r} is not PostgreSQL; expected postgresql:// or postgres://")
    given = {name: value for name, value in parse_qsl(parts.query, keep_blank_values=True) if value}
    kept = _tls(given) | _session(given)
    hosts = split_hosts(parts.netloc, EXAMPLE) or _hosts(kept)
    if attributes := _attributes(given, len(hosts)):
        kept["target_session_attrs"] = attributes
    netloc = escaped_login(parts.netloc)
    _require_user(netloc, kept)
    query = urlencode(kept, safe="/:,")
    return f"postgresql://{netloc}{parts.path}" + (f"?{query}" if query else "")


def _tls(given: dict[str, str]) -> dict[str, str]:
    """The parameters for TLS, as libpq names and reads them. A requirement that cannot be kept is refused."""
    kept = {name: value for name, value in given.items() if name in _TLS}
    if mode := _mode(given):
        kept["sslmode"] = mode
    if given.get("sslrootcert") == "system" and mode != "disable":
        kept["sslmode"] = "verify-full"  # as in libpq
    if "gssencmode" in given:
        require_one_of("gssencmode", given["gssencmode"], ("disable", "prefer"))
    if "sslcertmode" in given:
        require_one_of("sslcertmode", given["sslcertmode"], ("allow",))
    if "sslnegotiation" in given:
        require_one_of("sslnegotiation", given["sslnegotiation"], ("postgres", "direct"))
    return kept


def _mode(given: dict[str, str]) -> str | None:
    if value := given.get("sslmode"):
        return _MODES_OF_SSLMODE[require_one_of("sslmode", value.replace("_", "-"), _MODES_OF_SSLMODE)]
    if value := given.get("ssl"):
        return _MODES_OF_SSL[require_one_of("ssl", value.replace("_", "-"), _MODES_OF_SSL)]
    if value := given.get("sslaccept"):  # Prisma
        value = require_one_of("sslaccept", value, ("strict", "accept_invalid_certs"))
        return "verify-full" if value == "strict" else "require"
    return None


def _session(given: dict[str, str]) -> dict[str, str]:
    """What remains: the driver's own parameters, and the settings of the session."""
    handled = {*_TLS, *_IGNORED, "ssl", "sslaccept", "sslcertmode", "gssencmode", "target_session_attrs"}
    kept: dict[str, str] = {}
    for name, value in given.items():
        if name in _SCHEMAS:
            kept["search_path"] = value if name == "schema_search_path" else f'"{value.replace(chr(34), chr(34) * 2)}"'
        elif name == "options":
            kept |= _options(value)
        elif name in ("hostaddr", "unix_sock"):
            if "host" in given:
                raise ValueError(f"{name}: give it or host, not both")
            kept["host"] = value
        elif name == "pgbouncer":
            if value.lower() not in _FALSE:
                raise ValueError(
                    "pgbouncer=true names a transaction-mode pooler, which cannot work; use the direct address "
                    "(or the pooler's port for session mode)"
                )
        elif name not in handled:
            kept[name] = _known(name, value)
    return kept


def _known(name: str, value: str) -> str:
    """`value`, unless the parameter is refused, or is unknown and can be no setting of a session."""
    if name in _REFUSED:
        raise ValueError(f"{name}: {_REFUSED[name]}")
    if name in _DRIVER:
        if name == "port" and not all(port.isdecimal() for port in value.split(",")):
            raise ValueError("port: expected a number")
        return require_one_of(name, value, ("gssapi", "sspi")) if name == "gsslib" else value
    if name.lower().startswith(_NEIGHBOURS) or not _SETTING.fullmatch(name):
        raise ValueError(f"unknown parameter {name!r}")
    return value


def _options(text: str) -> dict[str, str]:
    """The settings in `-c name=value`, as parameters of their own: a pooler takes none, and they can be set later.

    Anything else stays: some proxies read from it which server is meant (`endpoint=...`, `reference=...`).
    """
    words = [re.sub(r"\\(.)", r"\1", word) for word in re.findall(r"(?:\\.|\S)+", text)]
    settings: dict[str, str] = {}
    others = []
    while words:
        word = words.pop(0)
        if word == "-c" and words:
            word += words.pop(0)
        name, found, value = word.removeprefix("-c").removeprefix("--").partition("=")
        if found and word.startswith(("-c", "--")):
            settings[name.replace("-", "_")] = value
        else:
            others.append(word)
    return settings | ({"options": " ".join(others)} if others else {})


def _attributes(given: dict[str, str], hosts: int) -> str | None:
    """Among several servers it is the primary that we need. Of one server, `serve` says if it is another."""
    value = given.get("target_session_attrs")
    if value is not None:
        require_one_of("target_session_attrs", value, _ATTRIBUTES)
        if value in ("standby", "read-only"):
            raise ValueError("target_session_attrs: the ledger is written to; expected read-write or primary")
    if value in ("primary", "read-write"):
        return value
    return "read-write" if hosts > 1 else None


def _hosts(given: Mapping[str, str]) -> tuple[tuple[str, int | None], ...]:
    """The hosts that parameters name; their ports are one for all, or one for each."""
    if not given.get("host"):
        return ()
    hosts = given["host"].split(",")
    ports = [int(port) for port in given.get("port", "").split(",") if port]
    if len(ports) not in (0, 1, len(hosts)) or not all(hosts):
        raise ValueError("port: expected one, or one for each host")
    if not ports:
        return tuple((host, None) for host in hosts)
    return tuple(zip(hosts, ports * (len(hosts) // len(ports)), strict=True))


def _require_user(netloc: str, kept: dict[str, str]) -> None:
    """The driver takes the name of the process's user if no other is given, and fails if there is none."""
    if netloc.rpartition("@")[0].partition(":")[0] or "user" in kept or "service" in kept or os.environ.get("PGUSER"):
        return
    try:
        getpass.getuser()
    except (KeyError, OSError):
        raise ValueError(f"names no user, and this process's uid has no name; expected e.g. {EXAMPLE}") from None
