"""The lock, which is the fast first check: one Redis key per event id, `claimed:<token>` or `recorded:<epoch>`.

Guarantees: a lock is replaced or deleted only by a caller that knows its exact value (compare-and-set,
compare-and-delete). One command decides what to do with a delivery. An outage costs one timeout per breaker window, not
one per request. Correctness does not depend on this module: Redis may be flushed, frozen or failed over at any moment,
and no event is lost or processed twice, because the ledger decides. So every error is the same value, `UNREACHABLE`.
The client never retries a command: after a lost reply, the retry would find our own lock and take it for another's.

Only silence and refusals (OOM, READONLY, NOPERM, ...) open the breaker. Any other reply closes it, even an error about
one key: otherwise a single key of another type would keep the breaker open for all events.
"""

import time
from collections.abc import Mapping
from contextlib import suppress
from enum import Enum, auto
from typing import Any

import hiredis
import structlog
from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError
from redis.maint_notifications import MaintNotificationsConfig

from firstclaim.errors import LockUnavailable
from firstclaim.inbox.lock_token import new_token
from firstclaim.inbox.redis_commands import RedisCommands
from firstclaim.observability import metrics

log = structlog.get_logger(__name__)

_CLAIMED = b"claimed:"
_RECORDED = b"recorded:"
# ValueError: the client raises it over an error reply that it cannot parse (a malformed MOVED).
_UNREACHABLE_ERRORS = (RedisError, OSError, TimeoutError, ValueError)
_MAX_BATCH = 200  # commands in one write

_REPLIES: dict[str, tuple[type, ...]] = {
    "SET": (bytes, type(None)),
    "GET": (bytes, type(None)),
    "PTTL": (int,),
    "DEL": (int,),
    "EVAL": (int,),
}

# Lua on every server: `SET ... IFEQ` exists on Valkey 8.1 and Redis 8.4 only.
_SWAP = """
if redis.call('GET', KEYS[1]) == ARGV[1] then
  redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
  return 1
end
return 0"""
# The same for many keys, each with its own value. A key of another type is left alone.
_SWAP_MANY = """
for i, key in ipairs(KEYS) do
  if redis.pcall('GET', key) == ARGV[i] then redis.call('SET', key, ARGV[#ARGV - 1], 'PX', ARGV[#ARGV]) end
end
return #KEYS"""
_DROP = """
local current = redis.call('GET', KEYS[1])
if current == ARGV[1] or current == ARGV[2] then return redis.call('DEL', KEYS[1]) end
return 0"""


class LockReply(Enum):
    """The result of a lock attempt."""

    HELD = auto()  # ours: claim in the ledger
    RECORDED = auto()  # a durable row exists under the current epoch, and is owned
    BUSY = auto()  # another delivery is between lock and row; nothing is promised yet
    UNREACHABLE = auto()  # Redis did not answer, refused the command, or gave a reply of an unexpected type


def connect(url: str, *, timeout_seconds: float) -> Redis:
    """A client for the lock; opens nothing yet. `timeout_seconds` applies to each connect and each round trip."""
    pool: ConnectionPool = ConnectionPool.from_url(
        url,
        socket_timeout=timeout_seconds,
        socket_connect_timeout=timeout_seconds,
        retry=Retry(NoBackoff(), 0),
        protocol=2,
        driver_info=None,
        redis_connect_func=_introduce,
        maint_notifications_config=MaintNotificationsConfig(enabled=False),
    )
    return Redis.from_pool(pool)


async def _introduce(connection: AbstractConnection) -> None:
    """Log in, choose the database, and name the connection, unless the user may not: the name is for operators only."""
    await connection.on_connect()
    await connection.send_command("CLIENT", "SETNAME", "firstclaim", check_health=False)
    with suppress(ResponseError):
        await connection.read_response()


class Lock:
    """The locks of all event ids. Its methods never raise: a failure is `UNREACHABLE`, or has no effect."""

    def __init__(
        self,
        redis: Redis,
        *,
        prefix: str,
        lock_ttl_seconds: float,
        marker_ttl_seconds: float,
        breaker_seconds: float,
    ) -> None:
        self._redis = redis
        # One connection for all concurrent commands, without the client's pool and pipeline: these took more time than
        # Redis itself.
        connection = redis.connection_pool.make_connection()  # type: ignore[no-untyped-call]
        self._commands = RedisCommands(connection, timeout_seconds=connection.socket_timeout, max_batch=_MAX_BATCH)
        self._prefix = prefix
        self._lock_ttl_ms = round(lock_ttl_seconds * 1000)
        self._marker_ttl_ms = round(marker_ttl_seconds * 1000)
        self._breaker_seconds = breaker_seconds
        self._tripped = False
        self._open_until = 0.0
        self._probe_all = False  # a command other than SET was refused: a SET that is accepted proves nothing

    @property
    def unreachable(self) -> bool:
        """Whether the breaker is open: Redis failed a moment ago, and no command is sent."""
        return time.monotonic() < self._open_until

    async def acquire(self, event_id: str, token: str, epoch: str | None, *, over_marker: bool = False) -> LockReply:
        """Try to lock. `epoch` is the ledger's current one, or None if it is unknown: then no marker counts.

        `over_marker` is for recovery: the ledger says that the work is due, so the lock replaces a marker.
        """
        key, ours = self._key(event_id), _CLAIMED + token.encode()
        try:
            current = await self._set_if_absent(key, ours)
            if current is None or current == ours:
                return LockReply.HELD
            if epoch is not None and current == _RECORDED + epoch.encode() and not over_marker:
                return LockReply.RECORDED
            if current.startswith(_CLAIMED) and not await self._is_left_over(key):
                return LockReply.BUSY
            swapped = await self._call("EVAL", _SWAP, 1, key, current, ours, self._lock_ttl_ms)
        except LockUnavailable:
            return LockReply.UNREACHABLE
        # Not swapped: the value changed between the two commands, so another delivery is in flight.
        return LockReply.HELD if swapped else LockReply.BUSY

    async def mark_recorded(self, event_id: str, token: str, epoch: str | None) -> None:
        """Replace our own lock by the marker. Call it only once the row's COMMIT is known. A failure does no harm."""
        if epoch is None:
            return
        key, ours, marker = self._key(event_id), _CLAIMED + token.encode(), _RECORDED + epoch.encode()
        try:
            await self._call("EVAL", _SWAP, 1, key, ours, marker, self._marker_ttl_ms)
        except LockUnavailable:
            log.debug("marker_not_written", event_id=event_id)

    async def mark_all_recorded(self, tokens: Mapping[str, str], epoch: str | None) -> None:
        """The same for many events in one command: `tokens` by event id. All were committed under `epoch`."""
        if epoch is None:
            return
        keys = [self._key(event_id) for event_id in tokens]
        ours = [_CLAIMED + token.encode() for token in tokens.values()]
        marker = _RECORDED + epoch.encode()
        try:
            await self._call("EVAL", _SWAP_MANY, len(keys), *keys, *ours, marker, self._marker_ttl_ms)
        except LockUnavailable:
            log.debug("markers_not_written", events=len(keys))

    async def forget(self, event_id: str, token: str, epoch: str | None) -> None:
        """Delete our own lock or marker, so that the next delivery reaches the ledger."""
        key, ours, marker = self._key(event_id), _CLAIMED + token.encode(), _RECORDED + (epoch or "").encode()
        try:
            await self._call("EVAL", _DROP, 1, key, ours, marker)
        except LockUnavailable:
            log.debug("lock_not_deleted", event_id=event_id)

    async def try_commands(self) -> None:
        """Send every command that the lock needs, on a key of its own, whatever the breaker says.

        Raises `LockUnavailable`, whose message names the command that was refused or not answered.
        """
        token = new_token()
        key, ours, marker = self._key(f"check/{token}"), _CLAIMED + token.encode(), _RECORDED + token.encode()
        await self._execute("SET", key, ours, "NX", "GET", "PX", self._lock_ttl_ms)
        await self._execute("GET", key)  # for the scripts, which run with the user's rights
        await self._execute("PTTL", key)
        await self._execute("DEL", key)
        await self._execute("SET", key, ours, "NX", "GET", "PX", self._lock_ttl_ms)
        await self._execute("EVAL", _SWAP, 1, key, ours, marker, self._lock_ttl_ms)
        await self._execute("EVAL", _DROP, 1, key, ours, marker)

    async def ping(self) -> None:
        """Send a PING, also while the breaker is open. Raises `LockUnavailable`."""
        try:
            await self._redis.ping()
        except _UNREACHABLE_ERRORS as error:
            raise LockUnavailable(f"PING: {type(error).__name__}") from error

    async def close(self) -> None:
        """Close the connections."""
        await self._commands.close()
        await self._redis.aclose()

    def _key(self, event_id: str) -> str:
        return self._prefix + event_id

    async def _set_if_absent(self, key: str, value: bytes) -> bytes | None:
        """`SET NX GET`: None if it was set, else the current value."""
        for last in (False, True):
            try:
                current: bytes | None = await self._call("SET", key, value, "NX", "GET", "PX", self._lock_ttl_ms)
            except _WrongTypeError:
                # A fault of this one key, not of the server: we never write a list or a hash, so delete it.
                await self._call("DEL", key)
                if last:
                    break
            else:
                return current
        raise LockUnavailable("the key keeps having the wrong type")

    async def _is_left_over(self, key: str) -> bool:
        """Whether the lock cannot be one of ours, because it has no TTL or a longer one."""
        remaining = int(await self._call("PTTL", key))
        return remaining == -1 or remaining > self._lock_ttl_ms

    async def _call(self, name: str, *arguments: str | bytes | int) -> Any:
        if self.unreachable:
            raise LockUnavailable("breaker open")
        if not self._tripped:
            return await self._execute(name, *arguments)
        # The window is over: this call is the probe, and for all others the breaker stays open. Only a probe closes it,
        # not a late reply to an earlier command: a SET may be accepted while the EVAL beside it is refused.
        self._open_until = time.monotonic() + self._breaker_seconds
        try:
            if self._probe_all:
                await self.try_commands()
            reply = await self._execute(name, *arguments)
        except _AnsweredError:
            self._close_breaker()
            raise
        self._close_breaker()
        return reply

    async def _execute(self, name: str, *arguments: str | bytes | int) -> Any:
        """Send a command past the breaker. Raises `LockUnavailable`; only a refusal or silence opens the breaker."""
        try:
            reply = await self._commands.call(hiredis.pack_command((name, *arguments)))  # type: ignore[arg-type]
        except ResponseError as error:
            if str(error).startswith("WRONGTYPE"):
                raise _WrongTypeError from error
            self._probe_all = self._probe_all or name != "SET"
            self._trip(error, name)
            raise LockUnavailable(f"{name} is refused: {error}") from error
        except _UNREACHABLE_ERRORS as error:
            self._trip(error, name)
            raise LockUnavailable(f"{name} is not answered: {type(error).__name__}") from error
        if not isinstance(reply, _REPLIES[name]):
            raise _UnexpectedReplyError(f"the reply to {name} has an unexpected type: {type(reply).__name__}")
        return reply

    def _trip(self, error: BaseException, command: str) -> None:
        # Also for OOM, READONLY and NOPERM: the server answers, but it grants no lock.
        if not self._tripped:
            metrics.redis_outages.inc()
            pause = self._breaker_seconds
            log.warning("redis_away", error=type(error).__name__, command=command, retry_every_seconds=pause)
        self._tripped, self._open_until = True, time.monotonic() + self._breaker_seconds

    def _close_breaker(self) -> None:
        log.warning("redis_back")
        self._tripped, self._open_until, self._probe_all = False, 0.0, False


class _AnsweredError(LockUnavailable):
    """Redis answered, but this one key cannot be locked."""


class _WrongTypeError(_AnsweredError):
    """A key of ours holds another type."""


class _UnexpectedReplyError(_AnsweredError):
    """The reply to a command has a type that the command never returns."""
