"""The check of one Redis server: its login, version and role, and the commands that the lock needs.

Guarantees: what no later attempt can help (a certificate, a login, a missing right, a database that does not exist, a
server that is no Redis) is fatal, and named. Only silence and what passes by itself (a name that does not resolve, a
server that starts or fails over, a full memory) is not: events are recorded without Redis.
"""

import asyncio
import errno
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, unquote

from redis.asyncio import Redis
from redis.exceptions import AuthenticationError, InvalidResponse, NoPermissionError, RedisError, ResponseError

from firstclaim.errors import LockUnavailable
from firstclaim.inbox.lock_token import new_token
from firstclaim.inbox.redis_server import RedisServer
from firstclaim.server.check import Check, fail, ok, warn
from firstclaim.urls.redis import TLS_FILES

_MIN_REDIS = (7, 0)
_PROBE_SECONDS = 1.0
_NO_REDIS = "the server answers, but not as a Redis or a Valkey: check the host and the port in REDIS_URL"
_SSL_REQUEST = bytes.fromhex("0000000804d2162f")  # Postgres' first message: no other server answers it with one letter
# What the client raises at a reply that no Redis gives: it parses what it expects, and does not look first.
_UNEXPECTED_REPLY = (InvalidResponse, AttributeError, KeyError, TypeError, ValueError)
FAILURES = (*_UNEXPECTED_REPLY, RedisError, OSError, TimeoutError)
_OTHER_KIND = {
    True: "the server has no TLS, and REDIS_URL asks for it; expected redis://",
    False: "the server expects TLS; expected rediss:// in REDIS_URL",
}


async def check_server(
    server: RedisServer, address: SplitResult, key: str, *, kind: str | None = None
) -> AsyncIterator[Check]:
    """Check the server, and close it. `key` is the beginning of a key that no event has, and that this server has.

    `kind` is what the server is a part of, or None if it must be alone.
    """
    try:
        await log_in(server.client)
        async for check in _inspect(server, key, kind):
            yield check
    except FAILURES as error:
        yield await explain(error, address)
    finally:
        await server.close()


async def explain(error: BaseException, address: SplitResult, *, login: str = "the user and the password") -> Check:
    """The check that fails with one of `FAILURES`, at a server of this address. `login`: what to correct there."""
    if isinstance(error, _UNEXPECTED_REPLY):
        return fail("redis", _NO_REDIS)
    check = _failed(error, address, login)
    if not check.fatal and (reason := await _unfit_server(address)) is not None:
        return fail("redis", reason)
    return check


async def _unfit_server(address: SplitResult) -> str | None:
    """What a server that seems silent shows itself to be: one with TLS where the address has none, a Postgres, ..."""
    with_tls = address.scheme == "rediss"
    # No password: nothing secret is sent without TLS.
    if with_tls and await _first_byte(address, b"PING\r\n") in (b"+", b"-"):
        return _OTHER_KIND[True]
    if address.scheme == "redis" and await _accepts_tls(address):
        return _OTHER_KIND[False]
    # It ends a connection whose first message it cannot read, without an answer.
    return _NO_REDIS if await _first_byte(address, _SSL_REQUEST) in (b"S", b"N") else None


async def _accepts_tls(address: SplitResult) -> bool:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return await _first_byte(address, b"", context) is not None


async def _first_byte(address: SplitResult, message: bytes, tls: ssl.SSLContext | None = None) -> bytes | None:
    """The first byte of the answer to `message`, if there is one to be had; None: no connection, or silence."""
    with suppress(OSError, TimeoutError):
        async with asyncio.timeout(_PROBE_SECONDS):
            if address.scheme == "unix":
                reader, writer = await asyncio.open_unix_connection(unquote(address.path))
            else:
                reader, writer = await asyncio.open_connection(address.hostname, address.port or 6379, ssl=tls)
            try:
                if not message:
                    return b""
                writer.write(message)
                return await reader.read(1)
            finally:
                writer.transport.abort()
    return None


async def log_in(redis: Redis) -> None:
    """Connect as the lock does. Raises one of `FAILURES`."""
    connection = redis.connection_pool.make_connection()  # type: ignore[no-untyped-call]
    try:
        await connection.connect()
    finally:
        await connection.disconnect(nowait=True)


async def _inspect(server: RedisServer, key: str, kind: str | None) -> AsyncIterator[Check]:
    name = "Redis"
    try:
        name, unsuitable = _inspect_info(await server.client.info(), alone=kind is None)
    except (NoPermissionError, ResponseError) as error:
        if not isinstance(error, NoPermissionError) and "unknown command" not in str(error):
            raise
        yield warn("redis", "the user may not run INFO: version and role are not checked")
    else:
        if unsuitable is not None:
            yield unsuitable
            return
    try:
        await server.try_commands(key + new_token() if kind is None else key)
        await server.ping()
    except LockUnavailable as error:
        detail = f"{name}: {error}. The lock needs SET with NX, GET and PX, GET, PTTL, EVAL, DEL and PING"
        hopeless = _hopeless(error) is not None
        yield fail("redis", f"{detail}: check the user's permissions and maxmemory", fatal=hopeless)
    else:
        yield ok("redis", f"{name}: {kind}" if kind else name)


def _failed(error: BaseException, address: SplitResult, login: str) -> Check:
    """The check that fails with `error`, which stops `serve` only if no other attempt can help."""
    if (reason := _hopeless(error, login)) is not None:
        return fail("redis", reason)
    if isinstance(error, ResponseError):
        return fail("redis", f"refuses INFO: {error}", fatal=False)
    detail = (
        f"cannot be reached: {_unreachable(error, address)}. Events are recorded, and dispatched once it is reachable"
    )
    return fail("redis", detail, fatal=False)


def _unreachable(error: BaseException, address: SplitResult) -> str:
    """What the network says of the address, which is shown without the login."""
    path = Path(unquote(address.path))
    host = f"[{address.hostname}]" if ":" in (address.hostname or "") else address.hostname
    place = str(path) if address.scheme == "unix" else f"{host}:{address.port or 6379}"
    for each in _chain(error):
        match each:
            case socket.gaierror():
                return f"the host name {host} in REDIS_URL cannot be resolved"
            case FileNotFoundError():
                return f"there is no socket {path}" if path.parent.is_dir() else f"there is no folder {path.parent}"
            case OSError() if f"[Errno {errno.ECONNREFUSED}]" in str(each):  # also one of several addresses of a name
                return f"connection refused at {place}: check the address in REDIS_URL, and that the server runs"
    return f"no answer from {place} ({type(error).__name__})"


def _hopeless(error: BaseException, login: str = "the user and the password") -> str | None:
    """What to change, if `error`, or one that it was raised over, says that no other attempt can help."""
    found = (_refusal(each, login) or _network_refusal(each) for each in _chain(error))
    return next((reason for reason in found if reason is not None), None)


def _refusal(error: BaseException, login: str) -> str | None:
    match error:
        case AuthenticationError():
            return f"refuses the login: {error}; check {login} in REDIS_URL"
        case NoPermissionError():
            return f"refuses the user: {error}"
        case ResponseError() if "DB index" in str(error) or "SELECT is not allowed" in str(error):
            return f"has no database of this number: {error}; correct REDIS_URL"
        case ResponseError() if "unknown command" in str(error):
            return f"lacks a command: {error}"
    return None


def _network_refusal(error: BaseException) -> str | None:
    match error:
        case ssl.SSLEOFError() | ssl.SSLZeroReturnError():  # it ended: it may be restarting
            return None
        case ssl.SSLCertVerificationError():
            return (
                f"its certificate is refused: {error.verify_message}; name the file of its CA in ssl_ca_certs, or "
                "do not verify it, with ssl_cert_reqs=none"
            )
        case ssl.SSLError():
            reason = error.reason or type(error).__name__
            return f"TLS fails ({reason}): check that it has TLS on this port, and {', '.join(TLS_FILES)}"
        case OSError(errno=errno.EACCES):
            return "this process may not use its socket: permission denied"
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _inspect_info(info: dict[str, Any], *, alone: bool) -> tuple[str, Check | None]:
    """The server's name and version, and the check that fails if it is not suitable."""
    if "sentinel" in (info.get("redis_mode"), info.get("server_mode")):
        expected = "redis+sentinel://host:26379/service_name"
        return "a Sentinel", fail("redis", f"is a Sentinel, which holds no keys; expected {expected} in REDIS_URL")
    valkey = info.get("valkey_version")
    version = str(valkey or info["redis_version"])
    name = f"{'Valkey' if valkey else 'Redis'} {version}"
    if tuple(int(part) for part in version.split(".")[:2]) < _MIN_REDIS:
        detail = f"{name} is too old: Redis 7 or Valkey 8, or newer, is required (for SET with NX and GET)"
        return name, fail("redis", detail)
    if alone and info.get("cluster_enabled"):
        return name, fail("redis", f"{name} is a node of a Cluster; expected redis+cluster:// in REDIS_URL")
    if info.get("role") != "master":
        return name, fail("redis", f"{name} is a replica: use the primary's address", fatal=False)
    return name, None
