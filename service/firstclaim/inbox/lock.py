"""The fast first line: one Redis key per event id, `claimed:<token>` or `recorded:<epoch>`.

Guarantees: a lock is only ever replaced or deleted by whoever knows its exact value (compare-and-set,
compare-and-delete); one command decides a delivery; an outage costs one timeout per breaker window, not one
per request. It guarantees nothing about effects: Redis may be flushed, frozen or failed over at any moment
and no event is lost or doubled, because the ledger alone carries safety. So every error is the same value,
`AWAY`, and the client never retries: a lost reply retried by the library would look like another's lock.
"""

import asyncio
import secrets
import time
from collections.abc import Sequence
from enum import Enum, auto
from typing import Any

import hiredis
import structlog
from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError
from redis.maint_notifications import MaintNotificationsConfig

from firstclaim.errors import LockUnavailable
from firstclaim.inbox.batcher import Batcher
from firstclaim.observability import metrics

log = structlog.get_logger(__name__)

_CLAIMED = b"claimed:"
_RECORDED = b"recorded:"
_AWAY_ERRORS = (RedisError, OSError, TimeoutError)
_BATCH_MOST = 200  # commands in one write: a reply to the first of more would wait too long for the last

# Lua on every server: `SET ... IFEQ` exists on Valkey 8.1 and Redis 8.4 only.
_SWAP = """
if redis.call('GET', KEYS[1]) == ARGV[1] then
  redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
  return 1
end
return 0"""
_DROP = """
local seen = redis.call('GET', KEYS[1])
if seen == ARGV[1] or seen == ARGV[2] then return redis.call('DEL', KEYS[1]) end
return 0"""


class LockReply(Enum):
    """What asking for the lock came to."""

    HELD = auto()  # ours: claim in the ledger
    RECORDED = auto()  # a durable row exists under the current epoch, and is owned
    BUSY = auto()  # somebody is between lock and row; nobody has promised anything yet
    AWAY = auto()  # Redis cannot be asked, or did not answer


def connect(url: str, *, timeout_seconds: float) -> Redis:
    """A client as the lock needs it; opens nothing yet. `timeout_seconds` holds per connect and per round trip."""
    pool: ConnectionPool = ConnectionPool.from_url(
        url,
        socket_timeout=timeout_seconds,
        socket_connect_timeout=timeout_seconds,
        retry=Retry(NoBackoff(), 0),
        protocol=2,
        driver_info=None,
        client_name="firstclaim",
        maint_notifications_config=MaintNotificationsConfig(enabled=False),
    )
    return Redis.from_pool(pool)


class Lock:
    """The lock over all event ids. Its methods never raise: what they could not do is `AWAY` or nothing."""

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
        # One connection for all that goes on at once, used as it is: a pool and a pipeline of the client's took more
        # time than Redis.
        self._connection = redis.connection_pool.make_connection()  # type: ignore[no-untyped-call]
        self._timeout_seconds: float = self._connection.socket_timeout
        self._prefix = prefix
        self._lock_ttl_ms = round(lock_ttl_seconds * 1000)
        self._marker_ttl_ms = round(marker_ttl_seconds * 1000)
        self._breaker_seconds = breaker_seconds
        self._tripped = False
        self._away_until = 0.0
        self._commands = Batcher(self._send, most=_BATCH_MOST)

    @staticmethod
    def new_token() -> str:
        """One per attempt to lock, so that a lock is never mistaken for a later one of the same process."""
        return secrets.token_hex(8)

    @property
    def away(self) -> bool:
        """Whether the breaker is open: Redis failed a moment ago and is not asked."""
        return time.monotonic() < self._away_until

    async def acquire(self, event_id: str, token: str, epoch: str | None, *, over_marker: bool = False) -> LockReply:
        """Try to lock. `epoch` is the ledger's current one, None when unknown: then no marker counts.

        `over_marker` is recovery's: the ledger has said that work is due, so a marker is no evidence against it.
        """
        key, ours = self._key(event_id), _CLAIMED + token.encode()
        try:
            seen = await self._set_if_absent(key, ours)
            if seen is None or seen == ours:
                return LockReply.HELD
            if epoch is not None and seen == _RECORDED + epoch.encode() and not over_marker:
                return LockReply.RECORDED
            if seen.startswith(_CLAIMED) and not await self._left_over(key):
                return LockReply.BUSY
            swapped = await self._call("EVAL", _SWAP, 1, key, seen, ours, self._lock_ttl_ms)
        except LockUnavailable:
            return LockReply.AWAY
        # Not swapped: it changed hands between the two commands, so somebody is at work on it right now.
        return LockReply.HELD if swapped else LockReply.BUSY

    async def mark_recorded(self, event_id: str, token: str, epoch: str | None) -> None:
        """Replace our own lock by the marker. Call it only once the row's COMMIT is known; failing changes nothing."""
        if epoch is None:
            return
        key, ours, marker = self._key(event_id), _CLAIMED + token.encode(), _RECORDED + epoch.encode()
        try:
            await self._call("EVAL", _SWAP, 1, key, ours, marker, self._marker_ttl_ms)
        except LockUnavailable:
            log.debug("marker_not_written", event_id=event_id)

    async def forget(self, event_id: str, token: str, epoch: str | None) -> None:
        """Delete our own lock or marker, so that the next delivery reaches the ledger."""
        key, ours, marker = self._key(event_id), _CLAIMED + token.encode(), _RECORDED + (epoch or "").encode()
        try:
            await self._call("EVAL", _DROP, 1, key, ours, marker)
        except LockUnavailable:
            log.debug("lock_not_deleted", event_id=event_id)

    async def ping(self) -> None:
        """Ask Redis, whatever the breaker says; raises `LockUnavailable`."""
        try:
            await self._redis.ping()
        except _AWAY_ERRORS as error:
            raise LockUnavailable(type(error).__name__) from error

    async def close(self) -> None:
        """Close the connections."""
        await self._connection.disconnect(nowait=True)
        await self._redis.aclose()

    def _key(self, event_id: str) -> str:
        return self._prefix + event_id

    async def _set_if_absent(self, key: str, value: bytes) -> bytes | None:
        """`SET NX GET`: None when it was set, else what is there."""
        for last in (False, True):
            try:
                seen: bytes | None = await self._call("SET", key, value, "NX", "GET", "PX", self._lock_ttl_ms)
            except _WrongTypeError:
                # Concerns this one key, not the server: nothing of ours is ever a list or a hash.
                await self._call("DEL", key)
                if last:
                    break
            else:
                return seen
        raise LockUnavailable("the key keeps having the wrong type")

    async def _left_over(self, key: str) -> bool:
        """A lock that would outlive every lock we write was not written by us as it stands."""
        remaining = int(await self._call("PTTL", key))
        return remaining == -1 or remaining > self._lock_ttl_ms

    async def _call(self, *command: str | bytes | int) -> Any:
        if self.away:
            raise LockUnavailable("breaker open")
        if self._tripped:  # the window is over: this one call finds out, the others keep seeing it open
            self._away_until = time.monotonic() + self._breaker_seconds
        try:
            reply = await self._commands.call(hiredis.pack_command(command))  # type: ignore[arg-type]
        except ResponseError as error:
            if str(error).startswith("WRONGTYPE"):
                raise _WrongTypeError from error
            raise self._trip(error) from error
        except _AWAY_ERRORS as error:
            raise self._trip(error) from error
        if self._tripped:
            log.warning("redis_back")
            self._tripped, self._away_until = False, 0.0
        return reply

    async def _send(self, commands: Sequence[bytes]) -> Sequence[Any]:
        """One round trip for all of them. A lost connection is the answer to each: none of them is sent again."""
        try:
            await self._connect()
            async with asyncio.timeout(self._timeout_seconds):
                await self._connection.send_packed_command(commands, check_health=False)
                return [await self._reply() for _ in commands]
        except BaseException as error:
            await self._connection.disconnect(nowait=True)  # what comes on it would be taken for another's reply
            if isinstance(error, Exception):  # to those as well who asked meanwhile, or each batch waits out a timeout
                self._commands.refuse_waiting(error)
            raise

    async def _connect(self) -> None:
        """Unless it is. Every step of it may take the timeout: on a slow line they are several round trips."""
        connection = self._connection
        if connection.is_connected and await connection.can_read():  # closed while idle; or a reply to nobody
            await connection.disconnect(nowait=True)
        if not connection.is_connected:
            connection.socket_timeout = self._timeout_seconds
            await connection.connect()
            connection.socket_timeout = (
                None  # from now on there is one for all replies of a batch: it cost as much again
            )

    async def _reply(self) -> Any:
        try:
            return await self._connection.read_response(disconnect_on_error=False)  # _send does it
        except ResponseError as error:
            return error

    def _trip(self, error: BaseException) -> LockUnavailable:
        # OOM, READONLY and NOPERM are not connection errors, and all the same no lock can be had.
        if not self._tripped:
            metrics.redis_outages.inc()
            log.warning("redis_away", error=type(error).__name__, asked_again_every_seconds=self._breaker_seconds)
        self._tripped, self._away_until = True, time.monotonic() + self._breaker_seconds
        return LockUnavailable(type(error).__name__)


class _WrongTypeError(LockUnavailable):
    """A key of ours holds another type."""
