"""One Redis server, or the one that is a Sentinel's master: the commands of the lock, and the breaker.

Guarantees: an outage costs one timeout per breaker window, not one per request. The client never retries a command:
after a lost reply, the retry would find our own lock and take it for another's. Every failure is a `LockUnavailable`.

Only silence and refusals (OOM, READONLY, NOPERM, ...) open the breaker. Any other reply closes it, even an error about
one key: otherwise a single key of another type would keep the breaker open for all events.

A server that answers READONLY has become a replica. Its connection is closed, because the next one may lead to the new
primary: the Sentinels are asked for its address, and a host's name is resolved again.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, cast

import hiredis
import structlog
from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.connection import AbstractConnection, SSLConnection, parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import (
    Sentinel,
    SentinelConnectionPool,
    SentinelManagedConnection,
    SentinelManagedSSLConnection,
)
from redis.backoff import NoBackoff
from redis.exceptions import ReadOnlyError, RedisError, ResponseError
from redis.maint_notifications import MaintNotificationsConfig

from firstclaim.errors import LockUnavailable
from firstclaim.inbox.lock_commands import REPLIES, key_of, try_commands
from firstclaim.inbox.lock_token import new_token
from firstclaim.inbox.redis_commands import RedisCommands
from firstclaim.observability import metrics
from firstclaim.urls.redis import RedisAddress, RedisKind

log = structlog.get_logger(__name__)

# ValueError: the client raises it over an error reply that it cannot parse (a malformed MOVED).
UNREACHABLE_ERRORS = (RedisError, OSError, TimeoutError, ValueError)
_MAX_BATCH = 200  # commands in one write


def connect(url: str, *, timeout_seconds: float, host: tuple[str, int] | None = None) -> Redis:
    """A client for the lock; opens nothing yet. `timeout_seconds` applies to each connect and each round trip.

    `url` is that of one server or of a Sentinel's service. `host` is a node of a Cluster, and `url` the Cluster's.
    """
    address = RedisAddress.parse(url)
    options: dict[str, Any] = {
        **parse_url(address.server),
        "socket_timeout": timeout_seconds,
        "socket_connect_timeout": timeout_seconds,
        "retry": Retry(NoBackoff(), 0),
        "protocol": 2,
        "driver_info": None,
        "redis_connect_func": _introduce,
        "maint_notifications_config": MaintNotificationsConfig(enabled=False),
    }
    if address.kind is RedisKind.SENTINEL:
        return Redis.from_pool(_pool_of_service(address, options))
    if host is not None:
        options["host"], options["port"] = host
    return Redis.from_pool(ConnectionPool(**options))


def sentinels(address: RedisAddress, *, timeout_seconds: float) -> list[Redis]:
    """A client for each of the Sentinels. TLS is that of the servers, the login is not."""
    return _sentinels(address, {**parse_url(address.server), "socket_timeout": timeout_seconds}).sentinels


def _pool_of_service(address: RedisAddress, options: dict[str, Any]) -> ConnectionPool:
    """Connections to the service's master. Each of them asks the Sentinels for its address first."""
    with_tls = options.pop("connection_class", None) is SSLConnection
    connection = SentinelManagedSSLConnection if with_tls else SentinelManagedConnection
    asked = _sentinels(address, {**options, "connection_class": SSLConnection} if with_tls else options)
    options = {name: value for name, value in options.items() if name not in ("host", "port")}
    make_pool = cast(Callable[..., ConnectionPool], SentinelConnectionPool)
    return make_pool(address.service, asked, connection_class=connection, **options)


def _sentinels(address: RedisAddress, options: Mapping[str, Any]) -> Sentinel:
    timeout_seconds = options["socket_timeout"]
    shared = {name: value for name, value in options.items() if name.startswith("ssl_")}
    return Sentinel(  # type: ignore[no-untyped-call]
        address.hosts,
        sentinel_kwargs={
            **shared,
            "ssl": options.get("connection_class") is SSLConnection,
            "username": address.sentinel_username,
            "password": address.sentinel_password,
            "socket_timeout": timeout_seconds,
            "socket_connect_timeout": timeout_seconds,
            "retry": Retry(NoBackoff(), 0),
            "protocol": 2,
            "driver_info": None,
            "maint_notifications_config": MaintNotificationsConfig(enabled=False),
        },
    )


async def _introduce(connection: AbstractConnection) -> None:
    """Log in, choose the database, and name the connection, unless the user may not: the name is for operators only."""
    await connection.on_connect()
    await connection.send_command("CLIENT", "SETNAME", "firstclaim", check_health=False)
    with suppress(ResponseError):
        await connection.read_response()


class RedisServer:
    """One server. `name` is its address in the log, or None if it is the only one."""

    several_keys = True  # a command may have several

    def __init__(self, redis: Redis, *, breaker_seconds: float, name: str | None = None) -> None:
        self.client = redis
        # One connection for all concurrent commands, without the client's pool and pipeline: these took more time than
        # Redis itself.
        connection = redis.connection_pool.make_connection()  # type: ignore[no-untyped-call]
        self._commands = RedisCommands(connection, timeout_seconds=connection.socket_timeout, max_batch=_MAX_BATCH)
        self._breaker_seconds = breaker_seconds
        self.name = name or "Redis"
        self._named = {} if name is None else {"server": name}
        self._tripped = False
        self._open_until = 0.0
        self._probe_all = False  # a command other than SET was refused: a SET that is accepted proves nothing

    @property
    def unreachable(self) -> bool:
        """Whether the breaker is open: the server failed a moment ago, and no command is sent."""
        return time.monotonic() < self._open_until

    async def call(self, name: str, *arguments: str | bytes | int) -> Any:
        """The reply to a command of the lock. Raises `LockUnavailable`, and `AnsweredError` if only its key is odd."""
        if self.unreachable:
            raise LockUnavailable("breaker open")
        if not self._tripped:
            return await self._execute(name, *arguments)
        # The window is over: this call is the probe, and for all others the breaker stays open. Only a probe closes it,
        # not a late reply to an earlier command: a SET may be accepted while the EVAL beside it is refused.
        self._open_until = time.monotonic() + self._breaker_seconds
        try:
            if self._probe_all:
                await self.try_commands(_beside(key_of(name, arguments)))
            reply = await self._execute(name, *arguments)
        except AnsweredError:
            self._close_breaker()
            raise
        self._close_breaker()
        return reply

    async def try_commands(self, key: str) -> None:
        """Send every command that the lock needs, on a key of its own, whatever the breaker says.

        Raises `LockUnavailable`, whose message names the command that was refused or not answered.
        """
        await try_commands(self._execute, key)

    async def ping(self) -> None:
        """Send a PING, also while the breaker is open. Raises `LockUnavailable`."""
        try:
            await self.client.ping()
        except UNREACHABLE_ERRORS as error:
            raise LockUnavailable(f"PING: {type(error).__name__}") from error

    async def close(self) -> None:
        """Close the connections."""
        await self._commands.close()
        await self.client.aclose()
        if isinstance(pool := self.client.connection_pool, SentinelConnectionPool):
            await pool.sentinel_manager.aclose()

    async def _execute(self, name: str, *arguments: str | bytes | int) -> Any:
        """Send a command past the breaker. Raises `LockUnavailable`; only a refusal or silence opens the breaker."""
        try:
            reply = await self._commands.call(hiredis.pack_command((name, *arguments)))  # type: ignore[arg-type]
        except ResponseError as error:
            self._refused(error, name)
            raise LockUnavailable(f"{name} is refused: {error}") from error
        except UNREACHABLE_ERRORS as error:
            self._trip(error, name)
            raise LockUnavailable(f"{name} is not answered: {type(error).__name__}") from error
        if not isinstance(reply, REPLIES[name]):
            raise UnexpectedReplyError(f"the reply to {name} has an unexpected type: {type(reply).__name__}")
        return reply

    def _refused(self, error: ResponseError, command: str) -> None:
        """Open the breaker, unless the error is about the command's key: then raises `AnsweredError`."""
        if str(error).startswith("WRONGTYPE"):
            raise WrongTypeError from error
        self._probe_all = self._probe_all or command != "SET"
        self._trip(error, command)
        if isinstance(error, ReadOnlyError):
            self._commands.disconnect(error)

    def _trip(self, error: BaseException, command: str) -> None:
        # Also for OOM, READONLY and NOPERM: the server answers, but it grants no lock.
        if not self._tripped:
            metrics.redis_outages.inc()
            pause = self._breaker_seconds
            failure = type(error).__name__
            log.warning("redis_away", error=failure, command=command, retry_every_seconds=pause, **self._named)
        self._tripped, self._open_until = True, time.monotonic() + self._breaker_seconds

    def _close_breaker(self) -> None:
        log.warning("redis_back", **self._named)
        self._tripped, self._open_until, self._probe_all = False, 0.0, False


class AnsweredError(LockUnavailable):
    """The server answered, but this one key cannot be locked there."""


class WrongTypeError(AnsweredError):
    """A key of ours holds another type."""


class UnexpectedReplyError(AnsweredError):
    """The reply to a command has a type that the command never returns."""


def _beside(key: bytes) -> str:
    """A key that no event has, in the hash slot of `key`: of a Cluster, the same server has it."""
    text = key.decode()
    return f"{text}/check/{new_token()}" if "{" in text else f"{text}/check/{new_token()}{{{text}}}"
