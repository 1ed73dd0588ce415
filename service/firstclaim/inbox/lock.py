"""The lock, which is the fast first check: one Redis key per event id, `claimed:<token>` or `recorded:<epoch>`.

Guarantees: a lock is replaced or deleted only by a caller that knows its exact value (compare-and-set,
compare-and-delete). One command decides what to do with a delivery. Correctness does not depend on this module: Redis
may be flushed, frozen or failed over at any moment, and no event is lost or processed twice, because the ledger
decides. So every error is the same value, `UNREACHABLE`. `redis_server.py` says what counts as an outage, and
`redis_cluster.py` which server has a key.
"""

import asyncio
from collections.abc import Mapping
from enum import Enum, auto
from typing import Any, Protocol

import structlog

from firstclaim.errors import LockUnavailable
from firstclaim.inbox.lock_commands import DROP, SWAP, SWAP_MANY
from firstclaim.inbox.redis_server import WrongTypeError

log = structlog.get_logger(__name__)

_CLAIMED = b"claimed:"
_RECORDED = b"recorded:"
_GONE = -2  # the reply to PTTL: there is no such key


class LockServers(Protocol):
    """Where the keys are: one server (`RedisServer`), or the masters of a Cluster (`RedisCluster`)."""

    several_keys: bool
    """Whether one command may have several keys."""

    @property
    def unreachable(self) -> bool:
        """Whether no command is sent to any server, because all failed a moment ago."""

    async def call(self, name: str, *arguments: str | bytes | int) -> Any:
        """The reply to a command. Raises `LockUnavailable`."""

    async def ping(self) -> None:
        """Raises `LockUnavailable` if a server does not answer."""

    async def close(self) -> None:
        """Close the connections."""


class LockReply(Enum):
    """The result of a lock attempt."""

    HELD = auto()  # ours: claim in the ledger
    RECORDED = auto()  # a durable row exists under the current epoch, and is owned
    BUSY = auto()  # another delivery is between lock and row; nothing is promised yet
    UNREACHABLE = auto()  # Redis did not answer, refused the command, or gave a reply of an unexpected type


class Lock:
    """The locks of all event ids. Its methods never raise: a failure is `UNREACHABLE`, or has no effect."""

    def __init__(
        self, servers: LockServers, *, prefix: str, lock_ttl_seconds: float, marker_ttl_seconds: float
    ) -> None:
        self._servers = servers
        self._prefix = prefix
        self._lock_ttl_ms = round(lock_ttl_seconds * 1000)
        self._marker_ttl_ms = round(marker_ttl_seconds * 1000)

    @property
    def unreachable(self) -> bool:
        """Whether the breaker is open: Redis failed a moment ago, and no command is sent."""
        return self._servers.unreachable

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
            swapped = await self._servers.call("EVAL", SWAP, 1, key, current, ours, self._lock_ttl_ms)
        except LockUnavailable:
            return LockReply.UNREACHABLE
        # Not swapped: the value changed between the two commands, so another delivery is in flight.
        return LockReply.HELD if swapped else LockReply.BUSY

    async def remaining_seconds(self, event_id: str) -> float:
        """How long another's lock lasts, at most: a TTL of ours, also if Redis does not say."""
        try:
            remaining_ms = int(await self._servers.call("PTTL", self._key(event_id)))
        except LockUnavailable:
            return self._lock_ttl_ms / 1000
        if remaining_ms == _GONE:
            return 0.0
        return (self._lock_ttl_ms if remaining_ms < 0 else min(remaining_ms, self._lock_ttl_ms)) / 1000

    async def mark_recorded(self, event_id: str, token: str, epoch: str | None) -> None:
        """Replace our own lock by the marker. Call it only once the row's COMMIT is known. A failure does no harm."""
        if epoch is None:
            return
        key, ours, marker = self._key(event_id), _CLAIMED + token.encode(), _RECORDED + epoch.encode()
        try:
            await self._servers.call("EVAL", SWAP, 1, key, ours, marker, self._marker_ttl_ms)
        except LockUnavailable:
            log.debug("marker_not_written", event_id=event_id)

    async def mark_all_recorded(self, tokens: Mapping[str, str], epoch: str | None) -> None:
        """The same for many events, in one command or in one batch per server: `tokens` by event id.

        All were committed under `epoch`.
        """
        if epoch is None:
            return
        if not self._servers.several_keys:
            await asyncio.gather(*(self.mark_recorded(event_id, token, epoch) for event_id, token in tokens.items()))
            return
        keys = [self._key(event_id) for event_id in tokens]
        ours = [_CLAIMED + token.encode() for token in tokens.values()]
        marker = _RECORDED + epoch.encode()
        try:
            await self._servers.call("EVAL", SWAP_MANY, len(keys), *keys, *ours, marker, self._marker_ttl_ms)
        except LockUnavailable:
            log.debug("markers_not_written", events=len(keys))

    async def forget(self, event_id: str, token: str, epoch: str | None) -> None:
        """Delete our own lock or marker, so that the next delivery reaches the ledger."""
        key, ours, marker = self._key(event_id), _CLAIMED + token.encode(), _RECORDED + (epoch or "").encode()
        try:
            await self._servers.call("EVAL", DROP, 1, key, ours, marker)
        except LockUnavailable:
            log.debug("lock_not_deleted", event_id=event_id)

    async def ping(self) -> None:
        """Whether Redis answers now, also while the breaker is open. Raises `LockUnavailable`."""
        await self._servers.ping()

    async def close(self) -> None:
        """Close the connections."""
        await self._servers.close()

    def _key(self, event_id: str) -> str:
        return self._prefix + event_id

    async def _set_if_absent(self, key: str, value: bytes) -> bytes | None:
        """`SET NX GET`: None if it was set, else the current value."""
        for last in (False, True):
            try:
                call = self._servers.call
                current: bytes | None = await call("SET", key, value, "NX", "GET", "PX", self._lock_ttl_ms)
            except WrongTypeError:
                # A fault of this one key, not of the server: we never write a list or a hash, so delete it.
                await self._servers.call("DEL", key)
                if last:
                    break
            else:
                return current
        raise LockUnavailable("the key keeps having the wrong type")

    async def _is_left_over(self, key: str) -> bool:
        """Whether the lock cannot be one of ours, because it has no TTL or a longer one."""
        remaining = int(await self._servers.call("PTTL", key))
        return remaining == -1 or remaining > self._lock_ttl_ms
