"""Opens a connection by a `DATABASE_URL`, and says of a failure whether another attempt can help.

Guarantees: of several hosts, only one that accepts writes is used, and one that does not answer does not hide the next
(`firstclaim.postgres.hosts`). A refusal (login, database, TLS, a parameter) is a `LedgerRefused`, which says what to
change, and is never reported as an unreachable server.
"""

import asyncio
import errno
import re
import ssl
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import asyncpg

from firstclaim.errors import ConfigurationError, LedgerRefused
from firstclaim.postgres import tls
from firstclaim.postgres.advice import explain, in_one_line
from firstclaim.postgres.hosts import first_to_accept
from firstclaim.urls.postgres import PostgresAddress

C = TypeVar("C", bound=asyncpg.Connection)

Host = tuple[str | None, int | None]  # None: by the URL

_last_good: dict[str, Host] = {}  # by the address: the host that took this process's last connection

_NAME = {"application_name": "firstclaim"}
_SET = "SELECT set_config(name, value, false) FROM unnest($1::text[], $2::text[]) AS given (name, value)"
_NOT_AT_START = "unsupported startup parameter"  # PgBouncer

# What the server says then names the user or the database, and holds no password.
_LOGIN = (
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCatalogNameError,
    asyncpg.InsufficientPrivilegeError,
)
_LOGIN_AT_POOLER = re.compile("no such (database|user)|authentication failed|config error")
_PARAMETER = (
    asyncpg.UndefinedObjectError,
    asyncpg.InvalidParameterValueError,
    asyncpg.CantChangeRuntimeParamError,
)
_AT_FAULT = ConfigurationError.exit_code  # the address, whatever the server is
_PARAMETER_NAME = re.compile(r'parameter(?: in options)?:? "?([\w.]+)')


async def connect(dsn: str, timeout_seconds: float, connection_class: type[C], **options: Any) -> C:
    """A connection to the first host that takes it. Raises `LedgerRefused`, or what the driver and the network raise.

    The host that took the last one is tried first. `options` are the driver's.
    """
    address = PostgresAddress.of(dsn)
    hosts = _last_good_first(dsn, address.hosts or ((None, None),))
    options["connection_class"] = connection_class

    def attempt(host: str | None, port: int | None) -> Callable[[], Awaitable[C]]:
        # A socket has no TLS, whatever the mode.
        is_socket = host is not None and host.startswith("/")
        ways: tuple[tls.Attempt, ...] = (False,) if is_socket else tls.attempts(address.parameters)
        return lambda: _connect_to(address, ways, options | {"host": host, "port": port})

    failures: dict[int, Exception] = {}
    accepted: tuple[int, C] | None = None
    late: TimeoutError | None = None
    try:
        async with asyncio.timeout(timeout_seconds):
            accepted = await first_to_accept([attempt(*host) for host in hosts], failures)
    except TimeoutError as error:
        late = error
    if accepted is not None:
        number, connection = accepted
        _last_good[dsn] = hosts[number]
        return connection
    in_order = [failures[number] for number in sorted(failures)]
    for failure in in_order:
        if (refused := refusal(failure)) is not None:
            raise refused from failure
    unsuitable = (each for each in in_order if isinstance(each, asyncpg.TargetServerAttributeNotMatched))
    raise late or next(unsuitable, in_order[0])


def _last_good_first(dsn: str, hosts: Sequence[Host]) -> list[Host]:
    last = _last_good.get(dsn)
    return sorted(hosts, key=lambda host: host != last)


def refusal(error: Exception) -> LedgerRefused | None:
    """What to change, if no other attempt can help; None: one may."""
    if isinstance(error, OSError):
        return _refusal_by_network(error)
    said, name = in_one_line(error), type(error).__name__
    at_pooler = isinstance(error, asyncpg.ProtocolViolationError)  # PgBouncer gives most of its errors this code
    if isinstance(error, _LOGIN) or (at_pooler and _LOGIN_AT_POOLER.search(said)):
        return LedgerRefused(explain(error), detail=said)
    if isinstance(error, _PARAMETER) or (at_pooler and _NOT_AT_START in said):
        found = _PARAMETER_NAME.search(said)
        shown = f"the parameter {found[1]}" if found else "a parameter"
        return LedgerRefused(f"DATABASE_URL: the server refuses {shown}, {name}", exit_code=_AT_FAULT)
    if isinstance(error, asyncpg.PostgresSyntaxError):  # nothing but `options` is parsed before there is a session
        expected = "expected e.g. options=-c%20work_mem%3D8MB"
        return LedgerRefused(f"DATABASE_URL: the server refuses options, {name}; {expected}", exit_code=_AT_FAULT)
    if isinstance(error, asyncpg.InterfaceError):  # the driver does not understand the address, or the server
        return LedgerRefused(f"DATABASE_URL: the driver cannot connect, {name}", detail=said, exit_code=_AT_FAULT)
    return None


def _refusal_by_network(error: OSError) -> LedgerRefused | None:
    match error:
        case ssl.SSLEOFError() | ssl.SSLZeroReturnError():  # it ended: it may be restarting
            return None
        case ssl.SSLCertVerificationError():
            return LedgerRefused("the server's certificate is refused, see sslrootcert", detail=error.verify_message)
        case ssl.SSLError():
            reason = error.reason or type(error).__name__
            return LedgerRefused(f"TLS fails ({reason}), check sslmode, sslcert and the port")
        case ConnectionError() if "rejected SSL upgrade" in str(error):
            return LedgerRefused("the server has no TLS, which sslmode requires")
        case OSError(errno=errno.EACCES):
            return LedgerRefused("this process may not use the server's socket, permission denied")
    return None


async def _connect_to(address: PostgresAddress, ways: tuple[tls.Attempt, ...], options: dict[str, Any]) -> Any:
    """Connect to one host, in the first way of TLS that it takes."""
    for way in ways[:-1]:
        try:
            return await _connect_with_settings(address, options | {"ssl": way})
        except (OSError, asyncpg.InvalidAuthorizationSpecificationError, asyncpg.PostgresConnectionError):
            continue  # the other way
    return await _connect_with_settings(address, options | {"ssl": ways[-1]})


async def _connect_with_settings(address: PostgresAddress, options: dict[str, Any]) -> Any:
    """Connect with the settings in the first message, so that a RESET returns to them.

    A pooler may not take them there: then they are set afterwards. It keeps `options`, which says what server is meant.
    """
    options |= {"target_session_attrs": address.parameters.get("target_session_attrs")}
    settings = dict(address.settings)
    first = {name: settings.pop(name) for name in ("options",) if name in settings}
    try:
        return await asyncpg.connect(address.driver_url, server_settings=first | settings | _NAME, **options)
    except asyncpg.ProtocolViolationError as error:
        if not settings or _NOT_AT_START not in str(error):
            raise
    connection = await asyncpg.connect(address.driver_url, server_settings=first | _NAME, **options)
    try:
        await connection.fetch(_SET, list(settings), list(settings.values()))
    except BaseException:
        connection.terminate()
        raise
    return connection
